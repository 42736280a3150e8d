"""Encoder directories that are incomplete, and what their files ask for."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from qwen_vl.checkpoints import CONFIG
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from visproj.errors import InputError
from visproj.qwen_vl import QwenVisionTransformer
from visproj.qwen_vl.config import MODEL_TYPE
from visproj.vlm.encoders import cropped_notes, load_encoder
from visproj.vlm.photographs import Photograph
from visproj.vlm.preprocessing import read_preprocessing

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
RECIPE = {
    "crop_size": {"height": 32, "width": 32},
    "size": {"shortest_edge": 32},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.5],
}
SQUARE = {
    "size": {"height": 32, "width": 32},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


@pytest.fixture
def folder(request, tmp_path):
    """A CLIP encoder, or a DINOv2 or SigLIP one if the test asks for it."""
    sizes = {**SIZES, "image_size": 32, "patch_size": 8}
    kind = getattr(request, "param", "clip")
    if kind == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(**sizes, intermediate_size=48))
    elif kind == "siglip":
        model = SiglipVisionModel(SiglipVisionConfig(**sizes, intermediate_size=48))
    else:
        model = Dinov2Model(Dinov2Config(**sizes))
    model.save_pretrained(tmp_path)
    change(tmp_path, "preprocessor_config.json", **(SQUARE if kind == "siglip" else RECIPE))
    return tmp_path


@pytest.fixture
def qwen_folder(tmp_path):
    QwenVisionTransformer(CONFIG).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def change(folder, name, **changes):
    """Change keys of a JSON file; ``None`` removes one."""
    file = folder / name
    values = {**(json.loads(file.read_text()) if file.exists() else {}), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def read(**changes):
    return read_preprocessing({**RECIPE, **changes}, "E", 32)


def read_square(**changes):
    return read_preprocessing({**SQUARE, **changes}, "E", 32, crops=False)


REFUSED = {
    "image_mean": [None, "x", [1, 2], [1, 2, "3"], [1, 2, float("nan")], 0.5],
    "image_std": [None, [0.0, 1, 1], [-1, 1, 1], [True, 1, 1]],
    "crop_size": [0, -1, True, 3.5, "32", [32, 32], {"height": 32}, {"height": 32, "width": 16}],
    "size": [31, {"height": 40, "width": 40}, {"shortest_edge": [32]}, {"longest_edge": 40}, "40"],
    "resample": [99, -1, "bicubic", [], True],
    "rescale_factor": [0, -1.0, float("inf"), "1/255", True],
    "do_resize": [False, "no", 1],
    "do_center_crop": [0, "false"],
    "do_normalize": ["false"],
    "do_pad": [True],
    "do_flip_channel_order": [True, 0],
}


@pytest.mark.parametrize("key", REFUSED)
def test_settings_that_are_refused(key):
    for value in REFUSED[key]:
        with pytest.raises(InputError, match=rf"^preprocessor_config\.json .* E: {key}"):
            read(**{key: value})


REFUSED_SQUARES = {
    "size": [
        32,
        {"height": 32},
        {"height": 32, "width": 16},
        {"height": 32.0, "width": 32.0},
        {"shortest_edge": 32},
        {"longest_edge": 32},
        {"max_height": 32, "max_width": 32},
        "32",
    ],
    "image_mean": [None, 0.5],
    "image_std": [[0.5, 0.5, 0]],
    "resample": ["bilinear"],
    "do_resize": [False],
    "do_pad": [True],
}


@pytest.mark.parametrize("key", REFUSED_SQUARES)
def test_settings_without_a_crop_that_are_refused(key):
    for value in REFUSED_SQUARES[key]:
        with pytest.raises(InputError, match=rf"^preprocessor_config\.json .* E: {key}"):
            read_square(**{key: value})


def test_a_crop_is_done_or_left_out_as_the_file_says():
    assert read_square() == (32, 32, Image.Resampling.BICUBIC, (0.5,) * 3, (0.5,) * 3, True)
    # crop_size has no effect without the crop.
    assert read_square(do_center_crop=False, crop_size=24, do_pad=False) == read_square()
    assert read_square(size=None) == read_square()
    assert read_square(resample=2).resample == Image.Resampling.BILINEAR
    assert read_square(size={"height": 48, "width": 48}).crop == 48
    assert read_square(do_center_crop=True, size={"shortest_edge": 40})[:2] == (40, 32)
    clip = read(do_center_crop=False, size={"height": 32, "width": 32})
    assert (clip.whole, clip.crop) == (True, 32)
    for size in (None, 32, {"shortest_edge": 32}):
        with pytest.raises(InputError, match=r"E: size is .*(height.*do_center_crop is off)"):
            read(do_center_crop=False, size=size)
    with pytest.raises(InputError, match=r"E: size .*shortest_edge of at least 32"):
        read_square(do_center_crop=True)


def test_settings_that_are_followed():
    want = read()
    assert (want.resize, want.crop, want.resample) == (32, 32, Image.Resampling.BICUBIC)
    assert (want.mean, want.std) == ((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    assert read(crop_size=32, size=32, do_pad=False, do_convert_rgb=True, resample=3) == want
    assert read(crop_size=None, size=None, rescale_factor=1 / 255, do_resize=None) == want
    assert read(size={"shortest_edge": 40}).resize == read(size=40).resize == 40
    assert read(resample=2).resample == Image.Resampling.BILINEAR
    plain = read(do_normalize=False, image_mean=None, image_std=None)
    assert (plain.mean, plain.std) == ((0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({}, lambda x: (x / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.5]),
        ({"rescale_factor": 1 / 127.5}, lambda x: (x / 127.5 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.5]),
        ({"do_rescale": False}, lambda x: (x - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.5]),
        ({"do_normalize": False}, lambda x: x / 255),
        ({"do_normalize": False, "do_rescale": False}, lambda x: x),
    ],
)
def test_values_are_scaled_as_the_file_says(folder, changes, values):
    change(folder, "preprocessor_config.json", **changes)
    image = Image.effect_noise((32, 32), 80).convert("RGB")
    pixels = load_encoder(str(folder)).preprocess([image])[0].permute(1, 2, 0)
    # fp32 arithmetic on numbers below 2000.
    np.testing.assert_allclose(pixels, values(np.asarray(image, dtype=float)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_the_crop_is_the_middle_of_the_resized_image(folder, resample):
    change(folder, "preprocessor_config.json", size={"shortest_edge": 40}, resample=int(resample))
    image = Image.effect_noise((160, 80), 80).convert("RGB")
    want = image.resize((80, 40), resample).crop((24, 4, 56, 36))
    got = load_encoder(str(folder)).crop(image)
    # 8-bit rounding after each of the two passes.
    assert np.abs(np.asarray(got, dtype=int) - np.asarray(want, dtype=int)).max() <= 1


def test_a_note_on_what_is_cropped_away(folder):
    change(folder, "preprocessor_config.json", size={"shortest_edge": 40})
    encoder = load_encoder(str(folder))
    assert encoder.seen_part((80, 80)) == pytest.approx(0.64)
    photographs = [
        Photograph("a", folder / "wide.jpg", (300, 80)),
        Photograph("b", folder / "square.jpg", (80, 80)),
        Photograph("c", folder / "tall.jpg", (80, 100)),
        Photograph("d", folder / "taller.jpg", (80, 110)),
    ]
    assert cropped_notes(encoder, photographs) == [
        "wide.jpg: the encoder sees only the middle 17 % of it",
        "taller.jpg: the encoder sees only the middle 47 % of it",
    ]


@pytest.mark.parametrize("folder", ["siglip"], indirect=True)
@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_the_whole_image_is_resized_to_a_square(folder, resample):
    change(folder, "preprocessor_config.json", resample=int(resample))
    encoder = load_encoder(str(folder))
    image = Image.effect_noise((160, 30), 80).convert("RGB")
    assert np.array_equal(encoder.crop(image), image.resize((32, 32), resample))
    assert encoder.seen_part(image.size) == 1.0
    wide = [Photograph("a", folder / "wide.jpg", (3000, 80))]
    assert cropped_notes(encoder, wide) == []


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is not valid JSON"),
        (b"[1]", "holds a list, not an object"),
        (b"null", "holds a NoneType, not an object"),
    ],
)
def test_what_is_not_json_is_named(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"^cannot load .*{folder}: {name} {message}"):
        load_encoder(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"<html>", "web"),
        (b"", "emp"),
    ],
)
def test_what_is_not_weights_is_named(folder, content, message):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=rf"{folder}/model\.safetensors is .*{message}"):
        load_encoder(str(folder))


CONFIGS = {
    "crop of another size": ({"image_size": 64}, "crop_size is 32, but .* image_size is 64"),
    "patches that are not square": ({"patch_size": [8, 4]}, r"patch_size is \[8, 4\]"),
    "no patches": ({"patch_size": 0}, "patch_size is 0"),
    "patches larger than the crop": ({"patch_size": 64}, "patch_size is 64"),
    "grey": ({"num_channels": 1}, "num_channels 1"),
    "more layers": ({"num_hidden_layers": 3}, r"lacks the weights .*layers\.2\..* and 12 more$"),
    "fewer layers": ({"num_hidden_layers": 1}, r"has more layers than config\.json .*layers\.1\."),
    "wider": ({"hidden_size": 64}, r"not have the shapes of config\.json in .*class_embedding"),
    "not a number": ({"hidden_size": "x"}, "cannot load the encoder directory .*"),
    "unknown activation": ({"hidden_act": "nope"}, "cannot load the encoder directory .*nope"),
    "heads that do not divide": ({"num_attention_heads": 5}, "cannot load the encoder directory"),
    "code of its own": (
        {"model_type": "x", "auto_map": {"AutoConfig": "x.Y"}},
        "cannot load the encoder directory",
    ),
    "no model type": ({"model_type": None}, "cannot load the encoder directory"),
    "another kind": ({"model_type": "vit"}, "is a vit model, not a CLIP, SigLIP or DINOv2 one"),
    "another kind that is known": ({"model_type": "dinov2"}, "lacks the weights "),
    "NaFlex": ({"model_type": "siglip2_vision_model"}, "a NaFlex SigLIP 2, whose number of tokens"),
    "whole NaFlex": ({"model_type": "siglip2"}, "a NaFlex SigLIP 2, whose number of tokens"),
    "ours of Qwen-VL": ({"model_type": MODEL_TYPE}, r"config\.json: unknown entries "),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations_that_are_refused(folder, case):
    changes, message = CONFIGS[case]
    change(folder, "config.json", **changes)
    with pytest.raises(InputError, match=message) as refused:
        load_encoder(str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("folder", ["dinov2"], indirect=True)
def test_a_crop_that_dinov2_resizes_its_positions_to(folder):
    change(folder, "preprocessor_config.json", crop_size=48, size=48)
    encoder = load_encoder(str(folder))
    features = encoder.encode(encoder.preprocess([Image.new("RGB", (9, 9))]))
    assert features.shape == (1, 1 + 6 * 6, 32)
    assert torch.isfinite(features).all()


SIGLIP_CONFIGS = {
    "resized to another size": ({"image_size": 64}, "size is 32, but the model's image_size is 64"),
    "patches that are not square": ({"patch_size": [8, 4]}, r"patch_size is \[8, 4\]"),
    "patches larger than the image": ({"patch_size": 64}, "patch_size is 64"),
    "an image that is not square": ({"image_size": [32, 16]}, r"image_size is \[32, 16\]"),
    "grey": ({"num_channels": 1}, "num_channels 1"),
    "more layers": ({"num_hidden_layers": 3}, r"lacks the weights .*layers\.2\..* and 12 more$"),
    "fewer layers": ({"num_hidden_layers": 1}, r"has more layers than config\.json .*layers\.1\."),
    "wider": ({"hidden_size": 64}, r"does not have the shapes of config\.json in "),
    "smaller patches": ({"patch_size": 4}, r"not have the shapes of config\.json in .*embedding"),
    "not a number": ({"hidden_size": "x"}, "cannot load the encoder directory .*"),
    "unknown activation": ({"hidden_act": "nope"}, "cannot load the encoder directory .*nope"),
    "heads that do not divide": ({"num_attention_heads": 5}, "cannot load the encoder directory"),
}


@pytest.mark.parametrize("folder", ["siglip"], indirect=True)
@pytest.mark.parametrize("case", SIGLIP_CONFIGS)
def test_configurations_of_siglip_that_are_refused(folder, case):
    changes, message = SIGLIP_CONFIGS[case]
    change(folder, "config.json", **changes)
    with pytest.raises(InputError, match=message) as refused:
        load_encoder(str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("folder", ["siglip"], indirect=True)
def test_siglip_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=f"cannot load the encoder directory {folder}: .*"):
        load_encoder(str(folder))


QWEN_CONFIGS = {
    "patches that are not square": ({"patch_size": [14, 7]}, r"patch_size must be .*\[14, 7\]"),
    "patches that do not divide": ({"patch_size": 15}, "image_size 56 is not a multiple of"),
    "grey": ({"num_channels": 1}, "unknown entries num_channels"),
    "more layers": ({"layers": 3}, r"transformer\.resblocks\.2\."),
    "fewer layers": ({"layers": 1}, r"transformer\.resblocks\.1\."),
    "wider": ({"width": 64}, r"conv1\.weight"),
    "not a number": ({"output_dim": "x"}, "output_dim must be"),
    "queries that form no square": ({"n_queries": 15}, "n_queries must be a square number"),
}


@pytest.mark.parametrize("case", QWEN_CONFIGS)
def test_configurations_of_qwen_vl_that_are_refused(qwen_folder, case):
    changes, message = QWEN_CONFIGS[case]
    change(qwen_folder, "config.json", **changes)
    with pytest.raises(InputError, match=rf"{qwen_folder}/.*{message}") as refused:
        load_encoder(str(qwen_folder))
    assert "\n" not in str(refused.value)


QWEN_PIXELS = {
    "not of whole patches": ({"crop_size": 50}, "crop_size is 50, not a multiple of .* 14"),
    "a square not of whole patches": (
        {"do_center_crop": False, "size": {"height": 50, "width": 50}},
        "size is 50, not a multiple of .* 14",
    ),
    "padded": ({"do_pad": True}, "do_pad is True, which is not supported"),
    "no mean": ({"image_mean": None}, "image_mean is missing"),
}


@pytest.mark.parametrize("case", QWEN_PIXELS)
def test_settings_of_qwen_vl_that_are_refused(qwen_folder, case):
    changes, message = QWEN_PIXELS[case]
    change(qwen_folder, "preprocessor_config.json", **changes)
    with pytest.raises(InputError, match=rf"^preprocessor_config\.json .*{qwen_folder}: {message}"):
        load_encoder(str(qwen_folder))


def test_an_empty_file_of_settings_is_not_a_missing_one(qwen_folder):
    (qwen_folder / "preprocessor_config.json").write_text("{}")
    with pytest.raises(InputError, match="image_mean is missing"):
        load_encoder(str(qwen_folder))


def test_qwen_vl_without_weights(qwen_folder):
    (qwen_folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=f"^cannot load the encoder directory {qwen_folder}: no "):
        load_encoder(str(qwen_folder))


def test_qwen_vl_with_a_pointer_for_weights(qwen_folder):
    (qwen_folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=rf"{qwen_folder}/model\.safetensors is .*Git LFS"):
        load_encoder(str(qwen_folder))


@pytest.mark.parametrize(
    ("changes", "side"), [({}, 56), ({"crop_size": 70, "size": {"shortest_edge": 84}}, 70)]
)
def test_another_size_than_qwen_vl_was_trained_on(qwen_folder, changes, side):
    change(qwen_folder, "preprocessor_config.json", **changes)
    encoder = load_encoder(str(qwen_folder))
    pixels = encoder.preprocess([Image.new("RGB", (90, 80))])
    assert pixels.shape == (1, 3, side, side)
    assert encoder.encode(pixels).shape == (1, 16, 48)
