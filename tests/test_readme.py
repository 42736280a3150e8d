"""The documents' examples run as they stand, and their commands are accounted for."""

import re
from pathlib import Path

import docs_commands
import pytest
import torch
from qwen_vl.checkpoints import write_checkpoint
from upstream import UpstreamModel
from vlm.tiny import (
    TinyEncoder,
    tiny_language_model,
    tiny_photograph,
    tiny_projector,
    tiny_tokenizer,
)

import visproj
from benchmarks.published import Holder, MiniCPM
from visproj import PerceiverProjector, PretrainedProjector
from visproj.supported import MODELS, describe_models

ROOT = Path(__file__).resolve().parent.parent


def blocks():
    """Python blocks of all documents."""
    found = []
    for path in docs_commands.documents():
        found += re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    return found


def projector(monkeypatch):
    return {
        "checkpoint": PerceiverProjector(1024, 4096).state_dict(),
        "features": torch.randn(2, 257, 1024),
        "wide_features": torch.randn(1, 769, 1024).bfloat16(),
        "text_embeds": torch.randn(2, 4, 4096),
        "input_ids": torch.tensor([[1, 7, 2, 3], [7, 4, 5, 6]]),
        "images_per_sample": [1, 1],
        "image_token_id": 7,
    }


def projector_done(names):
    assert names["sequence"].attention_mask.sum(1).tolist() == [259, 259]
    assert names["attention"].shape == (1, 32, 256, 768)
    torch.testing.assert_close(names["attention"].sum(-1), torch.ones(1, 32, 256))


def conversion(monkeypatch):
    model = UpstreamModel("perceiver")
    Path("checkpoint").mkdir()
    torch.save(model.state_dict(), "checkpoint/pytorch_model.bin")
    return {"visproj": visproj, "model": model, "before": list(model.projection.parameters())}


def conversion_done(names):
    assert type(names["model"].projection).__name__ == "UpstreamPerceiver"
    after = list(names["model"].projection.parameters())
    assert all(a is b for a, b in zip(after, names["before"], strict=True))
    assert isinstance(names["projector"], PerceiverProjector)
    assert Path("projector.safetensors").stat().st_size > 0


def models(monkeypatch):
    model = Holder(MiniCPM(vis_dim=24, dim=32, max_size=(32, 32)).eval())
    return {
        "visproj": visproj,
        "model": model,
        "features": torch.randn(2, 20, 24),
        "tgt_sizes": torch.tensor([[4, 5], [2, 3]], dtype=torch.int32),
        "first": torch.randn(32 * 32, 24),
        "second": torch.randn(24 * 18, 24),
        "rows": torch.randn(32 * 32 + 24 * 18, 24),
        "starts": torch.tensor([0, 1024, 1456], dtype=torch.int32),
    }


def models_done(names):
    assert names["visual"].shape == (2, 5, 32)
    assert visproj.revert(names["model"]) == ["resampler"]


def folding(monkeypatch):
    if not torch.cuda.is_available():  # there is no CUDA graph to record
        monkeypatch.setattr(visproj, "graphed", lambda folded, features: folded)
    projector = PerceiverProjector(32, 64)
    return {"visproj": visproj, "projector": projector, "features": torch.randn(1, 577, 32)}


def folding_done(names):
    expected = names["projector"](names["features"])
    with torch.no_grad():
        got = names["call"](names["features"])
    # Exact up to fp32's rounding of other products.
    torch.testing.assert_close(got, expected.detach(), rtol=1e-3, atol=1e-4)
    assert not names["folded"].is_stale(names["projector"])


def qwen_encoder(monkeypatch):
    write_checkpoint(Path("checkpoint"))
    visproj.extract_vision_encoder("checkpoint", "encoder")
    return {"photograph": tiny_photograph()}


def qwen_encoder_done(names):
    assert names["visual"].shape == (1, 16, 4096)  # the small checkpoint has 16 queries


def trained(monkeypatch):
    tiny_projector("perceiver").save_pretrained("visproj-train/perceiver/projector")
    language_model = ("tiny-llama", tiny_language_model(), tiny_tokenizer())
    monkeypatch.setattr("visproj.vlm.encoders.load_encoder", TinyEncoder)
    monkeypatch.setattr("visproj.vlm.language.load_language_model", lambda: language_model)
    return {"photograph": tiny_photograph()}


def trained_done(names):
    assert isinstance(names["model"].projector, PretrainedProjector)
    assert type(names["folded"]).__name__ == "FoldedPerceiver"


# By a line that only this block has: the names that it takes as given, and what comes of it.
EXAMPLES = {
    "sequence = insert_visual_tokens(": (projector, projector_done),
    "visproj.convert(model)": (conversion, conversion_done),
    "keep=True)  # for inference": (models, models_done),
    "folded.is_stale(projector)": (folding, folding_done),
    "encoder = QwenVisionTransformer.from_pretrained(": (qwen_encoder, qwen_encoder_done),
    "model.generate([photograph]": (trained, trained_done),
}


@pytest.mark.parametrize(
    "line",
    # The first one is 4096 wide.
    [pytest.param(line, marks=[pytest.mark.slow] * (not i)) for i, line in enumerate(EXAMPLES)],
)
def test_example(line, monkeypatch, tmp_path):
    (block,) = (block for block in blocks() if line in block)
    monkeypatch.chdir(tmp_path)
    prepare, check = EXAMPLES[line]
    names = prepare(monkeypatch)
    exec(block, names)
    check(names)


def test_every_example_is_run():
    assert [block for block in blocks() if sum(line in block for line in EXAMPLES) != 1] == []


def test_the_models_that_convert_are_counted():
    """The table is what `visproj info --models` prints."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line.split() for line in list(describe_models())[1:]]
    assert len(rows) == len(MODELS)
    for row in rows:
        assert f"| {' | '.join(row)} |" in readme


def test_every_command_is_run_or_listed():
    found = docs_commands.commands()
    assert docs_commands.stale_entries(found) == []
    run = docs_commands.to_run(found)
    assert "visproj demo" in run["pip install -c constraints.txt -e '.[demo]'"]
    assert "visproj extract checkpoint encoder/" in run["pip install -c constraints.txt -e ."]


def documents(tmp_path, readme):
    for name in ("README.md", "CONTRIBUTING.md"):
        (tmp_path / name).write_text(readme if name == "README.md" else "")
    return docs_commands.commands(tmp_path)


def test_commands_are_found(tmp_path):
    found = documents(
        tmp_path,
        "`visproj nothing` in a sentence\n"
        "```bash\npip install -c constraints.txt -e '.[train]' && visproj a  # why\n"
        "visproj b \\\n    --long\n```\n"
        "```console\n$ visproj c\nwhat it prints\n```\n"
        "```python\nd = 1\n```\n"
        "| what | command |\n|---|---|\n| `x` | `pytest e` or `visproj bench f` |\n",
    )
    install = "pip install -c constraints.txt -e '.[train]'"
    bench = "pip install -c constraints.txt -e '.[bench]'"
    texts = ["visproj a", "visproj b --long", "visproj c", "pytest e"]
    expected = [(text, install) for text in texts] + [("visproj bench f", bench)]
    assert [(command.text, command.install) for command in found] == expected
    assert docs_commands.to_run(found) == {install: texts, bench: ["visproj bench f"]}


def test_a_new_command_and_a_stale_entry_are_noticed(tmp_path):
    with pytest.raises(SystemExit, match=r"README\.md: no install line above `visproj new`"):
        documents(tmp_path, "```bash\nvisproj new\n```\n")
    found = documents(tmp_path, "```bash\npytest\n```\n")
    assert "pytest -m slow" in docs_commands.stale_entries(found)
    assert "pytest" not in docs_commands.stale_entries(found)


def test_the_first_failure_ends_the_run(tmp_path, capsys):
    with pytest.raises(SystemExit, match="no such thing"):
        docs_commands.run("echo no such thing; exit 3", tmp_path, {"PATH": "/usr/bin:/bin"})
    assert re.fullmatch(r"  3 +\d+\.\d s  echo .*\n", capsys.readouterr().out)


def test_its_test_command_is_what_ci_runs():
    commands = re.findall(r"^pip install .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands[:2] == [
        "pip install -c constraints.txt -e '.[demo]' && visproj demo",
        "pip install -c constraints.txt -e '.[test]' && pytest",
    ]
    assert 'grep -m1 "^pip install .*&& pytest$" README.md' in (ROOT / ".ci/run").read_text()
