"""Attention over packed keys through its kernels: each image as by itself, and no other's keys."""

import math

import pytest
import torch
from kernels_support import DTYPES, STYLES, cases, random

from visproj.ops import cross_attention, packed_cross_attention

pytest.importorskip("triton", reason="kernels need triton")

pytestmark = pytest.mark.usefixtures("unwritten")

LENGTHS = [45, 1, 32, 65, 31]  # a tile of 32 keys: more, one key, itself, several, less
Q, H = 21, 2


def operands(dtype, device, width=24):
    q = random(Q, H, width, dtype=dtype, device=device)
    kv = random(sum(LENGTHS), 2, H, width, dtype=dtype, device=device)
    return [t.requires_grad_() for t in (q, kv)]


def packed(q, kv):
    return packed_cross_attention(q, kv, lengths=LENGTHS, backend="triton")


def separately(q, kv):
    """One call per image."""
    images = kv.split(LENGTHS)
    return torch.cat([cross_attention(q, image[None], backend="triton") for image in images])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", cases(["fp32", "bf16"], ["fp16"]))
def test_equal_to_each_image_by_itself(style, dtype, tiles, device):
    """To the bit, with one configuration; the queries' gradient is summed in another order.

    A GPU runs two programs, in which the compiler fuses other products with the sums they go to.
    """
    styles = tiles(style)
    q, kv = operands(DTYPES[dtype], device)
    got, wanted = packed(q, kv), separately(q, kv)
    fused = dtype == "fp32" and device.type == "cuda"

    def equal(a, b):
        # A rounding in each of some 8 rescalings and sums over tiles of keys.
        if fused:
            return (a - b).abs().max() <= 8 * torch.finfo(a.dtype).eps * b.abs().max()
        return torch.equal(a, b)

    assert equal(got, wanted)
    upstream = random(*got.shape, dtype=DTYPES[dtype], device=device)
    mine, theirs = (torch.autograd.grad(out, (q, kv), upstream) for out in (got, wanted))
    assert equal(mine[1], theirs[1])
    # Five gradients, each of them rounded before they are added.
    bound = 5 * torch.finfo(DTYPES[dtype]).eps
    largest = sum(t.abs().max() for t in theirs[:1])
    assert (mine[0] - theirs[0]).abs().max() <= bound * largest
    assert style in styles


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("width", [8, 40, 64])
@pytest.mark.parametrize("dtype", cases(["fp32"], ["bf16"]))
def test_against_fp64(style, width, dtype, tiles, device):
    tiles(style)
    tensors = operands(DTYPES[dtype], device, width)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = packed_cross_attention(*exact, lengths=LENGTHS, backend="torch")
    got = packed(*tensors)
    upstream = random(*got.shape, dtype=DTYPES[dtype], device=device)
    pairs = [(got, truth)]
    pairs += zip(
        torch.autograd.grad(got, tensors, upstream),
        torch.autograd.grad(truth, exact, upstream.double()),
        strict=True,
    )
    for mine, true in pairs:
        # A few roundings of each number, against the largest.
        bound = 16 * torch.finfo(DTYPES[dtype]).eps * true.abs().max()
        assert (mine - true).abs().max() <= bound


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("image", [0, 2, 4])
def test_nothing_of_another_image(style, image, tiles, device):
    """NaN in the keys and values of one image stays there, forward and backward."""
    tiles(style)
    q, kv = operands(torch.float32, device)
    with torch.no_grad():
        kv.split(LENGTHS)[image].fill_(math.nan)
    out = packed(q, kv)
    clean = [i for i in range(len(LENGTHS)) if i != image]
    assert out[image].isnan().all()
    assert out[clean].isfinite().all()
    (gradient,) = torch.autograd.grad(out[clean].sum(), kv)
    parts = gradient.split(LENGTHS)
    assert all(parts[i].isfinite().all() for i in clean)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_padded_with_a_mask_agrees(dtype, tiles, device):
    """To roundings of the probabilities and of the result, of which each has one more."""
    tiles()
    q, kv = (t.detach() for t in operands(DTYPES[dtype], device))
    padded = torch.nn.utils.rnn.pad_sequence(kv.split(LENGTHS), batch_first=True)
    lengths = torch.tensor(LENGTHS, device=device)
    padding = torch.arange(padded.shape[1], device=device) >= lengths[:, None]
    wanted = cross_attention(q, padded, key_padding_mask=padding, backend="triton")
    bound = 4 * torch.finfo(DTYPES[dtype]).eps * wanted.abs().max()
    assert (packed(q, kv) - wanted).abs().max() <= bound


def test_one_image(tiles, device):
    tiles()
    q, kv = operands(torch.float32, device)
    got = packed_cross_attention(q, kv, lengths=[len(kv)], backend="triton")
    assert torch.equal(got, cross_attention(q, kv[None], backend="triton"))


def test_keys_and_values_apart(tiles, device):
    tiles()
    q, kv = operands(torch.float32, device)
    keys, values = (t.detach().clone().requires_grad_() for t in kv.unbind(1))
    got = packed_cross_attention(q, keys, values, lengths=LENGTHS, backend="triton")
    assert torch.equal(got, packed(q, kv))
    gradients = torch.autograd.grad(got.square().sum(), (keys, values))
    (joint,) = torch.autograd.grad(packed(q, kv).square().sum(), kv)
    assert torch.equal(torch.stack(gradients, 1), joint)
