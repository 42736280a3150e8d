"""Trained projectors turned into an exact inference form that needs half the arithmetic or less.

A LayerNorm after a Linear only rescales each row (:mod:`visproj.folding.algebra`). So the
Perceiver's ``kv_proj``, ``ln_kv`` and its key and value projections become one product of width
``2 D`` with the features themselves, and the queries a constant; ``out_proj``, the LayerNorm after
it and the last Linear become one product as well. Weights are combined once, in fp64. Where the
queries are few they go through the key weights as well (:mod:`visproj.folding.key_values`).
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

    The projector is left as it is. The result is called like it, holds the combined weights and
    refuses gradients; ``folded.save(path)`` writes it and :func:`load_folded` reads it back.
    Attention dropout acts after the softmax, so a projector in eval mode folds at any rate.

    Args:
        projector: A :class:`visproj.LinearProjector`, :class:`visproj.ViTProjector`,
            :class:`visproj.PerceiverProjector`, what :func:`visproj.convert` made of another
            model's resampler, or anything else with a ``fold`` method of its own.
        **options: ``dtype`` of the folded weights, the projector's own by default; they are
            combined in fp64. ``form``, of a resampler: ``"keys"``, one product for keys and
            values, or ``"absorbed"``, where queries go through the key weights first; by default
            the one of fewer multiply-adds, and ``"keys"`` where scores would be wider than keys.
            ``grid``, of a resampler with positions: the grid of the features that it will see most,
            for which positions are kept ready; its query grid by default. Other grids stay
            possible.

    Raises:
        TypeError: If ``projector`` cannot be folded, or does not take an option.
        InputError: If the projector or a layer of it carries an adapter, a hook or a
            parametrisation, is quantised or sharded, or if its attention has active dropout,
            ``bias_k`` or ``add_zero_attn``. Under ZeRO-3 gather its parameters around the call.
    """
    check_module("fold", projector)
    own = getattr(projector, "fold", None)
    if not callable(own):
        raise TypeError(
            f"cannot fold a {type(projector).__name__}: fold takes a LinearProjector, ViTProjector "
            "or PerceiverProjector"
        )
    return own(**options)
