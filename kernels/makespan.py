"""An estimate of how long a launch's tiles occupy the processors of a GPU."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import triton

_MANY = 64  # rounds of tiles from which on the last, partial round does not matter
# The fraction of the peak that a matmul's tile reaches, by its number of elements: estimates from
# Triton's published 128x256 (640 of 790 TFLOP/s on an H100), 128x128 (550) and 64x128 (380).
_REACHED = ((128 * 256, 640 / 790), (128 * 128, 550 / 790), (0, 380 / 790))


@dataclass(frozen=True)
class Tiles:
    """The tiles of a launch.

    Attributes:
        work: Work of each tile, in the order in which they start: FLOPs, or anything else in
            proportion to time.
        resident: Tiles that one processor holds at once.
        size: Elements of a matmul's tile; 0 for attention.
        traffic: Elements that all tiles together read.
    """

    work: Sequence[float]
    resident: int = 1
    size: int = 0
    traffic: float = 0.0

    def shared_by(self, processors: int) -> int:
        """Return how many tiles share a processor: as many as it holds, or fewer for few tiles."""
        return min(self.resident, max(1, math.ceil(len(self.work) / processors)))

    def reached(self) -> float:
        """Return the fraction of the peak that a matmul's tile of this size reaches."""
        return next(rate for size, rate in _REACHED if self.size >= size)

    def seconds(self, processors: int, rate: float = 1.0, around: float = 0.0) -> float:
        """Return the time until the last tile ends, in seconds.

        Args:
            processors: Number of processors.
            rate: Work per second of all processors together.
            around: Seconds that every tile takes in addition to its work.
        """
        slots = processors * self.shared_by(processors)
        if len(self.work) > _MANY * slots:
            return sum(self.work) / rate + around * len(self.work) / slots
        return makespan([work / (rate / slots) + around for work in self.work], slots)


def makespan(seconds: Iterable[float], slots: int) -> float:
    """Give each piece of work to the slot that is free first; return when the last one ends."""
    free = [0.0] * slots
    for piece in seconds:
        heapq.heapreplace(free, free[0] + piece)
    return max(free)


def product_tiles(
    images: int,
    rows: int,
    columns: int,
    depth: int,
    blocks: Sequence[int],
    *,
    triangular: bool = False,
    group: int = 1,
) -> Tiles:
    """Return the tiles of a matmul, ``[images, rows, depth]`` by ``[columns, depth]`` transposed.

    Args:
        images: Number of images; a tile never crosses from one to the next.
        rows: Rows of each image.
        columns: Columns of the result.
        depth: Size of the dimension that is summed over.
        blocks: Rows, columns and depth of a tile.
        triangular: Whether a column tile starts at the depth of its first column.
        group: Row tiles that start before the next column tile.
    """
    block_m, block_n, block_k = blocks
    row_tiles, column_tiles = images * triton.cdiv(rows, block_m), triton.cdiv(columns, block_n)
    starts = [n * block_n // block_k * block_k if triangular else 0 for n in range(column_tiles)]
    depths = [triton.cdiv(depth - start, block_k) * block_k for start in starts]
    ordered = [
        deep
        for first in range(0, row_tiles, group)
        for deep in depths
        for _ in range(min(group, row_tiles - first))
    ]
    return Tiles(
        [2 * block_m * block_n * deep for deep in ordered],
        resident=1 if block_m * block_n > 128 * 128 else 2,
        size=block_m * block_n,
        traffic=sum((block_m + block_n) * deep for deep in ordered),
    )
