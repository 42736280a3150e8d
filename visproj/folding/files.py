"""Reading of folded projectors, in the current file format and the previous one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from visproj.checks import check_heads
from visproj.clip import CLIPEncoderLayer, VisionConfig
from visproj.contents import FOLDED_FORMAT, compare_shapes, refuse_placeholders, what_it_holds
from visproj.errors import InputError
from visproj.files import TensorFile, parse_device
from visproj.folding.algebra import Scaled
from visproj.folding.key_values import ABSORBED, FORMS, AbsorbedQueries, NormLinear
from visproj.folding.modules import (
    FoldedLinear,
    FoldedProjector,
    FoldedViT,
    ScaledLinear,
    frozen_linear,
    frozen_norm,
)
from visproj.folding.resamplers import (
    FoldedAria,
    FoldedKosmos2,
    FoldedMiniCPM,
    FoldedMiniCPM2,
    FoldedMiniCPM2Resized,
    FoldedPerceiver,
    FoldedResampler,
)
from visproj.positions import check_grid

OLDER_FORMAT = "visproj-folded-3"

_WIDTHS = {"vis_dim", "lang_dim", "digest"}
_LINEAR = {*_WIDTHS, "eps"}
_RESAMPLER = {*_WIDTHS, "num_heads", "query_grid", "has_cls", "form", "floor", "eps"}
_GRID = {*_RESAMPLER, "grid", "out_floor"}
_RESIZED = {*_GRID, "separable"}


def load_folded(path: str | Path, *, device: torch.device | str = "cpu") -> FoldedProjector:
    """Read what :meth:`FoldedProjector.save` wrote.

    Args:
        path: The file.
        device: The device of the folded projector.

    Returns:
        The folded projector, in eval mode.

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
    wanted, _ = _KINDS[kind]
    older = file.metadata["format"] == OLDER_FORMAT
    config = _config(file.metadata.get("config", ""), wanted, older=older)
    folded = empty_folded(kind, config)
    tensors = {name: file.read(name) for name in sorted(file.keys)}
    if older and kind == "FoldedPerceiver":
        _move_value_shift(tensors, config["lang_dim"])
    compare_shapes(
        {name: tensor.shape for name, tensor in tensors.items()},
        {name: tensor.shape for name, tensor in folded.state_dict().items()},
        f"a {kind} of this configuration",
    )
    folded.load_state_dict(tensors, assign=True)
    return folded


def empty_folded(kind: str, config: dict[str, Any]) -> FoldedProjector:
    """Build a folded projector of this class and configuration on the meta device."""
    with torch.device("meta"):
        return _KINDS[kind][1](config)


def _move_value_shift(tensors: dict[str, Tensor], width: int) -> None:
    """Move the constant of the values to ``kv.shift``: the older format adds it to the tables."""
    for name in ("position_table", "kv_table"):
        table = tensors.get(name)
        if table is None or table.shape[-1] != 2 * width:
            raise InputError(f"its {name} does not hold keys and values")
        keys, values = table.split(width, -1)
        tensors[name] = keys.contiguous()
    tensors["kv.shift"] = torch.cat([torch.zeros_like(values[0]), values[0]])


def _config(text: str, wanted: set[str], *, older: bool) -> dict[str, Any]:
    """Parse the configuration in the metadata, and check its entries and their types."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its configuration is not valid JSON ({error})") from error
    if older and isinstance(config, dict) and "form" in wanted and "out_eps" in config:
        config = {"form": "keys", "eps": None, "separable": False, **config}
        del config["out_eps"]
    scaled = (
        isinstance(config, dict) and "floor" not in wanted and config.keys() == {*wanted, "floor"}
    )
    if scaled and config.pop("floor") is not None:
        raise InputError(
            "it holds a form of Linear and LayerNorm that is no longer supported: fold again"
        )
    if not isinstance(config, dict) or config.keys() != wanted:
        names = sorted(config) if isinstance(config, dict) else type(config).__name__
        raise InputError(f"its configuration has the entries {names}, not {sorted(wanted)}")
    for name, value in config.items():
        if name in _CHECKS and not _CHECKS[name](value):
            raise InputError(f"{name} in its configuration cannot be {value!r}")
    for name in ("query_grid", "grid", "table"):
        check_grid(config.get(name, (1, 1)))
    if "num_heads" in config:
        check_heads(config["lang_dim"], config["num_heads"])
    return config


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_small_or_none(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (number and value >= 0)


def _are_pairs(value: Any) -> bool:
    pairs = isinstance(value, list) and all(isinstance(pair, list) for pair in value)
    return pairs and all(len(pair) == 2 and all(map(_is_count, pair)) for pair in value) and value


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "vis_dim": _is_count,
    "lang_dim": _is_count,
    "num_heads": _is_count,
    "hidden": _is_count,
    "out_dim": _is_count,
    "eps": _is_small_or_none,
    "floor": _is_small_or_none,
    "out_floor": _is_small_or_none,
    "form": lambda value: value in FORMS,
    "has_cls": lambda value: isinstance(value, bool),
    "separable": lambda value: isinstance(value, bool),
    "gives_attention": lambda value: isinstance(value, bool),
    "query_counts": _are_pairs,
    "digest": lambda value: isinstance(value, str),
    "vision": lambda value: isinstance(value, dict),
}


def _clip_layer(vision: dict[str, Any]) -> CLIPEncoderLayer:
    try:
        return CLIPEncoderLayer(VisionConfig(**vision))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"its CLIP layer cannot be built ({error})") from error


def _empty_scaled(outputs: int, inputs: int, width: int, floor: float) -> ScaledLinear:
    """Build a row-scaled Linear without values, for a LayerNorm over ``width``."""
    rank = min(inputs, width)
    shapes = [(outputs, inputs), (outputs,), (rank, inputs), (rank,), (outputs,)]
    weight, bias, factor, factor_bias, shift = map(torch.empty, shapes)
    return ScaledLinear(Scaled(weight, bias, factor, factor_bias, shift, floor))


def _empty_linear(config: dict[str, Any]) -> FoldedLinear:
    inputs, outputs = config["vis_dim"], config["lang_dim"]
    norm = _norm(outputs, config["eps"])
    return FoldedLinear(config, nn.Sequential(_linear(outputs, inputs), norm))


def _empty_vit(config: dict[str, Any]) -> FoldedViT:
    return FoldedViT(config, _clip_layer(config["vision"]), _empty_linear(config))


def _empty_key_values(config: dict[str, Any]) -> nn.Module:
    inputs, width, floor = config["vis_dim"], config["lang_dim"], config["floor"]
    if config["form"] == "absorbed":
        return AbsorbedQueries(_empty_absorbed(config), floor or 0.0, config["eps"])
    if floor is None:
        return NormLinear(_linear(2 * width, inputs), config["eps"])
    return _empty_scaled(2 * width, inputs, width, floor)


def _empty_absorbed(config: dict[str, Any]) -> dict[str, Tensor | None]:
    inputs, width, heads = config["vis_dim"], config["lang_dim"], config["num_heads"]
    queries = math.prod(config["query_grid"])
    per_head, rank = width // heads, min(inputs, width)
    scaled, latent = config["floor"] is not None, "gives_attention" in config
    shapes: dict[str, tuple[int, ...]] = {
        "score_weight": (queries * heads, inputs),
        "score_bias": (queries * heads,),
        "value_weight": (heads, inputs, per_head),
        "value_bias": (heads, per_head),
        "value_shift": (heads, per_head),
        **({"factor": (rank, inputs), "factor_bias": (rank,)} if scaled else {}),
    }
    if latent:
        shapes["appended_scores"] = (queries * heads, queries)
        shapes["appended_values"] = (queries, heads, per_head)
    return {name: torch.empty(shapes[name]) if name in shapes else None for name in ABSORBED}


def _empty_resampler(
    kind: type[FoldedResampler],
    config: dict[str, Any],
    tail: nn.Module,
    shapes: Mapping[str, tuple[int, int]] = MappingProxyType({}),
    *,
    latent: bool = False,
) -> FoldedResampler:
    """Build a folded resampler without values; ``shapes`` are those of its position tables."""
    heads, queries = config["num_heads"], math.prod(config["query_grid"])
    keys = config["form"] == "keys"
    per_head = (heads, config["lang_dim"] // heads)
    return kind(
        config,
        _empty_key_values(config),
        tail,
        torch.empty(queries, *per_head) if keys else None,
        torch.empty(queries, 2, *per_head) if keys and latent else None,
        **{name: torch.empty(shape) for name, shape in shapes.items()},
    )


def _positions_width(config: dict[str, Any]) -> int:
    """Return the width of what a position adds: a key, or the scores of all queries."""
    if config["form"] == "keys":
        return config["lang_dim"]
    return math.prod(config["query_grid"]) * config["num_heads"]


def _empty_tail(config: dict[str, Any]) -> nn.Module:
    width, floor = config["lang_dim"], config["out_floor"]
    return _linear(width, width) if floor is None else _empty_scaled(width, width, width, floor)


def _empty_perceiver(
    config: dict[str, Any], kind: type[FoldedResampler] = FoldedPerceiver
) -> FoldedResampler:
    width, grid = _positions_width(config), config["query_grid"]
    tables = {"kv_table": (math.prod(config["grid"]), width)}
    if config["separable"]:
        tables |= {"rows": (grid[0], width), "columns": (grid[1], width)}
    else:
        tables["position_table"] = (math.prod(grid), width)
    return _empty_resampler(kind, config, _empty_tail(config), tables)


def _empty_minicpm(config: dict[str, Any], kind: type[FoldedResampler]) -> FoldedResampler:
    width = _positions_width(config)
    rows, columns = config["table"]
    tables = {"position_weight": (width, config["lang_dim"])}
    tables |= {"rows": (rows, width), "columns": (columns, width)}
    return _empty_resampler(kind, config, _empty_tail(config), tables)


def _empty_aria(config: dict[str, Any]) -> FoldedResampler:
    width, hidden = config["lang_dim"], config["hidden"]
    scaled = _empty_scaled(hidden, width, width, config["out_floor"])
    last = _linear(config["out_dim"], hidden)
    return _empty_resampler(FoldedAria, config, nn.Sequential(scaled, nn.GELU("tanh"), last))


def _empty_kosmos2(config: dict[str, Any]) -> FoldedResampler:
    width = config["lang_dim"]
    return _empty_resampler(FoldedKosmos2, config, _linear(width, width), latent=True)


def _linear(outputs: int, inputs: int) -> nn.Linear:
    return frozen_linear(torch.empty(outputs, inputs), torch.empty(outputs))


def _norm(width: int, eps: float) -> nn.LayerNorm:
    return frozen_norm(torch.empty(width), torch.empty(width), eps)


# For every class: the entries of its configuration, and the function that builds it without values.
_KINDS: dict[str, tuple[set[str], Callable[[dict[str, Any]], FoldedProjector]]] = {
    "FoldedLinear": (_LINEAR, _empty_linear),
    "FoldedViT": (_LINEAR | {"vision"}, _empty_vit),
    "FoldedPerceiver": (_RESIZED, _empty_perceiver),
    "FoldedMiniCPM2Resized": (_RESIZED, partial(_empty_perceiver, kind=FoldedMiniCPM2Resized)),
    "FoldedMiniCPM2": (_GRID | {"table"}, partial(_empty_minicpm, kind=FoldedMiniCPM2)),
    "FoldedMiniCPM": (_GRID | {"table"}, partial(_empty_minicpm, kind=FoldedMiniCPM)),
    "FoldedAria": (_RESAMPLER | {"hidden", "out_dim", "query_counts", "out_floor"}, _empty_aria),
    "FoldedKosmos2": (_RESAMPLER | {"gives_attention"}, _empty_kosmos2),
}
