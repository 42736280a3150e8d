"""Checking modules, widths, heads and features before they are used."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from visproj.errors import InputError
from visproj.ops.checks import check_floating


def vision_width(vis_config: object) -> int:
    """The width of the vision features: ``vis_config`` itself or its ``hidden_size``.

    Raises:
        TypeError: If it is neither an int nor has an int ``hidden_size``.
        ValueError: If the width is not positive.
    """
    width = getattr(vis_config, "hidden_size", vis_config)
    if isinstance(width, bool) or not isinstance(width, int):
        raise TypeError(
            "vis_config must be a width or have an int hidden_size (of a CLIPConfig pass its "
            f"vision_config), got {type(vis_config).__name__}"
        )
    return check_width("vision width", width)


def check_width(name: str, width: int) -> int:
    """Return ``width`` or raise ``ValueError`` if it is not positive."""
    if width < 1:
        raise InputError(f"{name} must be positive, got {width}")
    return width


def check_heads(width: int, heads: int) -> int:
    """Return ``heads`` or raise ``ValueError`` naming the head counts that divide ``width``."""
    if heads < 1 or width % heads:
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        raise InputError(
            f"{heads} heads do not divide a width of {width}; pass num_heads as one of {divisors}"
        )
    return heads


def check_features(x: Tensor, width: int) -> None:
    """Raise unless ``x`` is floating ``[..., tokens, width]``.

    Raises:
        TypeError: If ``x`` is not a floating-point tensor.
        ValueError: If it has fewer than two dimensions or another width.
    """
    check_floating("visual features", x)
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
