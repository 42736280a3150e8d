"""Reading folded projectors back, in the format of today and the one before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visproj.clip import CLIPEncoderLayer, VisionConfig
from visproj.errors import InputError
from visproj.files import TensorFile
from visproj.folding.algebra import Scaled
from visproj.folding.modules import (
    FORMAT,
    FoldedLinear,
    FoldedPerceiver,
    FoldedProjector,
    FoldedViT,
    ScaledLinear,
    frozen_linear,
    frozen_norm,
)

OLDER_FORMAT = "visproj-folded-2"


def load_folded(path: str | Path, *, device: torch.device | str = "cpu") -> FoldedProjector:
    """Read what :meth:`FoldedProjector.save` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If the file was not written by it, or is damaged.
    """
    file = TensorFile(Path(path))
    format, kind = file.metadata.get("format"), file.metadata.get("class")
    if format not in (FORMAT, OLDER_FORMAT) or kind not in _EMPTY:
        raise InputError(
            f"{path} holds no folded projector of format {FORMAT} or {OLDER_FORMAT}: its metadata "
            f"is {file.metadata or 'empty'}"
        )
    tensors = {key: file.tensor(key).clone() for key in sorted(file.keys)}
    try:
        config = json.loads(file.metadata["config"])
        if format == OLDER_FORMAT:
            names = _names_of_older(kind, config)
            tensors = {names.get(key, key): tensor for key, tensor in tensors.items()}
        with torch.device("meta"):
            folded = _EMPTY[kind](config)
        folded.load_state_dict(tensors, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is damaged ({type(error).__name__}: {reason})") from error
    return folded.eval().to(device)


def _empty_scaled(
    outputs: int, inputs: int, width: int, floor: float, *, shifted: bool = True
) -> ScaledLinear:
    """A scaled Linear without numbers, of a LayerNorm over ``width``."""
    rank = min(inputs, width)
    shapes = [(outputs, inputs), (outputs,), (rank, inputs), (rank,), (outputs,)]
    weight, bias, factor, factor_bias, shift = map(torch.empty, shapes)
    scaled = Scaled(weight, bias, factor, factor_bias, shift, floor)
    return ScaledLinear(scaled, shifted=shifted)


def _empty_linear(config: dict[str, Any]) -> FoldedLinear:
    inputs, outputs = config["vis_dim"], config["lang_dim"]
    product: nn.Module
    if config["floor"] is None:
        product = nn.Sequential(_linear(outputs, inputs), _norm(outputs, config["eps"]))
    else:
        product = _empty_scaled(outputs, inputs, outputs, config["floor"])
    return FoldedLinear(config, product)


def _empty_vit(config: dict[str, Any]) -> FoldedViT:
    layer = CLIPEncoderLayer(VisionConfig(**config["vision"]))
    return FoldedViT(config, layer, _empty_linear(config))


def _empty_perceiver(config: dict[str, Any]) -> FoldedPerceiver:
    inputs, width, heads = config["vis_dim"], config["lang_dim"], config["num_heads"]
    queries, keys = (rows * columns for rows, columns in (config["query_grid"], config["grid"]))
    kv = _empty_scaled(2 * width, inputs, width, config["floor"], shifted=False)
    tail: nn.Module
    if config["out_floor"] is not None:
        tail = _empty_scaled(width, width, width, config["out_floor"])
    elif config["out_eps"] is not None:
        norm = _norm(width, config["out_eps"])
        tail = nn.Sequential(_linear(width, width), norm, _linear(width, width))
    else:
        tail = _linear(width, width)
    constants = {
        "queries": torch.empty(queries, heads, width // heads),
        "position_table": torch.empty(queries, 2 * width),
        "kv_table": torch.empty(keys, 2 * width),
    }
    return FoldedPerceiver(config, kv, constants, tail)


def _linear(outputs: int, inputs: int) -> nn.Linear:
    return frozen_linear(torch.empty(outputs, inputs), torch.empty(outputs))


def _norm(width: int, eps: float) -> nn.LayerNorm:
    return frozen_norm(torch.empty(width), torch.empty(width), eps)


_EMPTY: dict[str, Callable[[dict[str, Any]], FoldedProjector]] = {
    "FoldedLinear": _empty_linear,
    "FoldedViT": _empty_vit,
    "FoldedPerceiver": _empty_perceiver,
}


def _names_of_older(kind: str, config: dict[str, Any]) -> dict[str, str]:
    """What the constants of the older format are called today."""
    if kind != "FoldedPerceiver":
        scaled = config["floor"] is not None
        names = {f"product.{new}": old for new, old in (_SCALED if scaled else _NORMED).items()}
        prefix = "tail." if kind == "FoldedViT" else ""
        return {f"{prefix}{old}": f"{prefix}{new}" for new, old in names.items()}
    kv = {f"kv.{new}": old for new, old in _KV.items()}
    if config["out_floor"] is not None:
        tail = {f"tail.{new}": old for new, old in _SCALED_TAIL.items()}
    elif config["out_eps"] is not None:
        tail = {f"tail.{new}": old for new, old in _NORMED_TAIL.items()}
    else:
        tail = {"tail.weight": "out_weight", "tail.bias": "out_bias"}
    return {old: new for new, old in (kv | tail).items()}


_SCALED = {
    "linear.weight": "weight",
    "linear.bias": "bias",
    "factor": "stats_weight",
    "factor_bias": "stats_bias",
    "shift": "shift",
}
_NORMED = {"0.weight": "weight", "0.bias": "bias", "1.weight": "gain", "1.bias": "shift"}
_KV = {
    "linear.weight": "kv_weight",
    "linear.bias": "kv_bias",
    "factor": "stats_weight",
    "factor_bias": "stats_bias",
}
_SCALED_TAIL = {
    "linear.weight": "final_weight",
    "linear.bias": "final_bias",
    "factor": "out_stats_weight",
    "factor_bias": "out_stats_bias",
    "shift": "final_shift",
}
_NORMED_TAIL = {
    "0.weight": "out_weight",
    "0.bias": "out_bias",
    "1.weight": "gain",
    "1.bias": "shift",
    "2.weight": "final_weight",
    "2.bias": "final_bias",
}
