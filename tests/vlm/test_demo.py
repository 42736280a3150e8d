import os

import pytest
import torch
from helpers import Recorder
from PIL import Image
from vlm.tiny import TinyEncoder

from visproj.errors import InputError
from visproj.projectors import build_projector
from visproj.vlm import demo as module
from visproj.vlm.demo import compose, run_demo


@pytest.fixture
def loaded(monkeypatch, offline_encoder, language):
    """Spare each run the seconds of loading."""
    monkeypatch.setattr(module, "load_encoder", lambda name: offline_encoder)
    monkeypatch.setattr(module, "load_language_embedding", lambda: language)


def test_default_run(loaded, tmp_path):
    progress = Recorder()
    before = torch.get_rng_state()
    report = run_demo(out=tmp_path / "out", progress=progress)
    assert torch.equal(torch.get_rng_state(), before)
    assert progress.stages[0] == ("loading the vision encoder", 0, 0)
    assert progress.stages[-1] == ("drawing", 0, 0)
    assert report.notes == []

    seen = [(row.kind, row.parameters, row.tokens_in, row.tokens_out) for row in report.rows]
    assert seen == [
        ("baseline", 222_912, 257, 257),
        ("vit", 1_997_376, 257, 257),
        ("perceiver", 2_181_888, 257, 256),
    ]
    # "<image>\nDescribe the photograph." is the image and five tokens of text.
    assert [row.sequence for row in report.rows] == [(2, 262, 576), (2, 262, 576), (2, 261, 576)]
    for row in report.rows:
        assert 0 < row.max_error < 2e-5
        assert row.milliseconds > 0
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == sorted(path.name for path in report.pictures)
    assert written == [
        "china-attention.png",
        "china-features.png",
        "flower-attention.png",
        "flower-features.png",
        "positions.png",
    ]
    for path in report.pictures:
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 100


def test_an_encoder_without_cls(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_encoder", lambda name: TinyEncoder(has_cls=False))
    report = run_demo(out=tmp_path / "out")
    seen = [(row.kind, row.tokens_in, row.tokens_out) for row in report.rows]
    assert seen == [("baseline", 16, 16), ("vit", 16, 16), ("perceiver", 16, 256)]
    assert len(report.pictures) == 5


def test_same_seed_same_bytes(loaded, tmp_path):
    photo = tmp_path / "ramp.png"
    Image.linear_gradient("L").save(photo)
    runs = []
    for name in ("first", "second"):
        torch.rand(3)  # where the global generator stands does not matter
        report = run_demo([photo], kinds=["perceiver"], out=tmp_path / name, seed=5)
        pictures = {path.name: path.read_bytes() for path in report.pictures}
        runs.append((report.rows[0].max_error, pictures))
    assert runs[0] == runs[1]
    assert sorted(runs[0][1]) == ["positions.png", "ramp-attention.png", "ramp-features.png"]


def test_the_seed_is_that_of_the_projector_alone(loaded, offline_encoder, language):
    torch.manual_seed(7)
    want = build_projector("perceiver", offline_encoder.config, 576).state_dict()
    got = module._untrained("perceiver", offline_encoder, language, 7).state_dict()
    assert all(torch.equal(got[key], want[key]) for key in want)
    other = module._untrained("perceiver", offline_encoder, language, 8).state_dict()
    assert not torch.equal(other["query"], want["query"])


def test_no_perceiver_no_attention(loaded, tmp_path):
    photo = tmp_path / "ramp.png"
    Image.linear_gradient("L").resize((600, 256)).save(photo)
    report = run_demo([photo], kinds=["baseline"], out=tmp_path / "out")
    assert report.notes == ["ramp.png: the encoder sees only the middle 43 % of it"]
    assert [row.kind for row in report.rows] == ["baseline"]
    assert sorted(path.name for path in report.pictures) == ["positions.png", "ramp-features.png"]


def test_compose_puts_tokens_where_the_placeholder_stands(language):
    tokens = torch.arange(2 * 3 * 576, dtype=torch.float32).reshape(2, 3, 576)
    sequence = compose(tokens, "Hello world<image>!", language)
    assert sequence.shape == (2, 6, 576)
    assert torch.equal(sequence[:, 2:5], tokens)
    text = language.embed(torch.tensor([19556, 905, 17]))
    for sample in sequence:
        assert torch.equal(sample[[0, 1, 5]], text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "<image> and <image>"}, "has more than one <image>"),
        ({"kinds": ["q-former"]}, "q-former"),
        ({"images": ["nowhere.jpg"]}, r"nowhere\.jpg"),
    ],
)
def test_bad_input_writes_nothing(loaded, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_demo(**options, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [{"kinds": ["q-former"]}, {"seed": -1}, {"seed": 2**32}, {"prompt": "<image><image>"}],
)
def test_options_are_checked_before_anything_is_loaded(monkeypatch, tmp_path, options):
    monkeypatch.setattr(module, "load_encoder", pytest.fail)
    with pytest.raises(InputError):
        run_demo(**options, out=tmp_path / "out")


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "load_encoder", pytest.fail)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=f"^cannot write {tmp_path / 'out'}: "):
        run_demo(out=tmp_path / "out")


def test_output_folder_that_is_a_file(tmp_path):
    out = tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        run_demo(out=out)
    assert out.read_text() == "mine"
