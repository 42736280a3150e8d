"""Trained projectors turned into an exact inference form that needs half the arithmetic or less.

A LayerNorm behind a Linear is a row scale: with the weight centred over its outputs,
``LN(x Wᵀ + b) = rstd * (x W_cᵀ + b_c) * gain + shift``, and ``rstd`` follows from the small
triangular QR factor of ``[W_c | b_c]``. So the Perceiver's ``kv_proj``, ``ln_kv`` and its key and
value projections become one product of width ``2 D`` with the input itself, and the queries a
constant. For the Triton kernels, which skip the zero half of a triangle, ``out_proj``, the
LayerNorm behind it and the last Linear become one product as well. Weights are combined once, in
fp64.
"""

from visproj.folding.combine import fold
from visproj.folding.graphs import graphed
from visproj.folding.modules import FoldedLinear, FoldedPerceiver, FoldedProjector, FoldedViT
from visproj.folding.storage import load_folded

__all__ = [
    "FoldedLinear",
    "FoldedPerceiver",
    "FoldedProjector",
    "FoldedViT",
    "fold",
    "graphed",
    "load_folded",
]
