"""Folding of trained projectors into an exact inference form with half the arithmetic or less.

A LayerNorm after a Linear only rescales each row (:mod:`visproj.folding.algebra`). So the
Perceiver's ``kv_proj``, ``ln_kv`` and its key and value projections become one matmul of width
``2 D`` with the features, and the queries become a constant. ``out_proj``, the LayerNorm after it
and the last Linear become one matmul as well. Weights are combined once, in fp64. If the queries
are few, they are also multiplied by the key weights (:mod:`visproj.folding.key_values`).
"""

from typing import Any

from torch import nn

from visproj.checks import check_module
from visproj.folding.files import load_folded
from visproj.folding.graphs import graphed
from visproj.folding.modules import (
    FoldedLinear,
    FoldedProjector,
    FoldedViT,
    ScaledLinear,
)
from visproj.folding.resamplers import FoldedPerceiver, FoldedResampler

__all__ = [
    "FoldedLinear",
    "FoldedPerceiver",
    "FoldedProjector",
    "FoldedResampler",
    "FoldedViT",
    "ScaledLinear",
    "fold",
    "graphed",
    "load_folded",
]


def fold(projector: nn.Module, **options: Any) -> FoldedProjector:
    """Turn a trained projector into its exact inference form: ``projector.fold(**options)``.

    The projector is not changed. The result has the same call signature and holds the combined
    weights. It is inference-only and raises if gradients are required. ``folded.save(path)`` writes
    it and :func:`load_folded` reads it back. Dropout does not prevent folding in eval mode, where
    it is off.

    Args:
        projector: A :class:`visproj.LinearProjector`, :class:`visproj.ViTProjector`,
            :class:`visproj.PerceiverProjector`, a module that :func:`visproj.convert` put in the
            place of another model's resampler, or any module with its own ``fold`` method.
        **options: ``dtype``: dtype of the folded weights, by default the projector's own; weights
            are combined in fp64. ``form``, for a resampler: ``"keys"``, where one matmul computes
            keys and values, or ``"absorbed"``, where the constant queries are multiplied by the key
            weights in advance. By default the form with fewer multiply-adds, but ``"keys"`` if the
            scores of one token would be wider than its key. ``grid``, for a resampler with
            positions: the usual grid of the features, whose positions are stored ready for use; by
            default the query grid, for MiniCPM-V 2.5 and later 32x32. Other grids remain
            possible.

    Returns:
        The folded projector.

    Raises:
        TypeError: If ``projector`` cannot be folded, or does not take an option.
        InputError: If the projector or a layer of it carries an adapter, a hook or a
            parametrisation, is quantised or sharded, or if its attention has active dropout,
            ``bias_k`` or ``add_zero_attn``. Under ZeRO-3, gather its parameters around the call.
    """
    check_module("fold", projector)
    own = getattr(projector, "fold", None)
    if not callable(own):
        raise TypeError(
            f"cannot fold a {type(projector).__name__}: fold takes a LinearProjector, ViTProjector "
            "or PerceiverProjector"
        )
    return own(**options)
