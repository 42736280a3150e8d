"""What tools and tests know of each kernel beside its code: its FLOPs, and examples of its use.

A module of this folder adds both beside its launchers. Counting costs, reading what the compiler
made of a kernel, compiling it where dimensions are 1 and running it in the sanitizer all start
from here, so a kernel that is registered is in all four.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

PACKAGE = "visproj.kernels"


@dataclass(frozen=True)
class Sizes:
    """Dimensions of an example; as they stand, a Perceiver's between CLIP-L and a 4096-wide model.

    Attributes:
        images: ``B``.
        length: Tokens, and keys, per image: ``L``.
        inputs: Width of what a product reads: ``K``.
        outputs: Width of what it writes: ``N``.
        queries: ``Q``.
        heads: ``H``.
        width: Of a head: ``d``.
        shared: Whether all images share the queries.
        dtype: Of operands; statistics are fp32.
        make: Called as ``make(*shape, dtype=)`` for every tensor.
    """

    images: int = 8
    length: int = 256
    inputs: int = 1024
    outputs: int = 4096
    queries: int = 256
    heads: int = 32
    width: int = 128
    shared: bool = True
    dtype: torch.dtype = torch.bfloat16
    make: Callable[..., Tensor] = torch.empty

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor of ``shape``, in the dtype of operands unless another is given."""
        return self.make(*shape, dtype=dtype or self.dtype)

    def statistics(self, *shape: int) -> Tensor:
        """Return an fp32 tensor of ``shape``."""
        return self.tensor(*shape, dtype=torch.float32)

    def features(self) -> Tensor:
        """Return ``[B, L, K]`` without the CLS row that comes before every image."""
        return self.tensor(self.images, self.length + 1, self.inputs)[:, 1:]


@dataclass(frozen=True)
class Example:
    """One use of a launcher.

    Attributes:
        call: Launches the kernel once, as the last launch of the call.
        table: Its row in :mod:`visproj.kernels.configs`; empty if its launcher chooses.
        tile: The dimensions of a tile, a letter each, in the order of a configuration's blocks;
            ``d`` is the padded width of a head.
        products: Rows, columns and depth of the products of one pass through its loop.
        descriptors: How many operands move through descriptors.
        blocks: Blocks per SM that its first choice with descriptors leaves room for on sm_90.
        wide_loads: Whether a kernel that takes no configuration must load 128 bits at a time.
        compiled: Whether its shipped configurations are read; else only its edges are compiled.
        others: Sizes by name at which a kernel that takes no configuration compiles differently.
    """

    call: Callable[[Sizes], object]
    table: str = ""
    tile: str = ""
    products: tuple[str, ...] = ()
    descriptors: int = 0
    blocks: int = 1
    wide_loads: bool = True
    compiled: bool = True
    others: tuple[Mapping[str, int], ...] = ()

    def at(self, sizes: Mapping[str, int]) -> Example:
        """Return the example with some of its sizes replaced; loads are wide at multiples of 16."""
        wide = self.wide_loads and all(n % 16 == 0 for n in sizes.values())
        return replace(
            self, call=lambda s: self.call(replace(s, **sizes)), wide_loads=wide, others=()
        )


FLOPS: dict[str, Callable[[Mapping[str, Any]], int]] = {}
EXAMPLES: dict[str, Example] = {}


def register(
    kernel: Any,
    examples: Mapping[str, Example],
    flops: Callable[[Mapping[str, Any]], int] = lambda arguments: 0,
) -> None:
    """Make a kernel known.

    Args:
        kernel: The function that Triton compiles.
        examples: By name. One whose operands a mask or a head wider than 128 would change has the
            name of its row in the table of configurations.
        flops: Of the matrix products of one launch, from the kernel's arguments by name.
    """
    FLOPS[kernel.__name__] = flops
    EXAMPLES.update(examples)


def load() -> dict[str, Example]:
    """Import every module of kernels and return the examples by name."""
    package = import_module(PACKAGE)
    for module in sorted(iter_modules(package.__path__), key=lambda module: module.name):
        import_module(f"{PACKAGE}.{module.name}")
    return EXAMPLES
