"""Every registered example in the sanitizer; their values are checked in test_kernels.py."""

import dataclasses

import pytest
import torch

from visproj.kernels import configs, registry
from visproj.kernels.launch import Config
from visproj.kernels.layout import describable

pytestmark = pytest.mark.sanitizer

RAGGED = registry.Sizes(2, 37, 72, 104, queries=21, heads=2, width=40)


def random(*shape, dtype):
    """Positive numbers: a deviation or a sum of squares cannot be anything else."""
    return torch.rand(*shape, device="cuda").to(dtype) + 0.5


def cases():
    return list(registry.load())


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("name", cases())
def test_example(name, descriptors, monkeypatch):
    def candidates(kernel, operands, precision):
        blocks = (16, 32) if "attention" in kernel else (16, 32, 32)
        return (Config(blocks, 4, 2, descriptors and describable(*operands)),)

    monkeypatch.setattr(configs, "candidates", candidates)
    registry.EXAMPLES[name].call(dataclasses.replace(RAGGED, make=random))
