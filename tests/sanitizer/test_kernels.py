"""Every kernel in the sanitizer, over dtypes, styles, ragged shapes and strided inputs.

Values are compared as well: the sanitizer does not see a mask that hides what should be read.
"""

import math

import pytest
import torch
from sanitizer.unwritten import guarded, intact

from visproj.kernels import configs, layer_norm, linear
from visproj.kernels.cross_attention import cross_attention_fwd
from visproj.kernels.cross_attention_backward import cross_attention_bwd
from visproj.kernels.launch import Config
from visproj.kernels.layout import describable
from visproj.kernels.linear_backward import linear_bwd_weight

pytestmark = pytest.mark.sanitizer

# Of the largest element: a few roundings of the result, and as many of the accumulated products.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype)[6:])
STYLES = pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])


@pytest.fixture
def tiles(monkeypatch):
    """Force small tiles, so that small shapes have edges."""

    def force(*blocks, descriptors):
        def candidates(kernel, operands, precision):
            return (Config(blocks, 4, 2, descriptors and describable(*operands)),)

        monkeypatch.setattr(configs, "candidates", candidates)

    return force


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


def check(got, truth, dtype):
    error = (got.double() - truth.double()).abs().max() / truth.double().abs().max()
    assert error < TOLERANCES[dtype]


def aligned_gap(dtype):
    """Elements between rows that keep them 16-byte aligned, so that descriptors are possible."""
    return 16 // dtype.itemsize


@STYLES
@DTYPES
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("epilogue", ["none", "folded", "squares"])
def test_linear(tiles, descriptors, dtype, images, epilogue):
    tiles(16, 32, 32, descriptors=descriptors)
    length, K, N, columns = 37, 72, 104, 64
    x = guarded(random(images, length + 1, K, dtype=dtype), between=aligned_gap(dtype))[:, 1:]
    weight = guarded(random(N, K, dtype=dtype), between=aligned_gap(dtype))
    truth = x.double() @ weight.double().T
    terms = {}
    if epilogue == "folded":
        squares, bias = random(3, images * length).square(), random(N, dtype=dtype)
        shift, table = random(N, dtype=dtype), random(length, columns, dtype=dtype)
        terms = {"squares": squares, "eps": 0.5, "bias": bias, "shift": shift, "table": table}
        rstd = (squares.double().sum(0) + 0.5).rsqrt().view(images, length, 1)
        truth = rstd * (truth + bias.double()) + shift.double()
        truth[..., :columns] += table.double()
    if epilogue == "squares":
        weight = weight.triu()
        truth = x.double() @ weight.double().T
        squares = linear.row_squares_fwd(x, weight, None)
        check(squares.sum(0), truth.square().sum(-1).flatten(), dtype)
    else:
        check(linear.linear_fwd(x, weight, linear.Epilogue(**terms)), truth, dtype)


@STYLES
@DTYPES
def test_linear_bwd_weight(tiles, descriptors, dtype):
    tiles(32, 32, 16, descriptors=descriptors)
    rows, K, N = 74, 72, 104
    grad, y = random(rows, N, dtype=dtype), random(rows, K, dtype=dtype)
    mean, rstd = random(rows), random(rows).abs()
    gain, shift = random(K, dtype=dtype), random(K, dtype=dtype)
    normal = (y.double() - mean.double()[:, None]) * rstd.double()[:, None]
    normal = normal * gain.double() + shift.double()
    dweight, dbias = grad.new_empty(N, K), grad.new_empty(N)
    linear_bwd_weight(grad, y, mean, rstd, gain, shift, 1e-12, dweight, dbias)
    check(dweight, grad.double().T @ normal, dtype)
    check(dbias, grad.double().sum(0), dtype)


@DTYPES
@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize("width", [1, 128, 200, 8200])
def test_layer_norm(dtype, width, in_place):
    rows = 37
    x, grad = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype)
    gain, shift = random(width, dtype=dtype), random(width, dtype=dtype)
    leaves = [t.double().requires_grad_() for t in (x, gain, shift)]
    truth = torch.nn.functional.layer_norm(leaves[0], (width,), *leaves[1:], 1e-5)
    gradients = torch.autograd.grad(truth, leaves, grad.double())
    gradients = *gradients, gradients[0].sum(0)
    y = x.clone()
    out, mean, rstd = layer_norm.layer_norm_fwd(
        y, gain, shift, 1e-5, out_dtype=dtype, in_place=in_place, statistics=True
    )
    check(out, truth.detach(), dtype)
    got = layer_norm.layer_norm_bwd(grad, x, mean, rstd, gain, in_place=in_place)
    for mine, theirs in zip(got, gradients, strict=True):
        if width > 1:  # else x does not matter, and its gradient is rounding
            check(mine, theirs, dtype)


@STYLES
@DTYPES
@pytest.mark.parametrize("shared", [True, False], ids=["shared q", "batched q"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("width", [32, 40])
def test_cross_attention(tiles, descriptors, dtype, shared, masked, width):
    tiles(16, 32, descriptors=descriptors)
    batch, queries, heads, keys = 2, 21, 2, 37
    q = random(*([] if shared else [batch]), queries, heads, width, dtype=dtype)
    k, v = random(batch, keys, 2, heads, width, dtype=dtype).unbind(2)
    added = torch.zeros(batch, heads, queries, keys, dtype=torch.float64, device="cuda")
    mask = None
    if masked:
        closed = torch.rand(added.shape, device="cuda") < 0.3
        added = random(*added.shape).double().masked_fill(closed, -math.inf)
        added[..., 0] = 0.0
        mask = torch.nn.functional.pad(added.float(), (0, 128 - keys), value=-math.inf)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    by_image = leaves[0].expand(batch, queries, heads, width)
    scores = torch.einsum("bqhd,blhd->bhql", by_image, leaves[1]) / math.sqrt(width) + added
    truth = torch.einsum("bhql,blhd->bqhd", scores.softmax(-1), leaves[2])

    out, statistics = cross_attention_fwd(q, k, v, mask, statistics=True)
    check(out, truth.detach(), dtype)
    dout = random(*truth.shape, dtype=dtype)
    dk, dv = (guarded(torch.zeros_like(k), between=0) for _ in range(2))
    dq = cross_attention_bwd(dout, q, k, v, mask, out, statistics, dk, dv)
    assert intact(dk)
    assert intact(dv)
    gradients = torch.autograd.grad(truth, leaves, dout.double())
    for mine, theirs in zip((dq, dk, dv), gradients, strict=True):
        check(mine, theirs, dtype)


@STYLES
@DTYPES
@pytest.mark.parametrize("width", [32, 40])
def test_packed_cross_attention(tiles, descriptors, dtype, width):
    """Images of 37, 1, 64 and 50 keys: tails, a single key, and whole tiles."""
    tiles(16, 32, descriptors=descriptors)
    lengths, queries, heads = [37, 1, 64, 50], 21, 2
    starts = torch.tensor(lengths, device="cuda").cumsum(0)
    starts = torch.nn.functional.pad(starts, (1, 0)).to(torch.int32)
    q = random(queries, heads, width, dtype=dtype)
    k, v = random(1, sum(lengths), 2, heads, width, dtype=dtype).unbind(2)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    truth = []
    for keys, values in zip(*(t[0].split(lengths) for t in leaves[1:]), strict=True):
        scores = torch.einsum("qhd,lhd->hql", leaves[0], keys) / math.sqrt(width)
        truth.append(torch.einsum("hql,lhd->qhd", scores.softmax(-1), values))
    truth = torch.stack(truth)

    out, statistics = cross_attention_fwd(q, k, v, None, starts, statistics=True)
    check(out, truth.detach(), dtype)
    dout = random(*truth.shape, dtype=dtype)
    dk, dv = (guarded(torch.zeros_like(k), between=0) for _ in range(2))
    longest = max(lengths)
    dq = cross_attention_bwd(dout, q, k, v, None, out, statistics, dk, dv, starts, longest)
    assert intact(dk)
    assert intact(dv)
    gradients = torch.autograd.grad(truth, leaves, dout.double())
    for mine, theirs in zip((dq, dk, dv), gradients, strict=True):
        check(mine, theirs, dtype)
