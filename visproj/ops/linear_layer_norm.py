"""Linear followed by LayerNorm."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visproj.backend import runs_triton
from visproj.errors import InputError
from visproj.ops import eager
from visproj.ops.autograd import (
    MAX_NORM_WIDTH,
    Operation,
    forbid_second_derivative,
    in_order,
    norm_autocast_dtype,
    nothing_saved,
    saved_like,
    saves_for_backward,
)
from visproj.ops.checks import check_all_floating, check_operands, to_autocast_dtype


class Inputs(NamedTuple):
    """Arguments of the custom operator; see :func:`linear_layer_norm`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    gain: Tensor
    shift: Tensor | None
    eps: float
    out_dtype: torch.dtype
    save: bool


class BackwardInputs(NamedTuple):
    """Arguments of the backward operator."""

    grad: Tensor  # gradient of the output
    x: Tensor
    weight: Tensor
    gain: Tensor
    y: Tensor  # x Wᵀ + b
    mean: Tensor  # mean of the rows of y
    rstd: Tensor  # reciprocal deviation of the rows of y
    needs_dx: bool


def linear_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    shift: Tensor | None,
    eps: float = 1e-12,
    *,
    backend: str | None = None,
) -> Tensor:
    """Project rows and normalise them over the output width.

    ``y = x Wᵀ + b``, then ``out = (y - mean(y)) / sqrt(var(y) + eps) * gain + shift`` with the
    biased variance, both over the last dimension.

    Args:
        x: ``[..., C]``, floating, any strides.
        weight: ``[D, C]``.
        bias: ``[D]`` or ``None``.
        gain: ``[D]``.
        shift: ``[D]`` or ``None``.
        eps: Added to the variance.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; see :func:`visproj.use_backend`.

    Returns:
        ``[..., D]`` in the dtype of ``x``; under autocast in the dtype that
        ``nn.LayerNorm(nn.Linear(x))`` would give.

    Raises:
        TypeError: If ``x`` is not floating point or, outside autocast, the dtypes differ.
        ValueError: If shapes do not fit or devices differ.
        RuntimeError: If ``"triton"`` was chosen and cannot run here.

    Source: DeepSpeed-VisualChat ``utils/model/modeling_dsvl.py``, ``build_projection``.
    """
    check_all_floating(x=x, weight=weight, gain=gain)
    if weight.ndim != 2:
        raise InputError(f"weight must be [D, C], got shape {list(weight.shape)}")
    D, C = weight.shape
    if x.ndim == 0 or x.shape[-1] != C:
        raise InputError(f"x must be [..., {C}], got shape {list(x.shape)}")
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "weight": (weight, (D, C)),
        "bias": (bias, (D,)),
        "gain": (gain, (D,)),
        "shift": (shift, (D,)),
    }
    check_operands("x", x, wanted)
    too_wide = f"D is {D}, more than {MAX_NORM_WIDTH}" if D > MAX_NORM_WIDTH else None
    if not runs_triton(x, backend, unsupported=too_wide) or not x.numel() * D:
        return eager.linear_layer_norm(x, weight, bias, gain, shift, eps)
    out_dtype = norm_autocast_dtype(x)
    x, weight, bias = to_autocast_dtype(x, weight, bias)
    save = saves_for_backward(x, weight, bias, gain, shift)
    given = x, weight, bias, gain, shift, eps, out_dtype, save
    return _linear_layer_norm_fwd(*given, differentiable=save)[0]


def _run_fwd(*inputs: Any) -> tuple[Tensor | None, ...]:
    """Return the result, and with ``save`` y and its rows' mean and rstd for the backward."""
    from visproj.kernels.layer_norm import layer_norm_fwd

    x, weight, bias, gain, shift, eps, out_dtype, save = Inputs(*inputs)
    y = F.linear(x, weight, bias)
    out, mean, rstd = layer_norm_fwd(
        y.contiguous(),
        gain,
        shift,
        eps,
        out_dtype=out_dtype,
        in_place=not save,
        statistics=save,
    )
    return out, y if save else None, mean, rstd


_linear_layer_norm_fwd = Operation(
    "linear_layer_norm_fwd", Inputs, "(Tensor, Tensor, Tensor, Tensor)", _run_fwd
)


@_linear_layer_norm_fwd.custom.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, *_, out_dtype, save = inputs
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    out = y.new_empty(y.shape, dtype=out_dtype)
    return (out, *saved_like(y)) if save else (out, *nothing_saved(x))


def _run_bwd(*inputs: Any) -> list[Tensor]:
    """Return dweight, dbias, dgain, dshift and, if it is needed, dx."""
    from visproj.kernels.layer_norm import layer_norm_bwd

    grad, x, weight, gain, y, mean, rstd, needs_dx = BackwardInputs(*inputs)
    rows = y.reshape(-1, y.shape[-1])
    dy, dgain, dshift, dbias = layer_norm_bwd(
        grad.reshape(rows.shape).contiguous(), rows, mean.flatten(), rstd.flatten(), gain
    )
    dweight = dy.T @ x.reshape(-1, x.shape[-1])
    gradients = [dweight, dbias.to(weight.dtype), dgain.to(gain.dtype), dshift.to(gain.dtype)]
    return [*gradients, (dy @ weight).reshape(x.shape)] if needs_dx else gradients


_linear_layer_norm_bwd = Operation("linear_layer_norm_bwd", BackwardInputs, "Tensor[]", _run_bwd)


@_linear_layer_norm_bwd.custom.register_fake
def _(*inputs: Any) -> list[Tensor]:
    _, x, weight, gain, *_, needs_dx = inputs
    shapes = [weight.shape, (weight.shape[0],)]
    gradients = [weight.new_empty(shape) for shape in shapes]
    gradients += [gain.new_empty(gain.shape), gain.new_empty(gain.shape)]
    return [*gradients, x.new_empty(x.shape)] if needs_dx else gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, gain, shift, *_ = inputs
    ctx.has_bias, ctx.has_shift = bias is not None, shift is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, gain, *output[1:])


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return in_order(Inputs)
    needed = Inputs(*ctx.needs_input_grad)
    found = _linear_layer_norm_bwd(
        grad, *ctx.saved_tensors, needed.x, differentiable=torch.is_grad_enabled()
    )
    dweight, dbias, dgain, dshift, *dx = found
    return in_order(
        Inputs,
        x=dx[0] if dx else None,
        weight=dweight,
        bias=dbias if ctx.has_bias else None,
        gain=dgain,
        shift=dshift if ctx.has_shift else None,
    )


_linear_layer_norm_fwd.register_autograd(_differentiate, _setup_context)
forbid_second_derivative(_linear_layer_norm_bwd)
