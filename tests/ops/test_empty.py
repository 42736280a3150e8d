"""Sizes of zero: the results that follow from the formulas, with gradients of the right shape."""

import pytest
import torch

from visproj import ops

BACKENDS = ["torch", "triton"]


def leaf(*shape, device):
    return torch.randn(shape, device=device, requires_grad=True)


def check(out, shape, leaves):
    assert out.shape == shape
    assert out.isfinite().all()
    out.sum().backward()
    for tensor in leaves:
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        assert tensor.grad.isfinite().all()
        if not out.numel():
            assert not tensor.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [4, 0])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 3, 5), (3, 0), (0,), (0, 0)], ids=str)
def test_linear_layer_norm(shape, D, backend, device):
    x, weight = leaf(*shape, device=device), leaf(D, shape[-1], device=device)
    vectors = [leaf(D, device=device) for _ in range(3)]
    out = ops.linear_layer_norm(x, weight, *vectors, backend=backend)
    check(out, (*shape[:-1], D), [x, weight, *vectors])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positioned", [None, 0, 3])
@pytest.mark.parametrize(
    ("B", "L", "C", "D", "N"),
    [(0, 3, 5, 4, 6), (2, 0, 5, 4, 6), (2, 3, 0, 4, 6), (2, 3, 5, 0, 6), (2, 3, 5, 4, 0), (0,) * 5],
)
def test_linear_norm_linear(B, L, C, D, N, positioned, backend, device):
    x, weight = leaf(B, L, C, device=device), leaf(D, C, device=device)
    vectors = [leaf(D, device=device) for _ in range(3)]
    last = [leaf(N, D, device=device), leaf(N, device=device)]
    positions = None if positioned is None else leaf(L, D, device=device)
    out = ops.linear_norm_linear(
        x, weight, *vectors, 1e-5, *last,
        positions=positions, positioned=min(N, positioned or 0), backend=backend,
    )  # fmt: skip
    check(out, (B, L, N), [x, weight, *vectors, *last] + ([] if positions is None else [positions]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", [None, "bool", "per head", "padding"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("B", "Q", "L", "H", "d"),
    [(0, 2, 3, 2, 8), (2, 0, 3, 2, 8), (2, 2, 0, 2, 8), (2, 2, 3, 0, 8), (2, 2, 3, 2, 0), (0,) * 5],
)
def test_cross_attention(B, Q, L, H, d, shared, packed, mask, backend, device):
    q = leaf(*(() if shared else (B,)), Q, H, d, device=device)
    kv = [leaf(B, L, 2, H, d, device=device)] if packed else leaves(2, (B, L, H, d), device)
    masks = {
        None: {},
        "bool": {"attn_mask": torch.zeros(Q, L, dtype=torch.bool, device=device)},
        "per head": {"attn_mask": torch.zeros(B * H, Q, L, device=device)},
        "padding": {"key_padding_mask": torch.zeros(B, L, dtype=torch.bool, device=device)},
    }[mask]
    out = ops.cross_attention(q, *kv, backend=backend, **masks)
    check(out, (B, Q, H, d), [q, *kv])
    keys = kv[0][:, :, 0] if packed else kv[0]
    if d:
        maps = ops.cross_attention_maps(q, keys, **masks)
        assert maps.shape == (B, H, Q, L)
        assert maps.isfinite().all()
    else:
        with pytest.raises(ValueError, match="head width of 0"):
            ops.cross_attention_maps(q, keys, **masks)


def leaves(count, shape, device):
    return [leaf(*shape, device=device) for _ in range(count)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [None, 0, 2])
@pytest.mark.parametrize(
    ("shape", "N", "R"),
    [
        ((0, 3, 5), 4, 5), ((2, 0, 5), 4, 5), ((2, 3, 0), 4, 0), ((2, 3, 5), 2, 0),
        ((2, 3, 5), 0, 5), ((0, 5), 4, 5), ((2, 0, 3, 5), 4, 5),
    ],
    ids=str,
)  # fmt: skip
def test_folded_linear(shape, N, R, columns, backend, device):
    *lead, L, C = shape
    made = [(N, C), (N,), (R, C), (R,), (N,)]
    weight, bias, stats, stats_bias, shift = (torch.randn(s, device=device) for s in made)
    table = None if columns is None else torch.randn(L, min(columns, N), device=device)
    x = torch.randn(shape, device=device)
    out = ops.folded_linear(
        x, weight, bias, stats.triu(), stats_bias, shift, table, eps=1e-5, backend=backend
    )
    assert out.shape == (*lead, L, N)
    assert out.isfinite().all()
