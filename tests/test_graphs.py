"""What a CUDA graph is refused for, without a GPU, and the compiler's mode that records them."""

import numpy as np
import pytest
import torch
from helpers import features, make, rms_error
from torch._subclasses.fake_tensor import FakeTensorMode

from visproj import LinearProjector, fold, graphed
from visproj.folding.graphs import Graphed


@pytest.fixture
def projector():
    return LinearProjector(32, 64)


@pytest.fixture
def on_a_gpu():
    """An example on a device that need not be there."""
    with FakeTensorMode():
        return torch.empty(1, 5, 32, device="cuda")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_example_elsewhere(projector, device):
    with pytest.raises(ValueError, match=f"needs a CUDA device, got an example on {device}"):
        graphed(projector, torch.zeros(1, 5, 32, device=device))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (None, "example must be a tensor, got NoneType"),
        (np.zeros((1, 5, 32)), "example must be a tensor, got ndarray"),
        (torch.zeros(1, 5, 32, dtype=torch.long), "example must be floating point"),
    ],
    ids=["None", "ndarray", "int64"],
)
def test_an_example_of_another_type(projector, example, message):
    with pytest.raises(TypeError, match=message):
        graphed(projector, example)


@pytest.mark.parametrize("module", [None, torch.relu, "perceiver"], ids=["None", "function", "str"])
def test_no_module(module):
    with pytest.raises(TypeError, match=r"graphed takes an nn\.Module, got "):
        graphed(module, torch.zeros(1, 5, 32))


def test_a_module_elsewhere(projector, on_a_gpu):
    message = r"0.weight and example must be on one device, got cpu and cuda"
    with pytest.raises(ValueError, match=message):
        graphed(projector, on_a_gpu)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (None, TypeError, "features must be a tensor, got NoneType"),
        (torch.zeros(1, 5, 31), ValueError, r"recorded for \[1, 5, 32\] .*, got \[1, 5, 31\]"),
        (torch.zeros(1, 5, 32).half(), ValueError, "in torch.float32 on cpu, got .*torch.float16"),
        (torch.zeros(1, 5, 32, device="meta"), ValueError, "on cpu, got .* on meta"),
    ],
    ids=["None", "shape", "dtype", "device"],
)
def test_calls_unlike_the_example(x, error, message):
    graph = Graphed.__new__(Graphed)
    graph.features = torch.zeros(1, 5, 32)
    with pytest.raises(error, match=message):
        graph(x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["baseline", "vit", "perceiver"])
@torch.no_grad()
def test_inductor_compiles_it_for_small_batches(kind, device):
    """On a GPU as CUDA graphs; elsewhere this mode is inductor alone."""
    folded = fold(make(kind, dtype=torch.float32).to(device))
    x = features(1, 257, dtype=torch.float32).to(device)
    compiled = torch.compile(folded, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):  # a graph is recorded in the second call, and replayed in the third
        assert rms_error(compiled(x), folded(x)) < 1e-6
