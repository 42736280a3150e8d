import errno
import json
import socket
import stat

import pytest
import torch
from helpers import VIS_CONFIG
from huggingface_hub import hub_mixin
from safetensors.torch import load_file, save_file
from torch import nn
from training_engines import partition
from vlm.tiny import PROMPT, TinyEncoder, tiny_photograph, tiny_projector

from visproj import build_projector, fold
from visproj.errors import InputError
from visproj.vlm import pretrained as module
from visproj.vlm.pretrained import PretrainedProjector, load_pretrained

KINDS = ("baseline", "vit", "perceiver")
FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tmp_path):
    tiny_projector().save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def features():
    encoder = TinyEncoder()
    return encoder.encode(encoder.preprocess([tiny_photograph(seed) for seed in range(2)]))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_equal_to_the_bit(kind, tmp_path, features):
    projector = tiny_projector(kind)
    projector.save_pretrained(tmp_path / "new" / "folder")
    loaded = load_pretrained(tmp_path / "new" / "folder")
    assert not loaded.training
    want = projector.module.state_dict()
    got = loaded.module.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert torch.equal(loaded(features), projector(features))
    for name in ("kind", "lang_dim", "encoder", "language_model", "prompt"):
        assert getattr(loaded, name) == getattr(projector, name)
    loaded.check_encoder(TinyEncoder())


def test_round_trip_of_a_smaller_grid_of_queries(tmp_path, features):
    vision = vars(TinyEncoder().config)
    projector = PretrainedProjector(
        "perceiver", vision, 64, "tiny", "tiny-llama", PROMPT, query_grid=(2, 4)
    ).eval()
    projector.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded(features).shape == (2, 8, 64)
    assert torch.equal(loaded(features), projector(features))


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_the_bare_projectors(kind, tmp_path, features):
    projector = tiny_projector(kind)
    projector.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    bare = build_projector(kind, VIS_CONFIG, 64).eval()
    bare.load_state_dict(weights, strict=True)
    assert set(weights) == set(bare.state_dict())
    loaded = load_pretrained(tmp_path)
    with torch.no_grad():
        want = loaded(features)
        for folded in (loaded.fold(), fold(loaded.module)):
            torch.testing.assert_close(folded(features), want, rtol=1e-3, atol=1e-4)


def test_upstream_keys(folder):
    assert sorted(load_file(folder / "model.safetensors")) == [
        "0.bias",
        "0.weight",
        "1.bias",
        "1.weight",
    ]


def test_files(folder):
    assert names(folder) == FILES
    config = json.loads((folder / "config.json").read_text())
    vision = json.loads(json.dumps(vars(TinyEncoder().config)))
    assert config == {
        "kind": "baseline",
        "vision": vision,
        "lang_dim": 64,
        "encoder": "tiny",
        "language_model": "tiny-llama",
        "prompt": PROMPT,
        "query_grid": None,
        "encoder_digest": None,
        "has_cls": True,
    }
    assert "library_name: visproj" in (folder / "README.md").read_text()
    modes = {stat.S_IMODE((folder / name).stat().st_mode) for name in FILES}
    assert len(modes) == 1  # the umask's


def test_own_model_card_stays(folder):
    (folder / "README.md").write_text("mine")
    tiny_projector(seed=1).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"
    assert names(folder) == FILES


def change_weights(change):
    def damage(folder):
        file = folder / "model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file)

    return damage


def change_config(change):
    def damage(folder):
        file = folder / "config.json"
        config = json.loads(file.read_text())
        change(config)
        file.write_text(json.dumps(config))

    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


DAMAGE = {
    "missing key": (change_weights(lambda w: w.pop("0.bias")), r"0\.bias"),
    "extra key": (change_weights(lambda w: w.update(extra=torch.ones(1))), "extra"),
    "other shape": (change_weights(lambda w: w.update({"0.bias": torch.ones(3)})), r"0\.bias"),
    "truncated weights": (write("model.safetensors", b"\x10\0\0\0\0\0\0\0{"), "cannot load"),
    "other width": (
        change_config(lambda c: c.update(lang_dim=32)),
        "a projector with lang_dim 64, not 32",
    ),
    "width of text": (change_config(lambda c: c.update(lang_dim="wide")), "cannot load"),
    "unknown kind": (change_config(lambda c: c.update(kind="q-former")), "q-former"),
    "no kind": (change_config(lambda c: c.pop("kind")), "kind"),
    "no vision": (change_config(lambda c: c.update(vision=None)), "cannot load"),
    "empty vision": (change_config(lambda c: c.update(vision={})), "hidden_size"),
    "not JSON": (write("config.json", b"{"), "cannot load"),
    "not text": (write("config.json", b"\xff\xfe\xff"), "cannot load"),
    "a list": (write("config.json", b"[1, 2]"), "cannot load"),
    "null": (write("config.json", b"null"), "cannot load"),
    "integers": (change_weights(lambda w: w.update({"0.bias": torch.ones(64).int()})), "int32"),
    "placeholders": (change_weights(lambda w: w.update({"0.bias": torch.ones(0)})), "zero_to_fp32"),
    "a pointer": (write("model.safetensors", b"version https://git-lfs.github"), "Git LFS pointer"),
    "a page": (write("model.safetensors", b"<html>"), "web page"),
    "nothing": (write("model.safetensors", b""), "is empty"),
    "missing weights": (remove("model.safetensors"), r"has no model\.safetensors"),
    "missing config": (remove("config.json"), r"has no config\.json"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoint(folder, case):
    damage, message = DAMAGE[case]
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refused:
        load_pretrained(folder)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"the projector directory {tmp_path / 'none'} has"):
        load_pretrained(tmp_path / "none")


def test_another_encoder():
    projector = tiny_projector()
    with pytest.raises(ValueError, match=r"trained with the encoder tiny, not with other$"):
        projector.check_encoder(TinyEncoder("other"))
    with pytest.raises(ValueError, match=r"\(image_size 32, patch_size 8\)"):
        projector.check_encoder(TinyEncoder(side=32))


def test_the_encoder_from_another_place(folder):
    load_pretrained(folder).check_encoder(TinyEncoder("/models/tiny"))


def test_out_of_training_is_taken_for_its_projector(folder, features):
    out = folder.parent / "OUT"
    out.mkdir()
    folder.rename(out / "projector")
    for load in (load_pretrained, PretrainedProjector.from_pretrained):
        for given in (out, out / "projector", str(out)):
            assert torch.equal(load(given)(features), tiny_projector()(features))
    with pytest.raises(InputError, match=r"model\.safetensors is a file: pass the directory"):
        PretrainedProjector.from_pretrained(out / "projector" / "model.safetensors")


@pytest.mark.parametrize("load", [load_pretrained, PretrainedProjector.from_pretrained])
def test_a_folder_of_another_kind(load, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen_vl_vision_encoder"}')
    with pytest.raises(InputError, match=r"holds no projector. It holds a Qwen-VL vision encoder"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=str)
def test_dtype_of_the_weights(dtype, tmp_path):
    tiny_projector().bfloat16().save_pretrained(tmp_path)
    loaded = PretrainedProjector.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype or torch.bfloat16}
    default = PretrainedProjector.from_pretrained(tmp_path)
    assert {p.dtype for p in default.parameters()} == {torch.float32}


def test_loading_draws_no_random_numbers(folder):
    before = torch.random.get_rng_state()
    load_pretrained(folder)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_model_card(tmp_path):
    vision = vars(TinyEncoder().config)
    projector = PretrainedProjector(
        "perceiver", vision, 64, "/home/me/models/clip-b", "someone/llama", 'Say "what"\nyou see.'
    )
    projector.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n")
    assert "library_name: visproj" in card.split("---")[1]
    count = sum(parameter.numel() for parameter in projector.parameters())
    for line in (
        "# A perceiver projector from clip-b to someone/llama",
        "- kind: perceiver",
        "- widths: 32 (vision encoder) to 64 (language model)",
        f"- parameters: {count:,}",
        "- vision encoder: clip-b, 16 px, patches of 4 px",
        "- language model: someone/llama",
        '- prompt in training: "Say \\"what\\"\\nyou see."',
        'projector = PretrainedProjector.from_pretrained("NAME_OR_FOLDER")',
    ):
        assert line in card.splitlines()
    assert "{{" not in card
    assert "/home/me" not in card


def test_options_of_the_model_card(hub, tmp_path):
    projector = tiny_projector()
    projector.save_pretrained(tmp_path, model_card_kwargs={"prompt": "another"})
    assert "- prompt in training: another" in (tmp_path / "README.md").read_text()
    projector.push_to_hub("me/mine", model_card_kwargs={"prompt": "another"})
    assert b"- prompt in training: another" in Hub.uploaded[1]["README.md"]


def test_zero_3_is_gathered(tmp_path, monkeypatch):
    projector = tiny_projector()
    wanted = {key: value.clone() for key, value in projector.module.state_dict().items()}
    partition(projector, monkeypatch)
    projector.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[key], wanted[key]) for key in wanted)


def test_integers_are_refused(tmp_path):
    projector = tiny_projector()
    projector.module[0].weight = nn.Parameter(torch.ones(64, 32).int(), requires_grad=False)
    with pytest.raises(InputError, match=r"got torch\.int32"):
        projector.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["write_state", "os.replace"])
def test_full_disk_leaves_the_previous_checkpoint(folder, monkeypatch, name):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"{module.__name__}.{name}", full)
    with pytest.raises(OSError, match=f"cannot save the projector in {folder}: .*No space left"):
        tiny_projector("perceiver").save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert load_pretrained(folder).kind == "baseline"


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OSError, match=r"cannot save the projector in .*taken"):
        tiny_projector().save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


class Hub:
    """In HfApi's place: keeps what it is given."""

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, **options):
        self.repo_id = repo_id
        return self

    def upload_folder(self, *, repo_id, folder_path, **options):
        Hub.uploaded = (repo_id, {path.name: path.read_bytes() for path in folder_path.iterdir()})
        return f"https://hub/{repo_id}"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(hub_mixin, "HfApi", Hub)
    monkeypatch.setattr(Hub, "uploaded", None, raising=False)


def test_push_to_hub(hub, folder):
    assert tiny_projector().push_to_hub("me/mine") == "https://hub/me/mine"
    repo_id, files = Hub.uploaded
    assert repo_id == "me/mine"
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("repo_id", "want"), [(None, "mine"), ("me/other", "me/other")])
def test_save_and_push(hub, tmp_path, repo_id, want):
    projector = tiny_projector()
    assert projector.save_pretrained(tmp_path / "mine") is None
    assert Hub.uploaded is None
    pushed = projector.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id=repo_id)
    assert pushed == f"https://hub/{want}"
    assert Hub.uploaded[0] == want
    assert sorted(Hub.uploaded[1]) == names(tmp_path / "mine") == FILES


def test_from_the_hub(folder, monkeypatch, features):
    asked = []

    def download(repo_id, filename, *, revision, **options):
        asked.append((repo_id, filename, revision))
        return str(folder / filename)

    monkeypatch.setattr(module, "hf_hub_download", download)
    monkeypatch.setattr(
        hub_mixin, "hf_hub_download", lambda repo_id, **options: download(repo_id, **options)
    )
    loaded = PretrainedProjector.from_pretrained("me/mine", revision="v1")
    assert asked == [("me/mine", "config.json", "v1"), ("me/mine", "model.safetensors", "v1")]
    assert torch.equal(loaded(features), tiny_projector()(features))


def test_loading_says_nothing(folder, capsys):
    load_pretrained(folder)
    assert capsys.readouterr() == ("", "")
