"""A Linear whose rows are scaled by the norm of another one: what a LayerNorm folds into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from visproj.backend import runs_triton
from visproj.errors import InputError
from visproj.ops.checks import check_alike, check_floating, check_shape, to_autocast_dtype
from visproj.reference import folded_linear_ref


def folded_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stats_weight: Tensor,
    stats_bias: Tensor,
    shift: Tensor | None = None,
    table: Tensor | None = None,
    *,
    eps: float,
    backend: str | None = None,
) -> Tensor:
    """A product whose rows are scaled by a reciprocal deviation that the inputs themselves give.

    ``out = rstd (x Wᵀ + a) + shift + table`` with ``rstd = (‖x Rᵀ + r‖² + eps)^(-1/2)``. With
    ``sqrt(D) [R | r]`` the triangular QR factor of ``[V_c | b_c]``, a Linear of ``D`` outputs
    centred over them, ``rstd`` is that of a LayerNorm behind it. The kernels skip the zero half of
    ``R`` and store neither ``x Rᵀ`` nor ``rstd``. For inference: it has no gradient.

    Args:
        x: ``[..., L, C]``, floating, any strides.
        weight: ``W``, ``[N, C]``.
        bias: ``a``, ``[N]``.
        stats_weight: ``R``, ``[<= C, C]``, zero below its diagonal.
        stats_bias: ``r``, as many as ``R`` has rows.
        shift: ``[N]`` or ``None``.
        table: ``[L, columns]``, added to the first columns of every image, or ``None``.
        eps: Added to the square.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; see :func:`visproj.use_backend`.

    Returns:
        ``[..., L, N]`` in the dtype of ``x``, under autocast in its dtype.

    Raises:
        TypeError: If ``x`` is not floating point or, outside autocast, the dtypes differ.
        ValueError: If shapes do not fit or devices differ.
        RuntimeError: If ``"triton"`` was asked for and cannot run here.

    Source: a matrix and its QR factor give every vector the same norm (Golub and Van Loan, "Matrix
    Computations", section 5.2), here ``‖V_c x + b_c‖ = sqrt(D) ‖R x + r‖``.
    """
    operands = (x, weight, bias, stats_weight, stats_bias, shift, table)
    _check(*operands)
    if not runs_triton(x, backend) or not x.numel() * weight.shape[0]:
        return folded_linear_ref(*operands, eps=eps)
    operands = to_autocast_dtype(*operands)
    return _forward(*operands, eps, True)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stats_weight: Tensor,
    stats_bias: Tensor,
    shift: Tensor | None,
    table: Tensor | None,
) -> None:
    """Raise as :func:`folded_linear` says."""
    check_floating("x", x)
    for name, given in (("weight", weight), ("bias", bias), ("stats_weight", stats_weight)):
        check_floating(name, given)
    check_floating("stats_bias", stats_bias)
    if weight.ndim != 2 or x.ndim < 2 or x.shape[-1] != weight.shape[1]:
        raise InputError(
            "x must be [..., L, C] and weight [N, C], got shapes "
            f"{list(x.shape)} and {list(weight.shape)}"
        )
    N, C = weight.shape
    if stats_weight.ndim != 2 or stats_weight.shape[0] > C or stats_weight.shape[1] != C:
        raise InputError(
            f"stats_weight must be [<= {C}, {C}], got shape {list(stats_weight.shape)}"
        )
    if table is not None:
        check_floating("table", table)
    if table is not None and (table.ndim != 2 or table.shape[1] > N):
        raise InputError(f"table must be [L, <= {N}], got shape {list(table.shape)}")
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "weight": (weight, (N, C)),
        "bias": (bias, (N,)),
        "stats_weight": (stats_weight, tuple(stats_weight.shape)),
        "stats_bias": (stats_bias, (stats_weight.shape[0],)),
        "shift": (shift, (N,)),
        "table": (table, (x.shape[-2], 0 if table is None else table.shape[1])),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None:
            check_shape(name, tensor, shape)
            check_alike(name, tensor, "x", x)


@torch.library.custom_op("visproj::folded_linear_fwd", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stats_weight: Tensor,
    stats_bias: Tensor,
    shift: Tensor | None,
    table: Tensor | None,
    eps: float,
    triton: bool,
) -> Tensor:
    if not triton:
        operands = (x, weight, bias, stats_weight, stats_bias, shift, table)
        return folded_linear_ref(*operands, eps=eps)
    from visproj.kernels.linear import folded_linear_fwd

    rows = x if x.ndim == 3 else x.reshape(-1, *x.shape[-2:])
    operands = (rows, weight, bias, stats_weight, stats_bias, shift, table)
    return folded_linear_fwd(*operands, eps).reshape(*x.shape[:-1], weight.shape[0])


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stats_weight: Tensor,
    stats_bias: Tensor,
    shift: Tensor | None,
    table: Tensor | None,
    eps: float,
    triton: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _refuse(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "visproj::folded_linear has no gradient: it is for inference, under torch.no_grad()"
    )


_forward.register_autograd(_refuse)
