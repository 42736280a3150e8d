"""Linear, LayerNorm and Linear, the normalised rows between them never stored."""

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
    nothing_saved,
    saved_like,
    saves_for_backward,
)
from visproj.ops.checks import check_alike, check_floating, check_shape, to_autocast_dtype
from visproj.reference import formulas, linear_norm_linear_ref


def linear_norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    shift: Tensor | None,
    eps: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    positions: Tensor | None = None,
    positioned: int = 0,
    backend: str | None = None,
) -> Tensor:
    """A Linear on the normalised rows of another: ``LayerNorm(x Wᵀ + b) Vᵀ + d``.

    With ``y = x Wᵀ + b``, its rows' mean ``μ`` and ``r = 1 / sqrt(var + eps)``, and ``V_γ = V
    diag(gain)``, the result is ``r (y V_γᵀ - μ V_γ 1) + V shift + d``. The kernels rewrite the
    smaller operand of the second product: with more rows than outputs they scale ``V`` and
    normalise in the product's epilogue, with fewer they normalise the rows. Only ``y`` is saved.

    Args:
        x: ``[B, L, C]``, floating, any strides.
        weight: ``W``, ``[D, C]``.
        bias: ``b``, ``[D]`` or ``None``.
        gain: ``[D]``.
        shift: ``[D]`` or ``None``.
        eps: Added to the variance.
        out_weight: ``V``, ``[N, D]``.
        out_bias: ``d``, ``[N]`` or ``None``.
        positions: ``[L, D]``, added to every image's normalised rows for the first ``positioned``
            outputs only; their product with ``V`` is made once for all images.
        positioned: How many outputs see the positions.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; see :func:`visproj.use_backend`.

    Returns:
        ``[B, L, N]`` in the dtype of ``x``, under autocast in its dtype.

    Raises:
        TypeError: If ``x`` is not floating point or, outside autocast, the dtypes differ.
        ValueError: If shapes do not fit or devices differ.
        RuntimeError: If ``"triton"`` was asked for and cannot run here.

    Source: DeepSpeed-VisualChat ``utils/model/vis_proj.py``, ``VisProjection_perceiver``.
    """
    operands = (x, weight, bias, gain, shift, out_weight, out_bias, positions)
    _check(*operands, positioned)
    D, N = weight.shape[0], out_weight.shape[0]
    too_wide = f"D is {D}, more than {MAX_NORM_WIDTH}" if D > MAX_NORM_WIDTH else None
    if not runs_triton(x, backend, unsupported=too_wide) or not x.numel() * D * N:
        return linear_norm_linear_ref(*operands, positioned, eps=eps)
    operands = to_autocast_dtype(*operands)
    return _forward(*operands, positioned, eps, saves_for_backward(*operands), True)[0]


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    shift: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    positions: Tensor | None,
    positioned: int,
) -> None:
    """Raise as :func:`linear_norm_linear` says."""
    check_floating("x", x)
    for name, matrix in (("weight", weight), ("out_weight", out_weight), ("gain", gain)):
        check_floating(name, matrix)
    if weight.ndim != 2 or out_weight.ndim != 2 or out_weight.shape[1] != weight.shape[0]:
        raise InputError(
            "weight must be [D, C] and out_weight [N, D], got shapes "
            f"{list(weight.shape)} and {list(out_weight.shape)}"
        )
    if x.ndim != 3 or x.shape[-1] != weight.shape[1]:
        raise InputError(f"x must be [B, L, {weight.shape[1]}], got shape {list(x.shape)}")
    D, N = weight.shape[0], out_weight.shape[0]
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "weight": (weight, tuple(weight.shape)),
        "bias": (bias, (D,)),
        "gain": (gain, (D,)),
        "shift": (shift, (D,)),
        "out_weight": (out_weight, tuple(out_weight.shape)),
        "out_bias": (out_bias, (N,)),
        "positions": (positions, (x.shape[1], D)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None:
            check_shape(name, tensor, shape)
            check_alike(name, tensor, "x", x)
    if not isinstance(positioned, int) or not 0 <= positioned <= N:
        raise InputError(f"positioned must be an int between 0 and {N}, got {positioned}")


@torch.library.custom_op("visproj::linear_norm_linear_fwd", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    shift: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    positions: Tensor | None,
    positioned: int,
    eps: float,
    save: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, and for the backward y and its rows' mean and rstd (empty without ``save``)."""
    table = None if positions is None else F.linear(positions, out_weight[:positioned])
    second = (gain, shift, out_weight, out_bias, table)
    if not triton:
        y = F.linear(x, weight, bias)
        mean, rstd = formulas.row_statistics(y, eps)
        out = formulas.norm_linear(y, mean, rstd, *second)
    elif x.shape[0] * x.shape[1] > out_weight.shape[0]:
        out, y, mean, rstd = _scale_weight(x, weight, bias, eps, *second)
    else:
        out, y, mean, rstd = _normalise_rows(x, weight, bias, eps, *second, save)
    return (out, y, mean, rstd) if save else (out, *nothing_saved(x))


def _scale_weight(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gain: Tensor,
    shift: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    table: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gain goes into the weight, mean and deviation into the product's epilogue.

    The first weight is centred over its outputs, which LayerNorm does not see: else a row's large
    mean would have to cancel behind the second product.
    """
    from visproj.kernels.layer_norm import fold_gain
    from visproj.kernels.linear import linear_fwd, linear_statistics_fwd

    y, mean, rstd = linear_statistics_fwd(x, *_centre(weight, bias), eps)
    folded, weight_sum, constant = fold_gain(out_weight, gain, shift, out_bias)
    out = linear_fwd(
        y, folded, mean=mean, rstd=rstd, weight_sum=weight_sum, shift=constant, table=table
    )[0]
    return out, y, mean, rstd


def _centre(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias without their mean over the outputs, the bias in fp32.

    A column of the weight is left as it is where its mean is below its deviation: nothing is lost
    then, and rounding the difference would add an error of its own.
    """
    variance, mean = torch.var_mean(weight.float(), 0, correction=0)
    weight = (weight - mean.where(mean.square() > variance, 0.0)).to(weight.dtype)
    return weight, None if bias is None else bias.float() - bias.mean(dtype=torch.float32)


def _normalise_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gain: Tensor,
    shift: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    table: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows are normalised, in place where no backward needs them."""
    from visproj.kernels.layer_norm import layer_norm_fwd
    from visproj.kernels.linear import linear_fwd

    # What a library's product would have to copy first, as features without their CLS row.
    y = F.linear(x, weight, bias) if x.is_contiguous() else linear_fwd(x, weight, bias=bias)[0]
    normal, mean, rstd = layer_norm_fwd(
        y.contiguous(), gain, shift, eps, out_dtype=y.dtype, in_place=not save, statistics=True
    )
    if table is None:
        out = _linear(normal, out_weight, out_bias)
    else:
        out = linear_fwd(normal, out_weight, shift=out_bias, table=table)[0]
    return out, y, mean, rstd


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of contiguous ``[B, L, D]``, whose own result is a view: FSDP2 would warn."""
    out = x.new_empty(*x.shape[:2], weight.shape[0])
    rows, target = x.flatten(0, 1), out.flatten(0, 1)
    if bias is None:
        torch.mm(rows, weight.T, out=target)
    else:
        torch.addmm(bias, rows, weight.T, out=target)
    return out


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    shift: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    positions: Tensor | None,
    positioned: int,
    eps: float,
    save: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, y = (x.new_empty((*x.shape[:-1], w.shape[0])) for w in (out_weight, weight))
    return (out, *saved_like(y)) if save else (out, *nothing_saved(x))


@torch.library.custom_op("visproj::linear_norm_linear_bwd", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    out_weight: Tensor,
    positions: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    positioned: int,
    needs_dx: bool,
    needs_dpositions: bool,
    triton: bool,
) -> list[Tensor]:
    """dweight, dbias, dgain, dshift, dout_weight, dout_bias; dx and dpositions where wanted."""
    dnormal = grad.flatten(0, 1) @ out_weight  # [B * L, D]
    if triton:
        from visproj.kernels.layer_norm import layer_norm_bwd
        from visproj.kernels.linear_backward import linear_bwd_weight

        rows = [t.flatten(0, 1) for t in (y, mean, rstd)]
        dy, dgain, dshift = layer_norm_bwd(dnormal, *rows, gain, in_place=True)
        dy = dy.reshape(y.shape)
        dout_weight, dout_bias = linear_bwd_weight(
            grad, y, bias=True, mean=mean, rstd=rstd, gain=gain, shift=shift
        )
        dweight, dbias = linear_bwd_weight(dy, x, bias=True)
    else:
        dnormal = dnormal.reshape(y.shape)
        dy, dgain, dshift = formulas.layer_norm_backward(dnormal, y, mean, rstd, gain)
        normal = formulas.normalise(y, mean, rstd, gain, shift).to(y.dtype)
        dout_weight, dout_bias = formulas.linear_backward(grad, normal)
        dweight, dbias = formulas.linear_backward(dy, x)
    gradients = [dweight, dbias, dgain.to(gain.dtype), dshift.to(gain.dtype)]
    gradients += [dout_weight, dout_bias]
    if needs_dx:
        gradients.append((dy.flatten(0, 1) @ weight).reshape(x.shape))
    if positions is not None:
        dtable = grad[..., :positioned].sum(0)  # [L, positioned]
        dout_weight[:positioned].addmm_(dtable.T, positions)
        if needs_dpositions:
            gradients.append(dtable @ out_weight[:positioned])
    return gradients


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    out_weight: Tensor,
    positions: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    positioned: int,
    needs_dx: bool,
    needs_dpositions: bool,
    triton: bool,
) -> list[Tensor]:
    D, N = weight.shape[0], out_weight.shape[0]
    shapes = [weight.shape, (D,), (D,), (D,), out_weight.shape, (N,)]
    shapes += [x.shape] * needs_dx + [(x.shape[1], D)] * needs_dpositions
    return [x.new_empty(shape) for shape in shapes]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, gain, shift, out_weight, out_bias, positions = inputs[:8]
    ctx.positioned, _, _, ctx.triton = inputs[8:]
    ctx.given = [t is not None for t in (bias, shift, out_bias)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, gain, shift, out_weight, positions, *output[1:])


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    needs_dx, needs_dpositions = ctx.needs_input_grad[0], ctx.needs_input_grad[7]
    gradients = _backward(
        grad, *ctx.saved_tensors, ctx.positioned, needs_dx, needs_dpositions, ctx.triton
    )
    dweight, dbias, dgain, dshift, dout_weight, dout_bias, *others = gradients
    dbias, dshift, dout_bias = (
        gradient if given else None
        for gradient, given in zip((dbias, dshift, dout_bias), ctx.given, strict=True)
    )
    dx = others.pop(0) if needs_dx else None
    dpositions = others.pop() if needs_dpositions else None
    inputs = (dx, dweight, dbias, dgain, dshift, dout_weight, dout_bias, dpositions)
    return (*inputs, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
forbid_second_derivative(_backward)
