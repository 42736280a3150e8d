"""LayerNorm over rows, forward and backward, and a LayerNorm's gain folded into a weight."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visproj.kernels.device import multiprocessors
from visproj.kernels.launch import Config, Launch
from visproj.kernels.layout import contiguous, unit_columns
from visproj.kernels.plans import recall_launch
from visproj.kernels.registry import Example, Sizes, register


@triton.jit
def _row_vector(ptr, cols, width):
    return tl.load(ptr + cols, mask=cols < width, other=0.0).to(tl.float32)


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,  # [M, width]
    gain_ptr,  # [width]
    shift_ptr,  # [width]
    out_ptr,  # [M, width], may be x_ptr
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    width,
    eps,
    BLOCK: tl.constexpr,
):
    """One row: both passes over it in registers. Grid: (M)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    x = tl.load(x_ptr + row * width + cols, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / width
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    out = centred * rstd * _row_vector(gain_ptr, cols, width)
    if shift_ptr is not None:
        out += _row_vector(shift_ptr, cols, width)
    tl.store(out_ptr + row * width + cols, out.to(out_ptr.dtype.element_ty), mask=inside)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)


@triton.jit
def _layer_norm_bwd_kernel(
    grad_ptr,  # [M, width]
    x_ptr,  # [M, width]
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    gain_ptr,  # [width]
    dx_ptr,  # [M, width], may be grad_ptr
    dgain_ptr,  # [programs, width]
    dshift_ptr,  # [programs, width]
    M,
    width,
    rows_per_program,
    BLOCK: tl.constexpr,
):
    """dx of a run of rows, and that run's share of dgain and dshift. Grid: (runs of rows)."""
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    gain = _row_vector(gain_ptr, cols, width)
    dgain = tl.zeros((BLOCK,), tl.float32)
    dshift = tl.zeros((BLOCK,), tl.float32)
    first = program * rows_per_program
    for row in range(first, min(first + rows_per_program, M)):
        grad = tl.load(grad_ptr + row * width + cols, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * width + cols, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        x = tl.where(inside, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
        dgain += grad * x
        dshift += grad
        grad *= gain
        dx = rstd * (grad - tl.sum(grad, 0) / width - x * (tl.sum(grad * x, 0) / width))
        tl.store(dx_ptr + row * width + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dgain_ptr + program * width + cols, dgain, mask=inside)
    tl.store(dshift_ptr + program * width + cols, dshift, mask=inside)


@triton.jit
def _fold_gain_kernel(
    weight_ptr,  # [N, K]
    gain_ptr,  # [K]
    shift_ptr,  # [K]
    bias_ptr,  # [N]
    folded_ptr,  # [N, K]
    sum_ptr,  # [N]
    constant_ptr,  # [N]
    K,
    stride_weight_row,
    BLOCK: tl.constexpr,
):
    """One row of weight * gain, its sum as rounded, and weight @ shift + bias. Grid: (N)."""
    row = tl.program_id(0).to(tl.int64)
    row_sum = tl.zeros((BLOCK,), tl.float32)
    constant = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, K, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        weight = _row_vector(weight_ptr + row * stride_weight_row, cols, K)
        folded = (weight * _row_vector(gain_ptr, cols, K)).to(folded_ptr.dtype.element_ty)
        tl.store(folded_ptr + row * K + cols, folded, mask=cols < K)
        row_sum += folded.to(tl.float32)
        if shift_ptr is not None:
            constant += weight * _row_vector(shift_ptr, cols, K)
    total = tl.sum(constant, 0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + row).to(tl.float32)
    tl.store(sum_ptr + row, tl.sum(row_sum, 0))
    tl.store(constant_ptr + row, total)


def _row_config(width: int) -> Config:
    block = max(128, triton.next_power_of_2(width))
    return Config((block,), warps=max(1, min(16, block // 512)), stages=1)


def layer_norm_fwd(
    x: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    eps: float,
    *,
    out_dtype: torch.dtype,
    in_place: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """LayerNorm of the rows of a contiguous ``[..., width]`` tensor.

    Returns:
        ``[..., width]``, which is ``x`` itself with ``in_place`` where the dtype allows it; with
        ``statistics`` also its rows' mean and ``1 / sqrt(var + eps)``, fp32 ``[...]``.
    """
    width = x.shape[-1]
    reuse = in_place and x.dtype == out_dtype
    out = x if reuse else torch.empty_like(x, dtype=out_dtype)
    mean = rstd = None
    if statistics:
        mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    gain, shift = contiguous(gain, shift)

    def make() -> Launch:
        config = _row_config(width)
        return Launch(
            _layer_norm_fwd_kernel,
            x.numel() // width,
            config,
            x.device,
            width=width,
            eps=eps,
            BLOCK=config.blocks[0],
        )

    operands = x, gain, shift, out, mean
    launch = recall_launch("layer_norm_fwd", operands, make, eps)
    launch(x_ptr=x, gain_ptr=gain, shift_ptr=shift, out_ptr=out, mean_ptr=mean, rstd_ptr=rstd)
    return out, mean, rstd


def layer_norm_bwd(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gain: Tensor,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of LayerNorm in one pass over ``grad`` and ``x``, both contiguous ``[M, width]``.

    Returns:
        ``dx`` (``grad`` itself with ``in_place``), and fp32 ``dgain`` and ``dshift``, each
        ``[width]``: sums over a fixed number of runs of rows, merged in a fixed order.
    """
    rows, width = x.shape
    dx = grad if in_place else torch.empty_like(x)
    mean, rstd, gain = contiguous(mean, rstd, gain)

    def make() -> Launch:
        per_program = triton.cdiv(rows, min(rows, 2 * multiprocessors(x.device)))
        config = _row_config(width)
        return Launch(
            _layer_norm_bwd_kernel,
            triton.cdiv(rows, per_program),
            config,
            x.device,
            M=rows,
            width=width,
            rows_per_program=per_program,
            BLOCK=config.blocks[0],
        )

    launch = recall_launch("layer_norm_bwd", (grad, x, mean, rstd, gain, dx), make)
    partials = x.new_empty(2, launch.programs, width, dtype=torch.float32)
    dgain, dshift = partials.unbind()
    launch(
        grad_ptr=grad,
        x_ptr=x,
        mean_ptr=mean,
        rstd_ptr=rstd,
        gain_ptr=gain,
        dx_ptr=dx,
        dgain_ptr=dgain,
        dshift_ptr=dshift,
    )
    return dx, dgain.sum(0), dshift.sum(0)


def fold_gain(
    weight: Tensor, gain: Tensor, shift: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``W diag(gain)``, its row sums and ``W shift + bias``.

    With them ``LN(y) Wᵀ + bias = rstd * (y W diag(gain)ᵀ - mean * sum) + constant``. The sums are
    those of the rounded product, so that a large mean cancels exactly.

    Returns:
        ``[N, K]`` in the dtype of ``weight``; fp32 ``[N]`` twice.
    """
    N, K = weight.shape
    (weight,) = unit_columns(weight)
    gain, shift, bias = contiguous(gain, shift, bias)
    folded = weight.new_empty(N, K)
    row_sum, constant = (weight.new_empty(N, dtype=torch.float32) for _ in range(2))

    def make() -> Launch:
        config = Config((min(1024, max(128, triton.next_power_of_2(K))),), warps=4, stages=1)
        return Launch(
            _fold_gain_kernel,
            N,
            config,
            weight.device,
            K=K,
            stride_weight_row=weight.stride(0),
            BLOCK=config.blocks[0],
        )

    launch = recall_launch("fold_gain", (weight, gain, shift, bias), make)
    launch(
        weight_ptr=weight,
        gain_ptr=gain,
        shift_ptr=shift,
        bias_ptr=bias,
        folded_ptr=folded,
        sum_ptr=row_sum,
        constant_ptr=constant,
    )
    return folded, row_sum, constant


def _forward_example(s: Sizes, whole: bool) -> object:
    x, gain = s.tensor(s.images * s.length, s.outputs), s.tensor(s.outputs)
    shift, dtype = (gain, s.dtype) if whole else (None, torch.float32)
    options: dict[str, Any] = {"out_dtype": dtype, "in_place": not whole, "statistics": whole}
    return layer_norm_fwd(x, gain, shift, 1e-12, **options)


def _backward_example(s: Sizes) -> object:
    grad, x = (s.tensor(s.images * s.length, s.outputs) for _ in range(2))
    mean = s.statistics(s.images * s.length)
    return layer_norm_bwd(grad, x, mean, mean, s.tensor(s.outputs))


def _fold_example(s: Sizes, whole: bool) -> object:
    weight, gain = s.tensor(s.outputs, s.inputs), s.tensor(s.inputs)
    return fold_gain(weight, gain, *((gain, s.tensor(s.outputs)) if whole else (None, None)))


register(
    _layer_norm_fwd_kernel,
    {
        "layer_norm_fwd": Example(lambda s: _forward_example(s, whole=True)),
        "layer_norm_fwd_plain": Example(lambda s: _forward_example(s, False), compiled=False),
    },
)
register(_layer_norm_bwd_kernel, {"layer_norm_bwd": Example(_backward_example)})
register(
    _fold_gain_kernel,
    {
        "fold_gain": Example(lambda s: _fold_example(s, whole=True)),
        "fold_gain_plain": Example(lambda s: _fold_example(s, whole=False), compiled=False),
    },
)
