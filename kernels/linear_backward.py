"""The weight and bias gradients of a Linear, with a LayerNorm before it recomputed."""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from visproj.kernels import configs
from visproj.kernels.device import dot_precision
from visproj.kernels.launch import Config, Launch
from visproj.kernels.layout import contiguous, unit_columns
from visproj.kernels.makespan import Tiles, product_tiles
from visproj.kernels.plans import key_of, recall
from visproj.kernels.registry import Example, Sizes, register
from visproj.kernels.tuning import choose


@triton.jit
def _linear_bwd_weight_kernel(
    grad_ptr,  # [images * length, N]
    x_ptr,  # [images, length, K]
    mean_ptr,  # [images * length]
    rstd_ptr,  # [images * length]
    gain_ptr,  # [K]
    shift_ptr,  # [K]
    dweight_ptr,  # [N, K]
    dbias_ptr,  # [N]
    M,
    images,
    length,
    N,
    K,
    stride_x_image,
    stride_x_row,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """grad.T @ x, or grad.T @ LayerNorm(x) with the normalised rows recomputed from x.

    Grid: (tiles of N * tiles of K). The programs of the first column of tiles also sum grad.
    """
    tiles_k = tl.cdiv(K, BLOCK_K)
    tile_n, tile_k = tl.program_id(0) // tiles_k, tl.program_id(0) % tiles_k
    first_n, first_k = tile_n * BLOCK_N, tile_k * BLOCK_K
    ns = first_n + tl.arange(0, BLOCK_N)
    ks = first_k + tl.arange(0, BLOCK_K)
    lanes = tl.arange(0, BLOCK_M)
    row_tiles = tl.cdiv(length, BLOCK_M)
    if DESCRIPTORS:
        # Of all images at once the stride is the size of grad. tl.cast: a length of 1 is constant.
        stride_grad_image = tl.cast(length, tl.int64) * N
        grad_tiles = tl.make_tensor_descriptor(
            grad_ptr, [images, length, N], [stride_grad_image, N, 1], [1, BLOCK_M, BLOCK_N]
        )
        x_tiles = tl.make_tensor_descriptor(
            x_ptr, [images, length, K], [stride_x_image, stride_x_row, 1], [1, BLOCK_M, BLOCK_K]
        )
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)[None, :]
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for tile_m in range(0, images * row_tiles):
        image = tile_m // row_tiles
        first_row = (tile_m % row_tiles) * BLOCK_M
        rows = first_row + lanes
        flat_rows = image.to(tl.int64) * length + rows
        if DESCRIPTORS:
            grad = grad_tiles.load([image, first_row, first_n]).reshape(BLOCK_M, BLOCK_N)
            x = x_tiles.load([image, first_row, first_k]).reshape(BLOCK_M, BLOCK_K)
        else:
            in_rows = (rows < length)[:, None]
            grad = tl.load(
                grad_ptr + flat_rows[:, None] * N + ns[None, :],
                mask=in_rows & (ns < N)[None, :],
                other=0.0,
            )
            cells = image.to(tl.int64) * stride_x_image + rows.to(tl.int64) * stride_x_row
            x = tl.load(
                x_ptr + cells[:, None] + ks[None, :], mask=in_rows & (ks < K)[None, :], other=0.0
            )
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + flat_rows, mask=rows < length, other=0.0)
            rstd = tl.load(rstd_ptr + flat_rows, mask=rows < length, other=0.0)
            normalised = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
            if gain_ptr is not None:
                normalised *= gain
            if shift_ptr is not None:
                normalised += shift
            x = normalised.to(x.dtype)
        acc = tl.dot(tl.trans(grad), x, acc, input_precision=PRECISION)
    out = dweight_ptr + ns.to(tl.int64)[:, None] * K + ks[None, :]
    tl.store(out, acc.to(dweight_ptr.dtype.element_ty), mask=(ns < N)[:, None] & (ks < K)[None, :])

    if dbias_ptr is not None:  # noqa: SIM102, settled when compiling, the other is not
        if tile_k == 0:
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for first in range(0, M, BLOCK_M):
                rows = first + lanes.to(tl.int64)
                total += tl.load(
                    grad_ptr + rows[:, None] * N + ns[None, :],
                    mask=(rows < M)[:, None] & (ns < N)[None, :],
                    other=0.0,
                ).to(tl.float32)
            dbias = tl.sum(total, 0)
            tl.store(dbias_ptr + ns, dbias.to(dbias_ptr.dtype.element_ty), mask=ns < N)


def linear_bwd_weight(
    grad: Tensor,
    x: Tensor,
    *,
    bias: bool,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the weight and the bias of ``x̂ Wᵀ + b``.

    ``x̂`` is ``x``, or ``(x - mean) * rstd * gain + shift`` where statistics are given; it is
    recomputed tile by tile and never stored.

    Args:
        grad: Gradient of the output, ``[B, L, N]``.
        x: ``[B, L, K]``, any strides.
        bias: Whether the bias gradient is wanted.
        mean: fp32 ``[B, L]``, together with ``rstd``.
        rstd: fp32 ``[B, L]``.
        gain: ``[K]``.
        shift: ``[K]``.

    Returns:
        ``[N, K]`` and ``[N]`` or ``None``, in the dtype of ``x``.
    """
    (x,) = unit_columns(x)
    grad, mean, rstd, gain, shift = contiguous(grad, mean, rstd, gain, shift)
    operands = grad, x, mean, rstd, gain, shift
    precision = dot_precision(x.dtype)
    launch = recall(
        key_of("linear_bwd_weight", operands, bias, precision),
        lambda: _plan(operands, bias, precision),
    )
    return _start(launch, operands, bias)


_Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _start(launch: Launch, operands: _Operands, bias: bool) -> tuple[Tensor, Tensor | None]:
    """Allocate and launch."""
    grad, x, mean, rstd, gain, shift = operands
    dweight = x.new_empty(grad.shape[-1], x.shape[-1])
    dbias = x.new_empty(grad.shape[-1]) if bias else None
    launch(
        grad_ptr=grad,
        x_ptr=x,
        mean_ptr=mean,
        rstd_ptr=rstd,
        gain_ptr=gain,
        shift_ptr=shift,
        dweight_ptr=dweight,
        dbias_ptr=dbias,
    )
    return dweight, dbias


def _plan(operands: _Operands, bias: bool, precision: str) -> tuple[Launch, bool]:
    """Choose a configuration; returns whether it is settled as well."""
    grad, x, mean, *_ = operands
    images, length, K = x.shape
    N = grad.shape[-1]
    if images == 1 or x.stride(0) == length * x.stride(1):
        images, length = 1, images * length

    def plan(config: Config) -> Launch:
        block_n, block_k, block_m = config.blocks
        return Launch(
            _linear_bwd_weight_kernel,
            triton.cdiv(N, block_n) * triton.cdiv(K, block_k),
            config,
            x.device,
            M=images * length,
            images=images,
            length=length,
            N=N,
            K=K,
            stride_x_image=x.stride(0),
            stride_x_row=x.stride(1),
            PRECISION=precision,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            BLOCK_M=block_m,
            DESCRIPTORS=config.descriptors,
        )

    def tiles(config: Config) -> Tiles:
        return product_tiles(1, N, K, images * length, config.blocks)

    choices = configs.candidates("linear_bwd_weight", (grad, x), precision)
    key = (images * length, N, K, mean is not None)
    config, settled = choose(
        "linear_bwd_weight",
        key,
        choices,
        lambda c: partial(_start, plan(c), operands, bias),
        x,
        tiles,
    )
    return plan(config), settled


def _example(s: Sizes, norm: bool) -> object:
    x, grad = s.features(), s.tensor(s.images, s.length, s.outputs)
    if not norm:
        return linear_bwd_weight(grad, x, bias=False)
    mean, gain = s.statistics(s.images, s.length), s.tensor(s.inputs)
    return linear_bwd_weight(grad, x, bias=True, mean=mean, rstd=mean, gain=gain, shift=gain)


register(
    _linear_bwd_weight_kernel,
    flops=lambda arguments: 2 * arguments["M"] * arguments["N"] * arguments["K"],
    examples={
        "linear_bwd_weight": Example(
            lambda s: _example(s, norm=True),
            table="linear_bwd_weight",
            tile="nkm",
            products=("nkm",),
            descriptors=2,
            blocks=2,
        ),
        "linear_bwd_weight_plain": Example(lambda s: _example(s, norm=False), compiled=False),
    },
)
