"""The registry of kernels for tools and tests: FLOPs, and example calls.

Each module of this folder registers both after its launchers. Four tools use the registry: cost
counting, reading of compiled code, compilation with dimensions of 1, and the sanitizer. A kernel
that is registered is covered by all four.
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
    """Dimensions of an example, by default a Perceiver's between CLIP-L and a 4096-wide model.

    Attributes:
        images: Number of images, ``B``.
        length: Tokens and keys per image, ``L``.
        inputs: Input width of a matmul, ``K``.
        outputs: Output width of a matmul, ``N``.
        queries: Number of queries, ``Q``.
        heads: Number of heads, ``H``.
        width: Width of a head, ``d``.
        shared: Whether all images share the queries.
        dtype: Dtype of the operands; statistics are fp32.
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
        table: Its row in :mod:`visproj.kernels.configs`; empty for a kernel without one, whose
            launcher chooses the configuration.
        tile: The dimensions of a tile, one letter each, in the order of a configuration's blocks;
            ``d`` is the padded width of a head.
        products: Rows, columns and depth of each matmul in one iteration of its loop.
        descriptors: Number of operands that are read or written through descriptors.
        blocks: Blocks per SM that must fit on sm_90 with its first configuration with descriptors.
        wide_loads: Whether a kernel without a row in the table must load 128 bits at a time.
        compiled: Whether the compiled code of its configurations is checked. If not, it is only
            compiled with dimensions of 1.
        others: Sizes by name at which a kernel without a row in the table compiles differently.
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
        """Return the example with other sizes; multiples of 16 keep the check for wide loads."""
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
    """Register a kernel.

    Args:
        kernel: The function that Triton compiles.
        examples: Examples by name. An example that also exists with a mask or with heads wider than
            128 must have the name of its row in the table of configurations.
        flops: Returns the FLOPs of the matmuls of one launch, from the kernel's arguments by name.
    """
    FLOPS[kernel.__name__] = flops
    EXAMPLES.update(examples)


def load() -> dict[str, Example]:
    """Import every module of kernels and return the examples by name."""
    package = import_module(PACKAGE)
    for module in sorted(iter_modules(package.__path__), key=lambda module: module.name):
        import_module(f"{PACKAGE}.{module.name}")
    return EXAMPLES
