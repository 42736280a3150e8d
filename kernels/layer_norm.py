"""LayerNorm over rows, forward and backward."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visproj.kernels.device import multiprocessors
from visproj.kernels.launch import Config, Launch
from visproj.kernels.layout import contiguous
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
    share,  # 1 / width, rounded to fp32
    share_rest,  # 1 / width - share, the rounding error
    eps,
    BLOCK: tl.constexpr,
):
    """One program: LayerNorm of one row, which stays in registers for both passes. Grid: (M)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    x = tl.load(x_ptr + row * width + cols, mask=inside, other=0.0).to(tl.float32)
    # The mean of a row of equal values must be that value, so the quotient must be rounded once.
    # The result of / is up to 2 ulps off, and the call of tl.div_rn makes registers spill.
    total = tl.sum(x, 0)
    mean = tl.fma(total, share, total * share_rest)
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) * share + eps)
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
    sums_ptr,  # [2, M] from _layer_norm_sums_kernel if a row is wider than BLOCK, or None
    dx_ptr,  # [M, width], may be grad_ptr
    dgain_ptr,  # [runs, width]
    dshift_ptr,  # [runs, width]
    dsum_ptr,  # [runs, width]
    M,
    width,
    runs,
    rows_per_run,
    BLOCK: tl.constexpr,
):
    """One program: dx of a run of rows in one block of columns, and the sums over these rows.

    Grid: (blocks * runs). Summed over the runs, they are dgain, dshift and the sum of dx.
    """
    run = (tl.program_id(0) % runs).to(tl.int64)
    cols = tl.program_id(0) // runs * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    gain = _row_vector(gain_ptr, cols, width)
    dgain = tl.zeros((BLOCK,), tl.float32)
    dshift = tl.zeros((BLOCK,), tl.float32)
    dsum = tl.zeros((BLOCK,), tl.float32)
    first = run * rows_per_run
    for row in range(first, min(first + rows_per_run, M)):
        grad = tl.load(grad_ptr + row * width + cols, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * width + cols, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        x = tl.where(inside, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
        dgain += grad * x
        dshift += grad
        grad *= gain
        if sums_ptr is None:
            total, along = tl.sum(grad, 0), tl.sum(grad * x, 0)
        else:
            total, along = tl.load(sums_ptr + row), tl.load(sums_ptr + M + row)
        dx = rstd * (grad - total / width - x * (along / width))
        dsum += dx
        tl.store(dx_ptr + row * width + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dgain_ptr + run * width + cols, dgain, mask=inside)
    tl.store(dshift_ptr + run * width + cols, dshift, mask=inside)
    tl.store(dsum_ptr + run * width + cols, dsum, mask=inside)


@triton.jit
def _layer_norm_sums_kernel(
    grad_ptr,  # [M, width]
    x_ptr,  # [M, width]
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    gain_ptr,  # [width]
    sums_ptr,  # [2, M]
    M,
    width,
    BLOCK: tl.constexpr,
):
    """One program: for one row, the sums of grad * gain and of that times normalised x.

    Grid: (M).
    """
    row = tl.program_id(0).to(tl.int64)
    mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
    total = tl.zeros((BLOCK,), tl.float32)
    along = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        grad = _row_vector(grad_ptr + row * width, cols, width)
        grad *= _row_vector(gain_ptr, cols, width)
        total += grad  # zero beyond the width
        along += grad * (_row_vector(x_ptr + row * width, cols, width) - mean) * rstd
    tl.store(sums_ptr + row, tl.sum(total, 0))
    tl.store(sums_ptr + M + row, tl.sum(along, 0))


_WIDEST = 16384  # bytes of the widest row that the backward holds in registers
_WIDEST_UNALIGNED = 1024  # its columns if rows are not 16-byte aligned: one address per column
_BLOCK = 4096  # columns per block of wider rows


def _row_config(width: int, columns_per_warp: int) -> Config:
    block = max(128, triton.next_power_of_2(width))
    return Config((block,), warps=max(1, min(16, block // columns_per_warp)), stages=1)


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
    """Compute LayerNorm of the rows of a contiguous ``[..., width]`` tensor.

    Returns:
        ``[..., width]`` in ``out_dtype``, which is ``x`` itself with ``in_place`` if it has that
        dtype; with ``statistics`` also its rows' mean and ``1 / sqrt(var + eps)``, fp32 ``[...]``,
        else ``None``.
    """
    width = x.shape[-1]
    reuse = in_place and x.dtype == out_dtype
    out = x if reuse else torch.empty_like(x, dtype=out_dtype)
    mean = rstd = None
    if statistics:
        mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    gain, shift = contiguous(gain, shift)

    def make() -> Launch:
        config = _row_config(width, 512)
        (share,) = struct.unpack("f", struct.pack("f", 1 / width))
        return Launch(
            _layer_norm_fwd_kernel,
            x.numel() // width,
            config,
            x.device,
            width=width,
            share=share,
            share_rest=1 / width - share,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of LayerNorm in one pass over ``grad`` and ``x``.

    Both are contiguous ``[M, width]``. Rows of more than 16 KiB, or of more than 1024 columns if
    these are not a multiple of 16, take two passes over blocks of columns.

    Returns:
        ``dx`` (``grad`` itself with ``in_place``), and fp32 ``dgain``, ``dshift`` and the sum of
        the rows of ``dx``, each ``[width]``. These are summed over a fixed number of runs of rows
        in a fixed order.
    """
    rows, width = x.shape
    dx = grad if in_place else torch.empty_like(x)
    mean, rstd, gain = contiguous(mean, rstd, gain)

    widest = _WIDEST_UNALIGNED if width % 16 else _WIDEST // x.element_size()
    sums = _sums(grad, x, mean, rstd, gain) if width > widest else None

    def make() -> Launch:
        config = _row_config(width if sums is None else _BLOCK, 256)
        blocks = triton.cdiv(width, config.blocks[0])
        wanted = triton.cdiv(2 * multiprocessors(x.device), blocks)
        per_run = triton.cdiv(rows, min(rows, wanted))
        runs = triton.cdiv(rows, per_run)
        return Launch(
            _layer_norm_bwd_kernel,
            runs * blocks,
            config,
            x.device,
            M=rows,
            width=width,
            runs=runs,
            rows_per_run=per_run,
            BLOCK=config.blocks[0],
        )

    launch = recall_launch("layer_norm_bwd", (grad, x, mean, rstd, gain, dx), make)
    partials = x.new_empty(3, launch.rest["runs"], width, dtype=torch.float32)
    dgain, dshift, dsum = partials.unbind()
    launch(
        grad_ptr=grad,
        x_ptr=x,
        mean_ptr=mean,
        rstd_ptr=rstd,
        gain_ptr=gain,
        sums_ptr=sums,
        dx_ptr=dx,
        dgain_ptr=dgain,
        dshift_ptr=dshift,
        dsum_ptr=dsum,
    )
    return dx, dgain.sum(0), dshift.sum(0), dsum.sum(0)


def _sums(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor) -> Tensor:
    """Return for every row the sums of ``grad * gain`` and of that times the normalised row."""
    rows, width = x.shape
    sums = x.new_empty(2, rows, dtype=torch.float32)

    def make() -> Launch:
        config = _row_config(_BLOCK, 256)
        sizes = {"M": rows, "width": width, "BLOCK": config.blocks[0]}
        return Launch(_layer_norm_sums_kernel, rows, config, x.device, **sizes)

    launch = recall_launch("layer_norm_sums", (grad, x, mean, rstd, gain), make)
    launch(grad_ptr=grad, x_ptr=x, mean_ptr=mean, rstd_ptr=rstd, gain_ptr=gain, sums_ptr=sums)
    return sums


def _forward_example(s: Sizes, whole: bool) -> object:
    x, gain = s.tensor(s.images * s.length, s.outputs), s.tensor(s.outputs)
    shift, dtype = (gain, s.dtype) if whole else (None, torch.float32)
    options: dict[str, Any] = {"out_dtype": dtype, "in_place": not whole, "statistics": whole}
    return layer_norm_fwd(x, gain, shift, 1e-12, **options)


def _backward_example(s: Sizes, call: Callable[..., object]) -> object:
    grad, x = (s.tensor(s.images * s.length, s.outputs) for _ in range(2))
    mean = s.statistics(s.images * s.length)
    return call(grad, x, mean, mean, s.tensor(s.outputs))


# The kernels compile differently for each power of two of the width, and for widths that are not a
# multiple of 16.
_UNALIGNED = tuple({"outputs": n} for n in (100, 1000, 2001, 3000, 8191, 16383))
_ALIGNED = tuple({"outputs": n} for n in (256, 512, 1024, 2048, 5120, 8192, 12288, 16384))
_OTHERS = _ALIGNED + _UNALIGNED

register(
    _layer_norm_fwd_kernel,
    {
        "layer_norm_fwd": Example(partial(_forward_example, whole=True), others=_OTHERS),
        "layer_norm_fwd_plain": Example(partial(_forward_example, whole=False), compiled=False),
    },
)
register(
    _layer_norm_bwd_kernel,
    {"layer_norm_bwd": Example(partial(_backward_example, call=layer_norm_bwd), others=_OTHERS)},
)
register(
    _layer_norm_sums_kernel,
    {"layer_norm_sums": Example(partial(_backward_example, call=_sums), others=_UNALIGNED[-1:])},
)
