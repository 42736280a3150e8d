"""Launch every kernel twice, the second time as it was planned, and compare what the driver gets.

``python tests/kernels_plans.py`` compiles for an H100 that need not be there and prints one line
for every launch whose second start differs from its first, which went through Triton's binder.
"""

import itertools
import os
import sys
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(Path(__file__).parents[1]))

from torch import Tensor
from triton.runtime import _allocation

from benchmarks.host_cost import launching_nowhere
from visproj.kernels import configs, plans, registry
from visproj.kernels.launch import Config
from visproj.kernels.layout import describable

SIZES = [
    registry.Sizes(2, 33, 40, 72, 17, 2, 32, shared=True),
    registry.Sizes(1, 16, 16, 16, 16, 1, 16, shared=False),
]


launches = []


def launched(rows, columns, layers, stream, function, metadata, about, enter, leave, *given):
    """Note what the driver gets, and whether the kernel could allocate."""
    found = [(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in given]
    allocates = not isinstance(_allocation._allocator.get(), _allocation.NullAllocator)
    launches.append(((rows, columns, layers), function, metadata, found, allocates))


def difference(name, sizes, descriptors):
    """What the second of two calls launches differently from the first, if anything."""

    def candidates(kernel, operands, precision):
        blocks = (32,) * (2 if "attention" in kernel else 3)
        return (Config(blocks, 4, 2, descriptors and describable(*operands)),)

    launches.clear()
    plans._plans.clear()
    with mock.patch.object(configs, "candidates", candidates):
        for _ in range(2):
            registry.EXAMPLES[name].call(sizes)
    first, second = launches[: len(launches) // 2], launches[len(launches) // 2 :]
    if not first or not plans._plans:
        return f"{name} {sizes}: launched {len(launches)} kernels by {len(plans._plans)} plans"
    return None if first == second else f"{name} {sizes}: {first}, then {second}"


def main():
    tried = list(itertools.product(registry.load(), SIZES, (False, True)))
    with launching_nowhere(launched):
        for found in filter(None, itertools.starmap(difference, tried)):
            print(found)
    print(f"{len(tried)} pairs of calls", file=sys.stderr)


if __name__ == "__main__":
    main()
