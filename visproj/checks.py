"""Argument checks for modules, widths, heads and features."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor, nn

from visproj.errors import InputError
from visproj.ops.checks import check_all_floating


def vision_width(vis_config: object) -> int:
    """Return the width of the vision features: ``vis_config`` itself or its ``hidden_size``.

    Raises:
        TypeError: If it is neither an int nor has an int ``hidden_size``.
        ValueError: If the width is not positive.
    """
    width = _as_int(getattr(vis_config, "hidden_size", vis_config))
    if width is None:
        raise TypeError(
            "vis_config must be a width or have an int hidden_size (of a CLIPConfig pass its "
            f"vision_config), got {type(vis_config).__name__}"
        )
    return check_width("vision width", width)


def check_width(name: str, width: Any) -> int:
    """Return ``width`` as an int.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it is not positive.
    """
    size = _as_int(width)
    if size is None:
        raise TypeError(f"{name} must be an int, got {width!r}")
    if size < 1:
        raise InputError(f"{name} must be positive, got {size}")
    return size


def _as_int(value: Any) -> int | None:
    """Return an integer, NumPy's included, as an int; ``None`` for a bool or anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def check_range(name: str, value: Any, highest: float) -> float:
    """Return ``value``, a number from 0 to ``highest``, as a float.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is outside this range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 <= float(value) <= highest:
        raise InputError(f"{name} must lie between 0 and {highest:g}, got {value}")
    return float(value)


def check_heads(width: int, heads: Any) -> int:
    """Return ``heads`` as an int.

    Raises:
        TypeError: If it is not an integer.
        ValueError: If it does not divide ``width``; the message names the head counts that do.
    """
    count = _as_int(heads)
    if count is None:
        raise TypeError(f"num_heads must be an int, got {heads!r}")
    if count < 1 or width % count:
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        raise InputError(
            f"{count} heads do not divide a width of {width}; pass num_heads as one of {divisors}"
        )
    return count


def check_features(x: Tensor, width: int) -> None:
    """Raise unless ``x`` is floating ``[..., tokens, width]``.

    Raises:
        TypeError: If ``x`` is not a floating-point tensor.
        ValueError: If it has fewer than two dimensions or another width.
    """
    check_all_floating(**{"visual features": x})
    if x.ndim < 2 or x.shape[-1] != width:
        raise InputError(
            f"visual features must be [..., tokens, {width}], got shape {list(x.shape)}"
        )


def check_module(function: str, module: object) -> None:
    """Raise ``TypeError`` saying what ``function`` was given instead of a module."""
    if isinstance(module, nn.Module):
        return
    got = type(module).__name__
    if isinstance(module, type):
        got = f"the class {module.__name__}: pass an instance of it"
    elif isinstance(module, Mapping):
        got += ": build the module and give it a state dict with load_state_dict"
    elif isinstance(module, str) or hasattr(module, "__fspath__"):
        got += ": load the file first, for a projector with load_projector"
    raise TypeError(f"{function} takes an nn.Module, got {got}")
