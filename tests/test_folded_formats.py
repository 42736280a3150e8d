"""Folded files of the format before today's are still read."""

import json

import pytest
import torch
from helpers import features, make, randomise
from safetensors.torch import save_file

from visproj import load_folded
from visproj.errors import InputError
from visproj.folding import FoldedPerceiver
from visproj.projectors.resamplers import QwenVLResampler


def projector_of(kind):
    if kind == "attention pool":
        pool = QwenVLResampler(16, 32, query_grid=(4, 4), num_heads=2)
        return randomise(pool).double()
    return make(kind)


def older_state(folded):
    """What visproj-folded-3 held: a Perceiver's tables had the values' constant in every row."""
    state = folded.state_dict()
    if isinstance(folded, FoldedPerceiver):
        shift = state.pop("kv.shift")[folded.config["lang_dim"] :]
        rows, columns = state.pop("rows"), state.pop("columns")
        state["position_table"] = (rows[:, None] + columns).flatten(0, 1)
        for name in ("position_table", "kv_table"):
            state[name] = torch.cat([state[name], shift.expand_as(state[name])], 1)
    return state


def older_config(folded):
    config = dict(folded.config)
    if isinstance(folded, FoldedPerceiver):
        del config["form"], config["eps"], config["separable"]
        config["out_eps"] = None if config["out_floor"] is None else 1e-12
    else:
        config["floor"] = None
    return config


def test_a_form_that_is_no_more_is_named(tmp_path):
    folded = projector_of("baseline").fold()
    folded.config["floor"] = 1e-12
    folded.save(tmp_path / "old.safetensors")
    with pytest.raises(InputError, match="a form of Linear and LayerNorm that is no longer"):
        load_folded(tmp_path / "old.safetensors")


@pytest.mark.parametrize("kind", ["baseline", "vit", "perceiver", "attention pool"])
def test_the_older_format_is_read(tmp_path, kind):
    folded = projector_of(kind).fold()
    metadata = {
        "format": "visproj-folded-3",
        "class": type(folded).__name__,
        "config": json.dumps(older_config(folded)),
    }
    save_file(older_state(folded), tmp_path / "old.safetensors", metadata)
    loaded = load_folded(tmp_path / "old.safetensors")
    newer = {"separable": False} if isinstance(folded, FoldedPerceiver) else {}
    assert loaded.config == folded.config | newer
    width = 16 if kind == "attention pool" else 32
    x = features(2, 16 if kind == "attention pool" else 17, width=width)
    # How a product is summed up depends on where in memory its operands begin; a whole table is
    # resized in fp32, or its rows and columns.
    bound = 1e-5 if newer else 1e-13
    torch.testing.assert_close(loaded(x), folded(x), rtol=bound, atol=bound)
