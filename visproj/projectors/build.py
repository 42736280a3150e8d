"""One function that builds any of the projectors by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from visproj.errors import InputError
from visproj.projectors.linear import LinearProjector
from visproj.projectors.perceiver import PerceiverProjector
from visproj.projectors.vit import ViTProjector

_PROJECTORS: dict[str, Any] = {
    "baseline": LinearProjector,
    "vit": ViTProjector,
    "perceiver": PerceiverProjector,
}
KINDS = tuple(_PROJECTORS)
ENCODERS = ("clip", "qwen-vl")


def build_projector(
    kind: str, vis_config: object, lang_dim: int, *, encoder: str = "clip", **options: Any
) -> nn.Module:
    """Build the projector that DeepSpeed-VisualChat calls ``kind``.

    Args:
        kind: ``"baseline"``, ``"vit"`` or ``"perceiver"``.
        vis_config: A ``CLIPVisionConfig`` or any object with its fields; for ``baseline`` and
            ``perceiver`` the vision width is enough.
        lang_dim: Width of the language model.
        encoder: ``"clip"``, or ``"qwen-vl"`` for the Qwen-VL vision encoder, which takes
            ``baseline`` only.
        **options: The projector's own keyword arguments, such as a Perceiver's ``query_grid``.

    Returns:
        The projector with initial weights, in training mode.

    Raises:
        TypeError: If ``vis_config`` lacks a field, or the projector has no such option.
        ValueError: If ``kind`` or ``encoder`` is unknown, or ``encoder`` does not take ``kind``.
    """
    if kind not in KINDS:
        raise InputError(f"unknown projector kind {kind!r}, expected one of {', '.join(KINDS)}")
    if encoder not in ENCODERS:
        raise InputError(f"unknown encoder {encoder!r}, expected one of {', '.join(ENCODERS)}")
    if encoder == "qwen-vl" and kind != "baseline":
        raise InputError(
            f"the qwen-vl encoder takes the baseline projector, not {kind!r}: it ends in a "
            "Perceiver resampler of its own and its 256 tokens hold no CLS"
        )
    return _PROJECTORS[kind](vis_config, lang_dim, **options)
