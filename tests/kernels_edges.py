"""Compile every kernel where a dimension is 1, which Triton makes a constant.

``python kernels_edges.py`` prints one line for every launch that does not compile. The interpreter
does not specialise constants.
"""

import itertools
from unittest import mock

from triton.backends.compiler import GPUTarget

from benchmarks import codegen
from visproj.kernels import configs, registry
from visproj.kernels.launch import Config
from visproj.kernels.layout import describable

# images, length, inputs, outputs; queries, heads, width; whether images share the queries
SIZES = [
    registry.Sizes(*sizes)
    for sizes in (
        (1, 1, 8, 8, 1, 1, 1, True),
        (1, 1, 1, 1, 1, 1, 8, False),
        (3, 1, 16, 16, 5, 2, 16, True),
        (1, 5, 16, 1, 1, 2, 16, False),
        (2, 5, 1, 16, 1, 1, 16, True),
        (1, 1, 16, 24, 5, 1, 32, False),
        (2, 7, 24, 40, 5, 1, 32, False),
        (2, 7, 24, 40, 5, 1, 32, True),
    )
]
STYLES = [(80, False), (90, False), (90, True)]


def launches():
    """What is tried: the name of an example, its sizes, the architecture and the style."""
    return [
        (name, sizes, arch, style)
        for (arch, style), name, sizes in itertools.product(STYLES, registry.load(), SIZES)
    ]


def complaint(name, sizes, arch, style):
    """Compile one launch; what went wrong, if anything did."""

    def candidates(kernel, operands, precision):
        blocks = (64,) * (2 if "attention" in kernel else 3)
        return (Config(blocks, 4, 2, style and describable(*operands)),)

    only = mock.patch.object(configs, "candidates", candidates)
    try:
        with codegen.compiling_for(GPUTarget("cuda", arch, 32)), only:
            registry.EXAMPLES[name].call(sizes)
    except RuntimeError as error:
        return f"sm_{arch} {name} {sizes} {str(error)[:300]}"
    return None


def main():
    tried = launches()
    for found in filter(None, itertools.starmap(complaint, tried)):
        print(found)
    print(f"{len(tried)} launches tried")


if __name__ == "__main__":
    main()
