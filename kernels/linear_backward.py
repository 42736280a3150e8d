"""The weight gradient of a Linear whose input, a LayerNorm's output, is recomputed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from visproj.kernels import configs
from visproj.kernels.device import dot_precision
from visproj.kernels.launch import Config, Launch
from visproj.kernels.layer_norm import layer_norm_fwd
from visproj.kernels.layout import contiguous
from visproj.kernels.makespan import Tiles, product_tiles
from visproj.kernels.plans import key_of, recall
from visproj.kernels.registry import Example, Sizes, register
from visproj.kernels.tuning import LIBRARY, Library, choose


@triton.jit
def _linear_bwd_weight_kernel(
    grad_ptr,  # [M, N]
    y_ptr,  # [M, K]
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    gain_ptr,  # [K]
    shift_ptr,  # [K]
    dweight_ptr,  # [N, K]
    dbias_ptr,  # [N]
    M,
    N,
    K,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One program: a tile of grad.T @ LayerNorm(y), over all rows, which are normalised again.

    Grid: (tiles of N * tiles of K). The programs of the first tile of K also sum grad to dbias.
    """
    tiles_k = tl.cdiv(K, BLOCK_K)
    first_n = tl.program_id(0) // tiles_k * BLOCK_N
    first_k = tl.program_id(0) % tiles_k * BLOCK_K
    ns = first_n + tl.arange(0, BLOCK_N)
    ks = first_k + tl.arange(0, BLOCK_K)
    if DESCRIPTORS:
        grad_tiles = tl.make_tensor_descriptor(grad_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
        y_tiles = tl.make_tensor_descriptor(y_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    gain = tl.load(gain_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)[None, :]
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, M, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        in_rows = rows < M
        if DESCRIPTORS:
            grad = grad_tiles.load([first, first_n])  # [BLOCK_M, BLOCK_N]
            y = y_tiles.load([first, first_k])  # [BLOCK_M, BLOCK_K]
        else:
            cells = rows.to(tl.int64)[:, None]
            in_grad, in_y = (
                in_rows[:, None] & (ns < N)[None, :],
                in_rows[:, None] & (ks < K)[None, :],
            )
            grad = tl.load(grad_ptr + cells * N + ns[None, :], mask=in_grad, other=0.0)
            y = tl.load(y_ptr + cells * K + ks[None, :], mask=in_y, other=0.0)
        mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)
        normal = (y.to(tl.float32) - mean[:, None]) * rstd[:, None] * gain
        if shift_ptr is not None:
            normal += shift
        if first_k == 0:
            total += tl.sum(grad.to(tl.float32), 0)
        acc = tl.dot(tl.trans(grad), normal.to(y.dtype), acc, input_precision=PRECISION)
    out = dweight_ptr + ns.to(tl.int64)[:, None] * K + ks[None, :]
    tl.store(out, acc.to(dweight_ptr.dtype.element_ty), mask=(ns < N)[:, None] & (ks < K)[None, :])
    if first_k == 0:
        tl.store(dbias_ptr + ns, total.to(dbias_ptr.dtype.element_ty), mask=ns < N)


class _Operands(NamedTuple):
    """Tensors as the kernel reads them."""

    grad: Tensor
    y: Tensor
    mean: Tensor
    rstd: Tensor
    gain: Tensor
    shift: Tensor | None
    dweight: Tensor
    dbias: Tensor


def linear_bwd_weight(
    grad: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    eps: float,
    dweight: Tensor,
    dbias: Tensor,
) -> None:
    """Compute the gradients of ``W`` and ``b`` in ``LayerNorm(y) Wᵀ + b``.

    The rows of ``y`` are normalised again.

    Args:
        grad: Gradient of the output, ``[M, N]``.
        y: ``[M, K]``.
        mean: Mean of the rows of ``y``, fp32 ``[M]``.
        rstd: ``1 / sqrt(var + eps)`` of its rows, fp32 ``[M]``.
        gain: ``[K]``.
        shift: ``[K]`` or ``None``.
        eps: Added to the variance.
        dweight: Written with the gradient of ``W``, contiguous ``[N, K]``.
        dbias: Written with the gradient of ``b``, contiguous ``[N]``.
    """
    operands = _Operands(*contiguous(grad, y, mean, rstd, gain, shift), dweight, dbias)
    precision = dot_precision(y.dtype)
    key = key_of("linear_bwd_weight", operands, eps, precision)
    recall(key, lambda: _plan(operands, eps, precision))(operands)


def _start(launch: Launch, operands: _Operands) -> None:
    launch(**{f"{name}_ptr": tensor for name, tensor in operands._asdict().items()})


def _in_pytorch(eps: float, operands: _Operands) -> None:
    """Compute the gradients in PyTorch, which stores the normalised rows once more."""
    grad, y, _, _, gain, shift, dweight, dbias = operands
    options: dict[str, Any] = {"out_dtype": y.dtype, "in_place": False, "statistics": False}
    normal, *_ = layer_norm_fwd(y, gain, shift, eps, **options)
    torch.mm(grad.T, normal, out=dweight)
    torch.sum(grad, 0, out=dbias)


def _plan(
    operands: _Operands, eps: float, precision: str
) -> tuple[Callable[[_Operands], None], bool]:
    """Choose a configuration or PyTorch; return the plan and whether the choice is final."""
    grad, y, *_ = operands
    (M, N), K = grad.shape, y.shape[1]

    def plan(choice: Config | Library) -> Callable[[_Operands], None]:
        if isinstance(choice, Library):
            return partial(_in_pytorch, eps)
        block_n, block_k, block_m = choice.blocks
        launch = Launch(
            _linear_bwd_weight_kernel,
            triton.cdiv(N, block_n) * triton.cdiv(K, block_k),
            choice,
            y.device,
            M=M,
            N=N,
            K=K,
            PRECISION=precision,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            BLOCK_M=block_m,
            DESCRIPTORS=choice.descriptors,
        )
        return partial(_start, launch)

    def tiles(config: Config) -> Tiles:
        return product_tiles(1, N, K, M, config.blocks)

    choices: tuple[Any, ...] = configs.candidates("linear_bwd_weight", (grad, y), precision)
    choice, settled = choose(
        "linear_bwd_weight",
        (M, N, K, precision),
        (*choices, LIBRARY),
        lambda c: partial(plan(c), operands),
        y,
        tiles,
    )
    return plan(choice), settled


def _example(s: Sizes) -> object:
    rows = s.images * s.length
    grad, y, mean = s.tensor(rows, s.outputs), s.tensor(rows, s.inputs), s.statistics(rows)
    gain, dweight, dbias = s.tensor(s.inputs), s.tensor(s.outputs, s.inputs), s.tensor(s.outputs)
    linear_bwd_weight(grad, y, mean, mean, gain, gain, 1e-12, dweight, dbias)
    return dweight, dbias


register(
    _linear_bwd_weight_kernel,
    flops=lambda arguments: 2 * arguments["M"] * arguments["N"] * arguments["K"],
    examples={
        "linear_bwd_weight": Example(
            _example,
            table="linear_bwd_weight",
            tile="nkm",
            products=("nkm",),
            descriptors=2,
            blocks=2,
        ),
    },
)
