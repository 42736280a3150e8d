"""The encoder that a projector was trained with is known by its content, not by its path."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from vlm.tiny import PROMPT

from visproj.errors import InputError
from visproj.vlm.encoders import load_encoder
from visproj.vlm.pretrained import PretrainedProjector, load_pretrained, located


def write_encoder(folder, seed=0, **changes):
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        **changes,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        CLIPVisionModel(config).save_pretrained(folder)
    recipe = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": 16, "width": 16},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(recipe))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working directory with ``models/clip`` in it."""
    write_encoder(tmp_path / "models" / "clip")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(folder, typed):
    encoder = load_encoder(typed)
    name = located(typed, encoder.name)
    projector = PretrainedProjector(
        "baseline", asdict(encoder.config), 64, name, "llm", PROMPT, None, encoder.weights_digest
    )
    projector.save_pretrained(folder)
    return load_pretrained(folder)


def test_relative_in_training_and_absolute_afterwards(work):
    projector = saved(work / "projector", "models/clip")
    assert projector.encoder == str(work / "models" / "clip")
    for name in ("models/clip", "./models/clip/", str(work / "models" / "clip")):
        projector.check_encoder(load_encoder(name))


def test_named_from_within(work, monkeypatch):
    monkeypatch.chdir(work / "models" / "clip")
    projector = saved(work / "projector", ".")
    assert projector.encoder == str(work / "models" / "clip")
    projector.check_encoder(load_encoder(str(work / "models" / "clip")))


def test_absolute_in_training_and_moved_afterwards(work):
    projector = saved(work / "projector", str(work / "models" / "clip"))
    shutil.move(work / "models" / "clip", work / "elsewhere")
    projector.check_encoder(load_encoder("elsewhere"))


def test_other_weights_under_the_same_name(work):
    projector = saved(work / "projector", "models/clip")
    shutil.rmtree(work / "models" / "clip")
    write_encoder(work / "models" / "clip", seed=1)
    with pytest.raises(InputError, match=r"not with models/clip \(other weights\)"):
        projector.check_encoder(load_encoder("models/clip"))


def test_the_same_weights_with_another_activation(work):
    projector = saved(work / "projector", "models/clip")
    write_encoder(work / "other", hidden_act="gelu")
    with pytest.raises(InputError, match=r"not with other \(hidden_act gelu\)"):
        projector.check_encoder(load_encoder("other"))


def test_checkpoints_without_a_digest_go_by_the_name(work):
    config = work / "projector" / "config.json"
    saved(work / "projector", "models/clip")
    values = json.loads(config.read_text())
    del values["encoder_digest"]
    config.write_text(json.dumps({**values, "encoder": "models/clip"}))
    projector = load_pretrained(work / "projector")
    projector.check_encoder(load_encoder(str(work / "models" / "clip")))
    shutil.copytree(work / "models" / "clip", work / "other")
    with pytest.raises(InputError, match="trained with the encoder models/clip, not with other"):
        projector.check_encoder(load_encoder("other"))


def test_names_that_are_not_paths_stay(work):
    assert located("someone/clip", "someone/clip") == "someone/clip"
    assert located(None, "models/clip") == "models/clip"
    assert located("models/clip", "models/clip") == str(work / "models" / "clip")
