"""Linear followed by LayerNorm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visproj.backend import runs_triton
from visproj.errors import InputError
from visproj.ops.autograd import (
    MAX_NORM_WIDTH,
    forbid_second_derivative,
    norm_autocast_dtype,
    nothing_saved,
    saved_like,
    saves_for_backward,
)
from visproj.ops.checks import check_alike, check_floating, check_shape, to_autocast_dtype
from visproj.reference import formulas, linear_layer_norm_ref


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
        RuntimeError: If ``"triton"`` was asked for and cannot run here.

    Source: DeepSpeed-VisualChat ``utils/model/modeling_dsvl.py``, ``build_projection``.
    """
    check_floating("x", x)
    check_floating("weight", weight)
    check_floating("gain", gain)
    if weight.ndim != 2:
        raise InputError(f"weight must be [D, C], got shape {list(weight.shape)}")
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise InputError(f"x must be [..., {weight.shape[1]}], got shape {list(x.shape)}")
    check_alike("weight", weight, "x", x)
    for name, vector in (("bias", bias), ("gain", gain), ("shift", shift)):
        if vector is not None:
            check_shape(name, vector, (weight.shape[0],))
            check_alike(name, vector, "x", x)
    width = weight.shape[0]
    too_wide = f"D is {width}, more than {MAX_NORM_WIDTH}" if width > MAX_NORM_WIDTH else None
    if not runs_triton(x, backend, unsupported=too_wide) or not x.numel() * width:
        return linear_layer_norm_ref(x, weight, bias, gain, shift, eps)
    out_dtype = norm_autocast_dtype(x)
    x, weight, bias = to_autocast_dtype(x, weight, bias)
    save = saves_for_backward(x, weight, bias, gain, shift)
    return _forward(x, weight, bias, gain, shift, eps, out_dtype, save, True)[0]


@torch.library.custom_op("visproj::linear_layer_norm_fwd", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    shift: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    save: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, and for the backward y and its rows' mean and rstd (empty without ``save``)."""
    y = F.linear(x, weight, bias)
    if not triton:
        mean, rstd = formulas.row_statistics(y, eps)
        out = formulas.normalise(y, mean, rstd, gain, shift).to(out_dtype)
        return (out, y, mean, rstd) if save else (out, *nothing_saved(x))
    from visproj.kernels.layer_norm import layer_norm_fwd

    out, mean, rstd = layer_norm_fwd(
        y.contiguous(),
        gain,
        shift,
        eps,
        out_dtype=out_dtype,
        in_place=not save,
        statistics=save,
    )
    if mean is None or rstd is None:
        return (out, *nothing_saved(x))
    return out, y, mean, rstd


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    shift: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    save: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    out = y.new_empty(y.shape, dtype=out_dtype)
    return (out, *saved_like(y)) if save else (out, *nothing_saved(x))


@torch.library.custom_op("visproj::linear_layer_norm_bwd", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gain: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs_dx: bool,
    triton: bool,
) -> list[Tensor]:
    """dweight, dbias, dgain, dshift and, where it is wanted, dx."""
    if triton:
        from visproj.kernels.layer_norm import layer_norm_bwd
        from visproj.kernels.linear_backward import linear_bwd_weight

        rows = y.reshape(-1, y.shape[-1])
        dy, dgain, dshift = layer_norm_bwd(
            grad.reshape(rows.shape).contiguous(), rows, mean.flatten(), rstd.flatten(), gain
        )
        features = x.reshape(1, -1, x.shape[-1])
        dweight, dbias = linear_bwd_weight(dy[None], features, bias=True)
    else:
        dy, dgain, dshift = formulas.layer_norm_backward(grad, y, mean, rstd, gain)
        dweight, dbias = formulas.linear_backward(dy, x)
    gradients = [dweight, dbias, dgain.to(gain.dtype), dshift.to(gain.dtype)]
    return [*gradients, (dy @ weight).reshape(x.shape)] if needs_dx else gradients


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gain: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs_dx: bool,
    triton: bool,
) -> list[Tensor]:
    gradients = [
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        weight.new_empty(weight.shape[0]),
        gain.new_empty(gain.shape),
        gain.new_empty(gain.shape),
    ]
    return [*gradients, x.new_empty(x.shape)] if needs_dx else gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, gain, shift, _, _, _, ctx.triton = inputs
    ctx.has_bias, ctx.has_shift = bias is not None, shift is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, gain, *output[1:])


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    needs_dx = ctx.needs_input_grad[0]
    gradients = _backward(grad, *ctx.saved_tensors, needs_dx, ctx.triton)
    dweight, dbias, dgain, dshift, *dx = gradients
    dbias, dshift = (dbias if ctx.has_bias else None), (dshift if ctx.has_shift else None)
    return (dx[0] if dx else None, dweight, dbias, dgain, dshift, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
forbid_second_derivative(_backward)
