"""Reading folded projectors back, in the format of today and the one before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visproj.checks import check_heads
from visproj.clip import CLIPEncoderLayer, VisionConfig
from visproj.contents import FOLDED_FORMAT, compare_shapes, refuse_placeholders, what_it_holds
from visproj.errors import InputError
from visproj.files import TensorFile, parse_device
from visproj.folding.algebra import Scaled
from visproj.folding.modules import (
    FoldedLinear,
    FoldedPerceiver,
    FoldedProjector,
    FoldedViT,
    ScaledLinear,
    frozen_linear,
    frozen_norm,
)
from visproj.positions import check_grid

OLDER_FORMAT = "visproj-folded-2"

_WIDTHS = {"vis_dim", "lang_dim"}
_LINEAR = {*_WIDTHS, "eps", "floor", "digest"}
_RESAMPLER = {"num_heads", "query_grid", "grid", "has_cls", "floor", "out_eps", "out_floor"}


def load_folded(path: str | Path, *, device: torch.device | str = "cpu") -> FoldedProjector:
    """Read what :meth:`FoldedProjector.save` wrote.

    Args:
        path: The file.
        device: Where to put the folded projector.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is damaged or holds something else; the message says what, and which
            function reads that.
    """
    path, device = Path(path), parse_device(device)
    if path.is_dir():
        raise InputError(
            f"{path} is a folder, not the file of a folded projector. It holds "
            f"{what_it_holds(path)}"
        )
    file = TensorFile(path)
    form = file.metadata.get("format", "")
    if form not in (FOLDED_FORMAT, OLDER_FORMAT):
        other = (
            f" (it is of format {form}: fold again)" if form.startswith("visproj-folded") else ""
        )
        raise InputError(
            f"{path} holds no folded projector of format {FOLDED_FORMAT}{other}. It holds "
            f"{what_it_holds(path)}"
        )
    refuse_placeholders({key: file.tensor(key).shape for key in file.keys}, str(path))
    try:
        return _build(file).eval().to(device)
    except (InputError, TypeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is damaged: {reason}") from error


def _build(file: TensorFile) -> FoldedProjector:
    kind = file.metadata.get("class", "")
    if kind not in _KINDS:
        raise InputError(f"its class is {kind!r}, not one of {', '.join(_KINDS)}")
    wanted, empty = _KINDS[kind]
    config = _config(file.metadata.get("config", ""), wanted)
    with torch.device("meta"):
        folded = empty(config)
    older = file.metadata["format"] == OLDER_FORMAT
    names = _names_of_older(kind, config) if older else {}
    keys = {names.get(key, key): key for key in sorted(file.keys)}
    compare_shapes(
        {name: file.tensor(key).shape for name, key in keys.items()},
        {name: tensor.shape for name, tensor in folded.state_dict().items()},
        f"a {kind} of this configuration",
    )
    folded.load_state_dict({name: file.read(key) for name, key in keys.items()}, assign=True)
    return folded


def _config(text: str, wanted: set[str]) -> dict[str, Any]:
    """The configuration in the metadata, its entries and their types checked."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its configuration is not valid JSON ({error})") from error
    if not isinstance(config, dict) or config.keys() != wanted:
        names = sorted(config) if isinstance(config, dict) else type(config).__name__
        raise InputError(f"its configuration has the entries {names}, not {sorted(wanted)}")
    for name, value in config.items():
        if name in _CHECKS and not _CHECKS[name](value):
            raise InputError(f"{name} in its configuration cannot be {value!r}")
    for name in ("query_grid", "grid"):
        check_grid(config.get(name, (1, 1)))
    if "num_heads" in config:
        check_heads(config["lang_dim"], config["num_heads"])
    return config


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_small(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _is_small_or_none(value: Any) -> bool:
    return value is None or _is_small(value)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "vis_dim": _is_count,
    "lang_dim": _is_count,
    "num_heads": _is_count,
    "eps": _is_small,
    "floor": _is_small_or_none,
    "out_eps": _is_small_or_none,
    "out_floor": _is_small_or_none,
    "has_cls": lambda value: isinstance(value, bool),
    "digest": lambda value: isinstance(value, str),
    "vision": lambda value: isinstance(value, dict),
}


def _clip_layer(vision: dict[str, Any]) -> CLIPEncoderLayer:
    try:
        return CLIPEncoderLayer(VisionConfig(**vision))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"its CLIP layer cannot be built ({error})") from error


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
    return FoldedViT(config, _clip_layer(config["vision"]), _empty_linear(config))


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


# The entries of its configuration, and how it is built without numbers.
_KINDS: dict[str, tuple[set[str], Callable[[dict[str, Any]], FoldedProjector]]] = {
    "FoldedLinear": (_LINEAR, _empty_linear),
    "FoldedViT": (_LINEAR | {"vision"}, _empty_vit),
    "FoldedPerceiver": (_WIDTHS | _RESAMPLER | {"digest"}, _empty_perceiver),
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
