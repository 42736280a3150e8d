"""Folded files of the format before today's are still read."""

import json

import pytest
import torch
from helpers import features, make, randomise
from safetensors.torch import save_file
from torch import nn

from visproj import load_folded
from visproj.folding import FoldedLinear, FoldedPerceiver
from visproj.folding.modules import copied_linear, copied_norm
from visproj.qwen_vl import QwenVisionConfig
from visproj.qwen_vl.model import AttentionPool

# Names of today and, as they were written down when the format changed, of visproj-folded-2.
SCALED = {
    "linear.weight": "weight",
    "linear.bias": "bias",
    "factor": "stats_weight",
    "factor_bias": "stats_bias",
    "shift": "shift",
}
NORMED = {"0.weight": "weight", "0.bias": "bias", "1.weight": "gain", "1.bias": "shift"}
PERCEIVER = {
    "queries": "queries",
    "position_table": "position_table",
    "kv_table": "kv_table",
    "kv.linear.weight": "kv_weight",
    "kv.linear.bias": "kv_bias",
    "kv.factor": "stats_weight",
    "kv.factor_bias": "stats_bias",
}
TAILS = {
    "for Triton": {
        "tail.linear.weight": "final_weight",
        "tail.linear.bias": "final_bias",
        "tail.factor": "out_stats_weight",
        "tail.factor_bias": "out_stats_bias",
        "tail.shift": "final_shift",
    },
    "for torch": {
        "tail.0.weight": "out_weight",
        "tail.0.bias": "out_bias",
        "tail.1.weight": "gain",
        "tail.1.bias": "shift",
        "tail.2.weight": "final_weight",
        "tail.2.bias": "final_bias",
    },
    "attention pool": {"tail.weight": "out_weight", "tail.bias": "out_bias"},
}


def older_names(folded, form):
    if isinstance(folded, FoldedPerceiver):
        return PERCEIVER | TAILS[form]
    product = {
        f"product.{new}": old for new, old in (SCALED if form == "for Triton" else NORMED).items()
    }
    if isinstance(folded, FoldedLinear):
        return product
    layer = {name: name for name in folded.state_dict() if name.startswith("vis_layer.")}
    return {f"tail.{new}": f"tail.{old}" for new, old in product.items()} | layer


def projector_of(kind):
    if kind == "attention pool":
        config = QwenVisionConfig(layers=1, width=16, heads=2, mlp_width=16, output_dim=32)
        return randomise(AttentionPool(config)).double()
    return make(kind)


def folded_of(kind, form):
    """What an earlier version saved: a Perceiver's tail was folded for the kernels only."""
    projector = projector_of(kind)
    folded = projector.fold(triton=form == "for Triton")
    if (kind, form) == ("perceiver", "for torch"):
        norm, outer = projector.projection
        folded.tail = nn.Sequential(
            copied_linear(projector.attn.out_proj, torch.float64),
            copied_norm(norm, torch.float64),
            copied_linear(outer, torch.float64),
        )
        folded.config["out_floor"] = None
    return folded


def test_a_tail_that_is_not_folded_is_read(tmp_path):
    folded = folded_of("perceiver", "for torch")
    folded.save(tmp_path / "folded")
    x = features(2, 17)
    torch.testing.assert_close(
        load_folded(tmp_path / "folded")(x), folded(x), rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *((kind, form) for kind in ("baseline", "vit", "perceiver") for form in list(TAILS)[:2]),
        ("attention pool", "attention pool"),
    ],
)
def test_the_older_format_is_read(tmp_path, kind, form):
    folded = folded_of(kind, form)
    names, state = older_names(folded, form), folded.state_dict()
    assert names.keys() == state.keys()
    metadata = {
        "format": "visproj-folded-2",
        "class": type(folded).__name__,
        "config": json.dumps(folded.config),
    }
    save_file({names[key]: value for key, value in state.items()}, tmp_path / "old.st", metadata)
    (tmp_path / "old.st").rename(tmp_path / "old.safetensors")
    loaded = load_folded(tmp_path / "old.safetensors")
    width = 16 if kind == "attention pool" else 32
    x = features(2, 16 if kind == "attention pool" else 17, width=width)
    # How a product is summed up depends on where in memory its operands begin.
    torch.testing.assert_close(loaded(x), folded(x), rtol=1e-13, atol=1e-13)
