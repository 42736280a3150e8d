"""The machine's peak rates, measured: bytes/s by working set, FLOP/s by dtype.

A floor that is computed from these rates is a lower bound only if nothing runs faster. So each rate
is the best of several methods and of all measurements so far. It is measured again next to whatever
it is compared with, because a CPU is shared and its fastest minute may come late.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, Shape
from benchmarks.measure import Call, paired_samples
from benchmarks.model import Cost

KIB = 2**10
SMALLEST = 64 * KIB
LARGEST = {"cpu": 2**28, "cuda": 2**31}
SQUARES = {"cpu": (512, 1024), "cuda": (4096, 8192)}
# A matmul of more rows does not reach a higher rate, and takes longer.
MOST_ROWS = {"cpu": 1024, "cuda": 8192}
ROUNDS = 5

# Rows, depth and columns of a matrix product.
Product = tuple[int, int, int]


@dataclass
class Ceilings:
    """The best rates seen so far.

    Attributes:
        device: Where they were measured.
        memory: Memory rates, bytes/s, by size of the working set in bytes, a power of two.
        matmul: Rates of matmuls, FLOP/s, by dtype.
    """

    device: torch.device
    memory: dict[int, float] = field(default_factory=dict)
    matmul: dict[str, float] = field(default_factory=dict)
    _seen: set[tuple[str, Product]] = field(default_factory=set)

    def measure(self, dtypes: Iterable[str]) -> None:
        """Measure every size of working set, and square matmuls of each dtype."""
        self._observe_memory(_powers_of_two(SMALLEST, LARGEST[self.device.type]))
        for dtype in dtypes:
            self._observe_products(dtype, [(n, n, n) for n in SQUARES[self.device.type]])

    def observe(self, shape: Shape, working_sets: Iterable[int]) -> None:
        """Measure again, at the sizes of a group.

        Args:
            shape: Shape of the group, for the dtype and sizes of the matmuls.
            working_sets: Bytes that the group's implementations read and write.
        """
        self._observe_memory({self._size(nbytes) for nbytes in working_sets})
        rows = min(shape.batch * shape.encoder.tokens, MOST_ROWS[self.device.type])
        width, lang_dim = shape.encoder.width, shape.lang_dim
        ahead = [(rows, width, lang_dim), (rows, lang_dim, lang_dim)]
        self._observe_products(shape.dtype, [*ahead, (lang_dim, rows, width)])

    def bandwidth(self, nbytes: int) -> float:
        """Return the best rate at a working set of ``nbytes`` or more, bytes/s.

        A smaller working set may fit in a cache that this one does not fit in. A larger one is not
        faster, but may have been measured at a better moment.
        """
        size = self._size(nbytes)
        return max(rate for other, rate in self.memory.items() if other >= size)

    def floor_seconds(self, cost: Cost, dtype: str) -> float:
        """Return the lower bound on the time of a call of that cost, s, at these rates."""
        return cost.floor_seconds(self.matmul[dtype], self.bandwidth(cost.min_bytes))

    def notes(self) -> dict[str, str]:
        """Return the notes for a report."""
        sizes = sorted(self.memory)
        rates = [f"{_bytes_text(n)} {self.bandwidth(n) / 1e9:.1f} GB/s" for n in sizes]
        products = [f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in self.matmul.items()]
        return {"best memory": ", ".join(rates), "best matmul": ", ".join(products)}

    def _size(self, nbytes: int) -> int:
        """Return the power of two at or below ``nbytes``, within the measured sizes."""
        size = 2 ** max(0, nbytes.bit_length() - 1)
        return min(max(size, SMALLEST), LARGEST[self.device.type])

    def _observe_memory(self, sizes: Iterable[int]) -> None:
        for size in sizes:
            if self._is_settled("memory", (size, 0, 0)):
                continue
            a, b = (torch.ones(size // 8, device=self.device) for _ in range(2))
            rate = max(
                moved / seconds
                for moved, seconds in zip(
                    (size, size, size + size // 2), self._best(_memory_calls(a, b)), strict=True
                )
            )
            self.memory[size] = max(rate, self.memory.get(size, 0.0))

    def _observe_products(self, dtype: str, products: Iterable[Product]) -> None:
        for rows, depth, columns in products:
            if self._is_settled(dtype, (rows, depth, columns)):
                continue
            a, b = (
                torch.randn(count, depth, device=self.device).to(DTYPES[dtype])
                for count in (rows, columns)
            )
            (seconds,) = self._best({"product": _product(a, b)})
            rate = 2 * rows * depth * columns / seconds
            self.matmul[dtype] = max(rate, self.matmul.get(dtype, 0.0))

    def _is_settled(self, kind: str, sizes: Product) -> bool:
        """Return whether it was measured and will not change: a GPU is not shared."""
        seen = (kind, sizes) in self._seen
        self._seen.add((kind, sizes))
        return seen and self.device.type == "cuda"

    def _best(self, calls: Mapping[str, Call]) -> list[float]:
        samples = paired_samples(calls, self.device, seconds=0, min_rounds=ROUNDS)
        return [min(values) for values in samples.values()]


def _memory_calls(a: Tensor, b: Tensor) -> dict[str, Call]:
    """Return three calls: read one and write the other; read both; read both and write one."""
    return {
        "copy": lambda _: b.copy_(a),
        "dot": lambda _: torch.dot(a, b),
        "multiply": lambda _: a.mul_(b),
    }


def _product(a: Tensor, b: Tensor) -> Call:
    return lambda _: a @ b.T


def _powers_of_two(first: int, last: int) -> list[int]:
    return [2**k for k in range(first.bit_length() - 1, last.bit_length())]


def _bytes_text(size: int) -> str:
    return f"{size // KIB} KiB" if size < 2**20 else f"{size // 2**20} MiB"
