import json
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qwen_vl.checkpoints import BLOCK, CONFIG, full_state

from visproj.qwen_vl import (
    QwenVisionConfig,
    QwenVisionTransformer,
    checkpoint_key,
    encoder_key,
    expected_shapes,
)
from visproj.qwen_vl.keys import config_from_shapes

RELEASED_BLOCK = {
    "heads": 16,
    "image_size": 448,
    "image_start_id": 151857,
    "layers": 48,
    "mlp_ratio": 4.9231,
    "output_dim": 4096,
    "patch_size": 14,
    "width": 1664,
}


def test_released_block_gives_the_defaults():
    config = QwenVisionConfig.from_visual_block(RELEASED_BLOCK)
    assert config == QwenVisionConfig()
    assert (config.mlp_width, config.hidden_size, config.pool_heads) == (8192, 4096, 32)


def test_json_round_trip(tmp_path):
    CONFIG.save(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {field.name for field in fields(CONFIG)} <= set(written)
    assert written["hidden_size"] == CONFIG.output_dim
    assert QwenVisionConfig.from_pretrained(tmp_path) == CONFIG


@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 6), st.integers(1, 5))
def test_any_config_survives_json(patches, layers, side, heads):
    config = QwenVisionConfig(
        image_size=7 * patches,
        patch_size=7,
        width=heads * 8,
        layers=layers,
        heads=heads,
        mlp_width=13,
        output_dim=64,
        n_queries=side**2,
    )
    assert QwenVisionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers must be a positive int, got 0"),
        ({"layers": 10**9}, "layers must be at most 1000"),
        ({"width": True}, "width must be a positive int"),
        ({"width": 1664.0}, "width must be a positive int"),
        ({"heads": 7}, "heads 7 do not divide width 1664"),
        ({"image_size": 450}, "450 is not a multiple of patch_size 14"),
        ({"n_queries": 255}, "n_queries must be a square number, got 255"),
        ({"positions": 10}, "positions must be a square number"),
        ({"output_dim": 4098}, "output_dim must be a multiple of 4"),
        ({"output_dim": 960}, "7 heads do not divide a width of 960"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be a positive float"),
    ],
    ids=str,
)
def test_unsuitable_numbers(change, message):
    with pytest.raises(ValueError, match=message):
        replace(QwenVisionConfig(), **change)


def test_unknown_entries_and_other_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown entries windows"):
        QwenVisionConfig.from_dict({**CONFIG.to_dict(), "windows": 3})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen", "visual": BLOCK}))
    with pytest.raises(ValueError, match=r"model_type is 'qwen'.*visproj extract"):
        QwenVisionConfig.from_pretrained(tmp_path)


def test_full_size_on_the_meta_device():
    """593 tensors and 1.9 B parameters; a 448 px image gives 256 tokens of 4096."""
    with torch.device("meta"):
        encoder = QwenVisionTransformer(QwenVisionConfig())
        tokens = encoder(torch.empty(2, 3, 448, 448))
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    assert shapes == expected_shapes(encoder.config)
    assert len(shapes) == 593
    assert sum(p.numel() for p in encoder.parameters()) == 1_918_833_408
    assert tokens.shape == (2, 256, 4096)
    listed = {
        "conv1.weight": (1664, 3, 14, 14),
        "positional_embedding": (256, 1664),
        "transformer.resblocks.47.attn.in_proj.weight": (4992, 1664),
        "transformer.resblocks.47.mlp.c_fc.weight": (8192, 1664),
        "attn_pool.query": (256, 4096),
        "attn_pool.pos_embed": (256, 4096),
        "attn_pool.kv_proj.weight": (4096, 1664),
        "attn_pool.attn.in_proj_weight": (12288, 4096),
        "ln_post.bias": (4096,),
    }
    assert listed.items() <= shapes.items()
    assert "attn_pool.kv_proj.bias" not in shapes


@pytest.mark.parametrize("output_dim", [32, 48])
def test_table_is_the_module(output_dim):
    """Also where the pooling needs no kv_proj because both widths are one."""
    config = replace(CONFIG, output_dim=output_dim)
    state = QwenVisionTransformer(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected_shapes(config)


@pytest.mark.parametrize("wrapper", ["", "module.", "base_model.model."])
def test_keys_and_their_inverse(wrapper):
    names = list(expected_shapes(CONFIG))
    keys = [checkpoint_key(name, wrapper) for name in names]
    assert [encoder_key(key) for key in keys] == names
    assert all(key.startswith(f"{wrapper}transformer.visual.") for key in keys)


def test_keys_against_the_upstream_rule():
    """Upstream keeps keys that contain 'visual', drops those of ``proj``, strips the prefix."""
    for key in full_state():
        kept = "visual" in key and "transformer.visual.proj" not in key
        expected = key.replace("transformer.visual.", "") if kept else None
        assert encoder_key(key) == expected
    assert encoder_key("visual.blocks.0.attn.qkv.weight") == "visual.blocks.0.attn.qkv.weight"


def test_architecture_from_shapes():
    assert config_from_shapes(expected_shapes(QwenVisionConfig())) == QwenVisionConfig()
