"""Mean and deviation of rows from those of their parts, as the tiles of a product leave them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from visproj.kernels.launch import Config, Launch
from visproj.kernels.plans import recall_launch
from visproj.kernels.registry import Example, Sizes, register


@triton.jit
def _merge_statistics_kernel(
    means_ptr,  # [tiles, M]
    squares_ptr,  # [tiles, M]
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    M,
    N,
    tiles,
    eps,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Chan's merge of means and M2 into 1 / sqrt(M2 / N + eps). Grid: (row blocks)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    parts = tl.arange(0, BLOCK_T)
    inside = (parts < tiles)[:, None] & (rows < M)[None, :]
    counts = tl.maximum(tl.minimum(N - parts * TILE, TILE), 0).to(tl.float32)[:, None]
    cells = parts.to(tl.int64)[:, None] * M + rows[None, :]
    means = tl.load(means_ptr + cells, mask=inside, other=0.0)
    squares = tl.load(squares_ptr + cells, mask=inside, other=0.0)
    mean = tl.sum(means * counts, 0) / N
    means -= mean[None, :]
    total = tl.sum(squares + counts * means * means, 0)
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, 1.0 / tl.sqrt(total / N + eps), mask=rows < M)


def merge_statistics(
    partials: Tensor, mean: Tensor, rstd: Tensor, width: int, tile: int, eps: float
) -> None:
    """Merge means and M2 of the parts of rows, ``[2, tiles, M]``, into ``mean`` and ``rstd``."""

    def make() -> Launch:
        _, tiles, rows = partials.shape
        block_t = triton.next_power_of_2(tiles)
        block_m = max(16, min(128, 4096 // block_t))
        return Launch(
            _merge_statistics_kernel,
            triton.cdiv(rows, block_m),
            Config((block_m, block_t), warps=4, stages=1),
            rstd.device,
            M=rows,
            N=width,
            tiles=tiles,
            eps=eps,
            TILE=tile,
            BLOCK_M=block_m,
            BLOCK_T=block_t,
        )

    operands = partials, mean, rstd
    launch = recall_launch("merge_statistics", operands, make, width, tile, eps)
    means, squares = partials.unbind()
    launch(means_ptr=means, squares_ptr=squares, mean_ptr=mean, rstd_ptr=rstd)


def _merge_example(s: Sizes) -> None:
    partials = s.statistics(2, triton.cdiv(s.outputs, 128), s.images * s.length)
    mean, rstd = (s.statistics(s.images, s.length) for _ in range(2))
    merge_statistics(partials, mean, rstd, s.outputs, 128, 1e-12)


register(_merge_statistics_kernel, {"merge_statistics": Example(_merge_example, wide_loads=False)})
