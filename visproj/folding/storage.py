"""Reading folded projectors from files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from visproj.contents import FOLDED_FORMAT, compare_shapes, refuse_placeholders, what_it_holds
from visproj.errors import InputError
from visproj.files import TensorFile, parse_device
from visproj.folding.modules import FoldedLinear, FoldedPerceiver, FoldedProjector, FoldedViT
from visproj.positions import check_grid
from visproj.projectors.config import check_heads
from visproj.projectors.vit import CLIPEncoderLayer

Shapes = dict[str, tuple[int, ...]]

_WIDTHS = ("vis_dim", "lang_dim")
_TAIL = {*_WIDTHS, "eps", "floor", "digest"}
_OUTPUT = {"out_eps", "out_floor"}
_RESAMPLER = {*_WIDTHS, "num_heads", "query_grid", "grid", "has_cls", "floor", "digest"} | _OUTPUT
_CONFIGS = {"FoldedLinear": _TAIL, "FoldedViT": _TAIL | {"vision"}, "FoldedPerceiver": _RESAMPLER}


def load_folded(path: str | Path, *, device: torch.device | str = "cpu") -> FoldedProjector:
    """Read what :meth:`FoldedProjector.save` wrote.

    Args:
        path: The file.
        device: Where to put the folded projector.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or holds something else; the message says what, and which
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
    if form != FOLDED_FORMAT:
        other = (
            f" (it is of format {form}: fold again)" if form.startswith("visproj-folded") else ""
        )
        raise InputError(
            f"{path} holds no folded projector of format {FOLDED_FORMAT}{other}. It holds "
            f"{what_it_holds(path)}"
        )
    refuse_placeholders({key: file.tensor(key).shape for key in file.keys}, str(path))
    try:
        return _build(file).to(device)
    except (InputError, TypeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is damaged: {reason}") from error


def _build(file: TensorFile) -> FoldedProjector:
    name = file.metadata.get("class", "")
    if name not in _CONFIGS:
        raise InputError(f"its class is {name!r}, not one of {', '.join(_CONFIGS)}")
    config = _config(file.metadata.get("config", ""), _CONFIGS[name])
    found = {key: file.tensor(key).shape for key in sorted(file.keys)}
    layer = _clip_layer(config["vision"]) if name == "FoldedViT" else None
    compare_shapes(found, _SHAPES[name](config, layer), f"a {name} of this configuration")
    constants = {key: file.read(key) for key in found}
    if layer is None:
        return (FoldedLinear if name == "FoldedLinear" else FoldedPerceiver)(config, constants)
    parts = {
        part: {key.removeprefix(part): constants[key] for key in constants if key.startswith(part)}
        for part in ("tail.", "vis_layer.")
    }
    layer.load_state_dict(parts["vis_layer."], assign=True)
    return FoldedViT(config, layer.eval(), FoldedLinear(config, parts["tail."]))


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
        with torch.device("meta"):
            return CLIPEncoderLayer(SimpleNamespace(**vision))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"its CLIP layer cannot be built ({error})") from error


def _linear_shapes(config: dict[str, Any], layer: nn.Module | None) -> Shapes:
    width, out = config["vis_dim"], config["lang_dim"]
    shapes: Shapes = {"weight": (out, width), "bias": (out,), "shift": (out,)}
    if config["floor"] is None:
        return shapes | {"gain": (out,)}
    return shapes | _statistics("stats", width, out)


def _vit_shapes(config: dict[str, Any], layer: nn.Module | None) -> Shapes:
    assert layer is not None
    state: dict[str, Tensor] = layer.state_dict()
    tail = {f"tail.{name}": shape for name, shape in _linear_shapes(config, None).items()}
    return {f"vis_layer.{name}": tuple(t.shape) for name, t in state.items()} | tail


def _perceiver_shapes(config: dict[str, Any], layer: nn.Module | None) -> Shapes:
    width, dim, heads = config["vis_dim"], config["lang_dim"], config["num_heads"]
    queries = math.prod(config["query_grid"])
    shapes: Shapes = {
        "kv_weight": (2 * dim, width),
        "kv_bias": (2 * dim,),
        "queries": (queries, heads, dim // heads),
        "position_table": (queries, 2 * dim),
        "kv_table": (math.prod(config["grid"]), 2 * dim),
    }
    shapes |= _statistics("stats", width, dim)
    if config["out_floor"] is not None:
        shapes |= _statistics("out_stats", dim, dim) | {"final_shift": (dim,)}
    else:
        shapes |= {"out_weight": (dim, dim), "out_bias": (dim,)}
        if config["out_eps"] is None:
            return shapes
        shapes |= {"gain": (dim,), "shift": (dim,)}
    return shapes | {"final_weight": (dim, dim), "final_bias": (dim,)}


def _statistics(name: str, width: int, out: int) -> Shapes:
    """Of the triangular factor of ``[W | b]``, ``W`` being ``[out, width]``."""
    rows = min(width, out)
    return {f"{name}_weight": (rows, width), f"{name}_bias": (rows,)}


_SHAPES: dict[str, Callable[[dict[str, Any], nn.Module | None], Shapes]] = {
    "FoldedLinear": _linear_shapes,
    "FoldedViT": _vit_shapes,
    "FoldedPerceiver": _perceiver_shapes,
}
