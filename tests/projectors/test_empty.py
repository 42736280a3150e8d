"""Batches without an image: empty results of the right shape, and gradients of zero."""

import pytest
import torch
from helpers import make
from torch import nn

from visproj import fold, use_backend

KINDS = ["baseline", "vit", "perceiver"]
BACKENDS = ["torch", "triton"]
LEADS = [(0,), (2, 0), (0, 3), (2, 0, 3)]
GRID, QUERIES, HEADS, WIDTH, LANG = (2, 3), 4, 2, 32, 64
KEYS = 6


class Adapted(nn.MultiheadAttention):
    """Any other class: it is called instead of being read."""


def small(kind, attention=None, device="cpu"):
    options = {"query_grid": (2, 2), "num_heads": HEADS} if kind == "perceiver" else {}
    projector = make(kind, LANG, torch.float32, device, **options)
    if attention is not None:
        projector.attn = attention.to(device)
    return projector


def inputs(lead, device, tokens=1 + KEYS):
    return torch.randn(*lead, tokens, WIDTH, device=device, requires_grad=True)


def options_of(kind):
    return {"grid": GRID} if kind == "perceiver" else {}


def wanted_shape(kind, lead):
    return (*lead, QUERIES if kind == "perceiver" else 1 + KEYS, LANG)


def check_gradients(projector, x):
    named = [("x", x), *projector.named_parameters()]
    for name, tensor in named:
        if tensor.requires_grad:
            assert tensor.grad is not None, name
            assert tensor.grad.shape == tensor.shape, name
            assert not tensor.grad.any(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward(kind, lead, backend, device):
    projector, x = small(kind, device=device), inputs(lead, device)
    with use_backend(backend):
        out = projector(x, **options_of(kind))
    assert out.shape == wanted_shape(kind, lead)
    assert (out.dtype, out.device) == (x.dtype, x.device)
    out.sum().backward()
    check_gradients(projector, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind, backend, device):
    """A product of no rows; attention over no keys is refused."""
    projector, x = small(kind, device=device), inputs((2,), device, tokens=0)
    with use_backend(backend):
        if kind == "perceiver":
            for tokens in (x, inputs((2,), device, tokens=1)):
                with pytest.raises(ValueError, match=r"0 visual tokens \(CLS removed\)"):
                    projector(tokens)
            return
        out = projector(x)
    assert out.shape == (2, 0, LANG)
    out.sum().backward()
    check_gradients(projector, x)


def masks(lead, device):
    batch = torch.Size(lead).numel()
    return {
        "shared": {"attn_mask": torch.zeros(QUERIES, KEYS, dtype=torch.bool, device=device)},
        "per head": {"attn_mask": torch.zeros(batch * HEADS, QUERIES, KEYS, device=device)},
        "padding": {
            "key_padding_mask": torch.zeros(*lead, KEYS, dtype=torch.bool, device=device),
            "attn_mask": torch.zeros(QUERIES, KEYS, device=device),
        },
    }


@pytest.mark.parametrize("attention", [None, *(False, True)], ids=["own", "called", "batch first"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", ["shared", "per head", "padding"])
def test_masks_and_maps(mask, backend, attention, device):
    if attention is not None:
        attention = Adapted(LANG, HEADS, batch_first=attention)
    projector = small("perceiver", attention, device)
    for lead in ((0,), (2, 0)):
        x = inputs(lead, device)
        options = options_of("perceiver") | masks(lead, device)[mask]
        with use_backend(backend):
            out, maps = projector(x, return_attention=True, **options)
        assert out.shape == wanted_shape("perceiver", lead)
        assert maps.shape == (*lead, HEADS, QUERIES, KEYS)
        out.sum().backward()
        check_gradients(projector, x)


@pytest.mark.parametrize("shape", [(3, 5), (1, 5)], ids=str)
def test_masks_are_checked_without_an_image(shape, device):
    projector = small("perceiver", Adapted(LANG, HEADS), device)
    with pytest.raises(ValueError, match=r"attn_mask must be \[Q, L\] = \[4, 6\]"):
        projector(inputs((0,), device), torch.zeros(shape, device=device), grid=GRID)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_folded(kind, backend, device):
    folded = fold(small(kind, device=device), **options_of(kind))
    for lead in LEADS:
        x = inputs(lead, device).detach()
        with use_backend(backend):
            out = folded(x, **options_of(kind))
            assert out.shape == wanted_shape(kind, lead)
            if kind == "perceiver":
                maps = folded(x, return_attention=True, **options_of(kind))[1]
                assert maps.shape == (*lead, HEADS, QUERIES, KEYS)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_gives_the_dtype_of_a_full_batch(kind, device):
    projector = small(kind, device=device)
    for backend in BACKENDS:
        with use_backend(backend), torch.autocast(device.type, torch.bfloat16), torch.no_grad():
            dtypes = {projector(inputs((n,), device), **options_of(kind)).dtype for n in (0, 1)}
        assert len(dtypes) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind, backend, device):
    torch.compiler.reset()
    projector, x = small(kind, device=device), inputs((0,), device)
    compiled = torch.compile(projector, backend="aot_eager", fullgraph=True)
    with use_backend(backend):
        out = compiled(x, **options_of(kind))
    assert out.shape == wanted_shape(kind, (0,))
    out.sum().backward()
    check_gradients(projector, x)
