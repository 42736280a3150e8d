"""Outputs that are views make FSDP2 warn: none of ours where no copy is saved by it."""

import pytest
import torch
from helpers import make
from torch import nn

from visproj import use_backend

X = torch.zeros(2, 5, 32)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["baseline", "vit", "perceiver"])
def test_a_batch_gives_no_view(kind, backend, device):
    """Of a Perceiver in plain PyTorch only where the result of its last Linear is one."""
    options = {"query_grid": (2, 2), "num_heads": 2} if kind == "perceiver" else {}
    projector = make(kind, 64, torch.float32, device, **options)
    with use_backend(backend):
        out = projector(X.to(device))
    assert out.requires_grad
    if (kind, backend) == ("perceiver", "torch"):
        assert out.grad_fn.name() == nn.Linear(32, 64).to(device)(X.to(device)).grad_fn.name()
    else:
        assert out._base is None


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_maps_are_no_view(backend, device):
    projector = make("perceiver", 64, torch.float32, device, query_grid=(2, 2), num_heads=2)
    with use_backend(backend):
        maps = projector(X.to(device), return_attention=True)[1]
    assert maps.requires_grad
    assert maps._base is None


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_leading_dimensions_come_back(lead, device):
    projector = make("perceiver", 64, torch.float32, device, query_grid=(2, 2), num_heads=2)
    out, maps = projector(torch.randn(*lead, 5, 32, device=device), return_attention=True)
    assert out.shape == (*lead, 4, 64)
    assert maps.shape == (*lead, 2, 4, 4)
