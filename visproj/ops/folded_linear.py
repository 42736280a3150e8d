"""The row-scaled Linear that a Linear and the LayerNorm after it fold into."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from visproj.backend import runs_triton
from visproj.errors import InputError
from visproj.ops import eager
from visproj.ops.autograd import Operation, saves_for_backward
from visproj.ops.checks import check_all_floating, check_operands, to_autocast_dtype


class Inputs(NamedTuple):
    """Arguments of the custom operator; see :func:`folded_linear`."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    stats_weight: Tensor
    stats_bias: Tensor
    shift: Tensor | None
    table: Tensor | None
    eps: float


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
    """Compute a Linear whose rows are scaled by a reciprocal deviation computed from the input.

    ``out = rstd (x Wᵀ + a) + shift + table`` with ``rstd = (‖x Rᵀ + r‖² + eps)^(-1/2)``. Let
    ``[V_c | b_c]`` be weight and bias of a Linear with ``D`` outputs, centred over the outputs. If
    ``sqrt(D) [R | r]`` is its triangular QR factor, ``rstd`` is that of a LayerNorm after this
    Linear. The kernels skip the zero half of ``R`` and store neither ``x Rᵀ`` nor ``rstd``. The
    operation is inference-only: it has no gradient.

    Args:
        x: ``[..., L, C]``, floating, any strides.
        weight: ``W``, ``[N, C]``.
        bias: ``a``, ``[N]``.
        stats_weight: ``R``, ``[<= C, C]``, zero below its diagonal.
        stats_bias: ``r``, ``[rows of R]``.
        shift: ``[N]`` or ``None``.
        table: ``[L, columns]``, added to the first columns of every image, or ``None``.
        eps: Added to the squared norm.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; see :func:`visproj.use_backend`.

    Returns:
        ``[..., L, N]`` in the dtype of ``x``, or under autocast in autocast's dtype.

    Raises:
        TypeError: If ``x`` is not floating point or, outside autocast, the dtypes differ.
        ValueError: If shapes do not fit or devices differ.
        RuntimeError: If ``"triton"`` was chosen and cannot run here.

    Source: a matrix and its QR factor give every vector the same norm (Golub and Van Loan, "Matrix
    Computations", section 5.2), here ``‖V_c x + b_c‖ = sqrt(D) ‖R x + r‖``.
    """
    inputs = Inputs(x, weight, bias, stats_weight, stats_bias, shift, table, eps)
    _check(inputs)
    return fitting_folded_linear(inputs, backend)


def fitting_folded_linear(inputs: Inputs, backend: str | None = None) -> Tensor:
    """Compute :func:`folded_linear` for operands that are known to fit one another."""
    x, eps = inputs.x, inputs.eps
    if not runs_triton(x, backend) or not x.numel() * inputs.weight.shape[0]:
        return eager.folded_linear(*inputs)
    differentiable = saves_for_backward(*inputs[:-1])
    return _folded_linear_fwd(*to_autocast_dtype(*inputs[:-1]), eps, differentiable=differentiable)


def check_input(x: Tensor, weight: Tensor, table: Tensor | None) -> None:
    """Raise, as :func:`folded_linear` says, unless ``x`` and ``table`` fit the weight."""
    check_all_floating(x=x)
    if weight.ndim != 2 or x.ndim < 2 or x.shape[-1] != weight.shape[1]:
        raise InputError(
            "x must be [..., L, C] and weight [N, C], got shapes "
            f"{list(x.shape)} and {list(weight.shape)}"
        )
    fitting: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {"weight": (weight, weight.shape)}
    if table is not None:
        check_all_floating(table=table)
        if table.ndim != 2 or table.shape[1] > weight.shape[0]:
            raise InputError(
                f"table must be [L, <= {weight.shape[0]}], got shape {list(table.shape)}"
            )
        fitting["table"] = table, (x.shape[-2], table.shape[1])
    check_operands("x", x, fitting)


def _check(inputs: Inputs) -> None:
    """Raise as :func:`folded_linear` says."""
    x, weight, stats_weight = inputs.x, inputs.weight, inputs.stats_weight
    check_all_floating(
        x=x,
        weight=weight,
        bias=inputs.bias,
        stats_weight=stats_weight,
        stats_bias=inputs.stats_bias,
    )
    check_input(x, weight, inputs.table)
    N, C = weight.shape
    if stats_weight.ndim != 2 or stats_weight.shape[0] > C or stats_weight.shape[1] != C:
        raise InputError(
            f"stats_weight must be [<= {C}, {C}], got shape {list(stats_weight.shape)}"
        )
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "bias": (inputs.bias, (N,)),
        "stats_weight": (stats_weight, stats_weight.shape),
        "stats_bias": (inputs.stats_bias, (stats_weight.shape[0],)),
        "shift": (inputs.shift, (N,)),
    }
    check_operands("x", x, wanted)


def _run_fwd(*inputs: Any) -> Tensor:
    from visproj.kernels.linear import folded_linear_fwd

    x, weight, *others = Inputs(*inputs)
    rows = x if x.ndim == 3 else x.reshape(-1, *x.shape[-2:])
    out = folded_linear_fwd(rows, weight, *others, library=eager.folded_linear)
    return out if x.ndim == 3 else out.reshape(*x.shape[:-1], weight.shape[0])


_folded_linear_fwd = Operation("folded_linear_fwd", Inputs, "Tensor", _run_fwd)


@_folded_linear_fwd.custom.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _refuse(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "visproj::folded_linear has no gradient, it is inference-only: call it under "
        "torch.no_grad()"
    )


_folded_linear_fwd.custom.register_autograd(_refuse)
