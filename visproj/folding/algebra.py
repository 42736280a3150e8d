"""The algebra of folding: a LayerNorm after a Linear only rescales each row.

With ``[W | b]`` centred over its ``D`` outputs, ``LN(x Wᵀ + b) = rstd (x W_cᵀ + b_c) γ + β``, and
``rstd = (‖x Rᵀ + r‖² + eps)^(-1/2)`` with ``sqrt(D) [R | r]`` the triangular QR factor of
``[W_c | b_c]``. A Linear after the LayerNorm multiplies these weights. All functions take tensors
and return fp64 tensors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Scaled(NamedTuple):
    """Weights of ``rstd (x weightᵀ + bias) + shift``, ``rstd = (‖x factorᵀ + …‖² + floor)^(-1/2)``.

    Attributes:
        weight: ``[N, C]``.
        bias: ``[N]``.
        factor: Upper triangular ``[<= C, C]``.
        factor_bias: ``[rows of factor]``.
        shift: ``[N]``.
        floor: Added to the squared norm.
    """

    weight: Tensor
    bias: Tensor
    factor: Tensor
    factor_bias: Tensor
    shift: Tensor
    floor: float


def fold_linear_norm(
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    shift: Tensor | None,
    eps: float,
    outer_weight: Tensor | None = None,
    outer_bias: Tensor | None = None,
) -> Scaled:
    """Fold a Linear, its LayerNorm and, if given, a second Linear into one row-scaled Linear.

    Args:
        weight: ``[D, C]``.
        bias: ``[D]`` or ``None``.
        gain: ``[D]``.
        shift: ``[D]`` or ``None``.
        eps: Added to the variance.
        outer_weight: ``[N, D]`` of the Linear after the LayerNorm; ``N`` is ``D`` if ``None``.
        outer_bias: ``[N]`` or ``None``.

    Returns:
        The weights of the row-scaled Linear, in fp64.
    """
    augmented = torch.cat([weight, or_zeros(bias, weight)[:, None]], 1).double()
    centred = augmented - augmented.mean(0)  # [D, C + 1]
    factor, factor_bias, floor = _row_scale(centred, eps)
    combined = gain.double()[:, None] * centred
    constant = or_zeros(shift, weight).double()
    if outer_weight is not None:
        outer = outer_weight.double()
        combined = outer @ combined
        constant = outer @ constant + or_zeros(outer_bias, outer_weight).double()
    return Scaled(combined[:, :-1], combined[:, -1], factor, factor_bias, constant, floor)


def _row_scale(centred: Tensor, eps: float) -> tuple[Tensor, Tensor, float]:
    """Return ``R``, ``r`` and ``floor``: the variance of a row is ``‖x Rᵀ + r‖² + floor - eps``.

    ``R`` and ``r`` are divided by ``sqrt(D)``: the squared norm is a mean, not a sum, so that fp16
    can hold it for all inputs for which it can hold the unfolded values.
    """
    factor = torch.linalg.qr(centred, mode="r").R / math.sqrt(centred.shape[0])
    floor = eps
    if factor.shape[0] == factor.shape[1]:  # [min(D, C + 1), C + 1]
        # The last row is zero except for its last entry, a constant that moves into ``floor``.
        floor += factor[-1, -1].item() ** 2
        factor = factor[:-1]
    return factor[:, :-1], factor[:, -1], floor


def or_zeros(bias: Tensor | None, weight: Tensor) -> Tensor:
    """Return ``bias``, or zeros for the outputs of ``weight``."""
    return weight.new_zeros(weight.shape[0]) if bias is None else bias
