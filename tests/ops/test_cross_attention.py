import math

import pytest
import torch
from helpers import rms_error

from visproj.ops import cross_attention, cross_attention_maps

B, Q, H, L, D = 2, 5, 3, 7, 8


def arguments(batched=False, dtype=torch.float64, device="cpu"):
    q = torch.randn(*([B] if batched else []), Q, H, D, dtype=torch.float64)
    k, v = (torch.randn(B, L, H, D, dtype=torch.float64) for _ in range(2))
    return [t.to(device, dtype) for t in (q, k, v)]


def dense_mask(attn_mask, key_padding_mask):
    """The additive mask of every (b, h, q, l), one element at a time."""
    mask = torch.zeros(B, H, Q, L, dtype=torch.float64)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, (B, H, Q, L))).tolist():
        if attn_mask is not None:
            entry = attn_mask[i, j] if attn_mask.ndim == 2 else attn_mask[b * H + h, i, j]
            if entry.dtype == torch.bool:
                entry = -math.inf if entry else 0.0
            mask[b, h, i, j] += float(entry)
        if key_padding_mask is not None and key_padding_mask[b, j]:
            mask[b, h, i, j] = -math.inf
    return mask


def literal(q, k, v, mask):
    """Softmax attention, one query at a time."""
    out, maps = torch.zeros(B, Q, H, D).double(), torch.zeros(B, H, Q, L).double()
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (B, H, Q))).tolist():
        row = q[b, i, h] if q.ndim == 4 else q[i, h]
        scores = k[b, :, h] @ row / math.sqrt(D) + mask[b, h, i]
        if not scores.isneginf().all():
            maps[b, h, i] = (scores - scores.max()).exp() / (scores - scores.max()).exp().sum()
            out[b, i, h] = maps[b, h, i] @ v[b, :, h]
    return out, maps


def bool_mask(*shape):
    return torch.rand(*shape) < 0.4


def additive_mask(*shape):
    return torch.randn(*shape).double().masked_fill(bool_mask(*shape), -math.inf)


def padding():
    mask = torch.zeros(B, L, dtype=torch.bool)
    mask[0, 5:] = True
    return mask


MASKS = {
    "none": lambda: (None, None),
    "bool": lambda: (bool_mask(Q, L), None),
    "bool per head": lambda: (bool_mask(B * H, Q, L), None),
    "additive": lambda: (additive_mask(Q, L), None),
    "additive per head": lambda: (additive_mask(B * H, Q, L), None),
    "padding": lambda: (None, padding()),
    "bool and padding": lambda: (bool_mask(Q, L), padding()),
    "bool per head and padding": lambda: (bool_mask(B * H, Q, L), padding()),
    "additive and padding": lambda: (additive_mask(Q, L), padding()),
    "additive per head and padding": lambda: (additive_mask(B * H, Q, L), padding()),
    "one query dead": lambda: (bool_mask(Q, L).index_fill(0, torch.tensor([2]), True), None),
    "one query at -inf": lambda: (
        additive_mask(Q, L).index_fill(0, torch.tensor([2]), -math.inf),
        None,
    ),
    "everything masked": lambda: (torch.ones(Q, L, dtype=torch.bool), None),
    "one image all padding": lambda: (None, torch.tensor([[True] * L, [False] * L])),
    "dead only together": lambda: (
        torch.arange(L).lt(5).expand(Q, L).clone(),
        padding(),
    ),
}


@pytest.mark.parametrize("batched", [False, True], ids=["shared", "batched"])
@pytest.mark.parametrize("case", MASKS)
def test_literal(case, batched, device):
    q, k, v = arguments(batched)
    attn_mask, key_padding_mask = MASKS[case]()
    out, maps = literal(q, k, v, dense_mask(attn_mask, key_padding_mask))
    masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
    masks = {name: None if m is None else m.to(device) for name, m in masks.items()}
    q, k, v = (t.to(device) for t in (q, k, v))
    torch.testing.assert_close(cross_attention(q, k, v, **masks).cpu(), out, rtol=0, atol=1e-13)
    torch.testing.assert_close(cross_attention_maps(q, k, **masks).cpu(), maps, rtol=0, atol=1e-13)


@pytest.mark.parametrize("case", MASKS)
def test_gradients(case):
    attn_mask, key_padding_mask = MASKS[case]()
    args = [t.requires_grad_() for t in arguments()]
    assert torch.autograd.gradcheck(
        lambda q, k, v: cross_attention(
            q, k, v, attn_mask=attn_mask, key_padding_mask=key_padding_mask
        ),
        args,
    )


def test_a_mask_can_be_trained():
    q, k, v = arguments()
    mask = torch.randn(Q, L, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: cross_attention(q, k, v, attn_mask=m), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.float64], ids=str)
def test_large_finite_masks_are_not_minus_infinity(dtype, mask_dtype, device):
    """A row of finfo.min averages its values in every dtype instead of vanishing."""
    q, k, v = arguments(dtype=dtype, device=device)
    mask = torch.full((Q, L), torch.finfo(mask_dtype).min, dtype=mask_dtype, device=device)
    out = cross_attention(q, k, v, attn_mask=mask)
    wanted = v.double().mean(1, keepdim=True).expand(-1, Q, -1, -1)
    if dtype == torch.float16:  # fp16's own minimum, -65504, leaves the scores visible
        assert out.abs().amax(-1).gt(0).all()
    else:
        assert rms_error(out, wanted) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounding(dtype, device):
    q, k, v = arguments(dtype=dtype, device=device)
    truth = literal(*(t.double().cpu() for t in (q, k, v)), torch.zeros(B, H, Q, L).double())[0]
    # Probabilities are rounded once before they meet the values, the result once more.
    bound = 0.005 if dtype == torch.bfloat16 else 4 * torch.finfo(dtype).eps
    assert rms_error(cross_attention(q, k, v).cpu(), truth) < bound


def test_maps_are_fp32_under_autocast(device):
    q, k, _ = arguments(dtype=torch.float32, device=device)
    wanted = cross_attention_maps(q, k)
    with torch.autocast(device.type, torch.bfloat16):
        got = cross_attention_maps(q, k)
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)


def test_autocast_casts_inputs_and_keeps_finite_masks(device):
    q, k, v = arguments(dtype=torch.float32, device=device)
    mask = torch.full((Q, L), torch.finfo(torch.float32).min, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        out = cross_attention(q, k, v, attn_mask=mask)
    assert out.dtype == torch.bfloat16
    assert rms_error(out, v.mean(1, keepdim=True).expand(-1, Q, -1, -1)) < 0.01


def test_nan_stays_in_its_image_and_head():
    q, k, v = arguments()
    v[1, 2, 0] = float("nan")
    hit = cross_attention(q, k, v).isnan().any(-1).any(1)  # [B, H]
    assert hit.tolist() == [[False] * H, [True, False, False]]


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_logits(scale):
    q, k, v = arguments()
    out = cross_attention(q * scale, k, v)
    wanted = literal(q * scale, k, v, torch.zeros(B, H, Q, L).double())[0]
    # An exponent is as far off as a rounding of its logit, whichever of them are near the largest.
    logits = torch.einsum("qhd,blhd->bhql", q.abs(), k.abs()).max() * 1e4 / math.sqrt(D)
    allowed = 2 * torch.finfo(torch.float64).eps * logits * v.abs().max()
    torch.testing.assert_close(out, wanted, rtol=0, atol=allowed.item())


def test_empty_batch():
    q, k, v = arguments()
    assert cross_attention(q, k[:0], v[:0]).shape == (0, Q, H, D)


def test_any_strides():
    q, _, v = arguments()
    strided = torch.randn(B, H, 2 * D, L, dtype=torch.float64)[:, :, ::2].permute(0, 3, 1, 2)
    torch.testing.assert_close(
        cross_attention(q.transpose(0, 1).contiguous().transpose(0, 1), strided, v),
        cross_attention(q, strided.contiguous(), v),
        rtol=0,
        atol=1e-14,
    )


BAD = {
    "integer q": (TypeError, "q must be floating point", lambda q, k, v: (q.long(), k, v), {}),
    "q rank": (ValueError, r"q must be \[Q, H, d\]", lambda q, k, v: (q[0], k, v), {}),
    "k rank": (ValueError, r"k must be \[B, L, H, d\]", lambda q, k, v: (q, k[0], v), {}),
    "heads": (ValueError, "same heads and head width", lambda q, k, v: (q[:, 1:], k, v), {}),
    "batch": (
        ValueError,
        "q has batch 3, but k has batch 2",
        lambda q, k, v: (q.expand(3, -1, -1, -1), k, v),
        {},
    ),
    "v shape": (ValueError, "v must have shape", lambda q, k, v: (q, k, v[:, 1:]), {}),
    "k dtype": (TypeError, "k and q must have one dtype", lambda q, k, v: (q, k.float(), v), {}),
    "v device": (
        ValueError,
        "v and q must be on one device",
        lambda q, k, v: (q, k, v.to("meta")),
        {},
    ),
    "mask shape": (
        ValueError,
        r"\[Q, L\] = \[5, 7\] or \[B \* heads, Q, L\] = \[6, 5, 7\], got \[7, 5\]",
        lambda *a: a,
        {"attn_mask": torch.zeros(7, 5)},
    ),
    "mask dtype": (
        TypeError,
        "attn_mask must be bool or floating",
        lambda *a: a,
        {"attn_mask": torch.zeros(5, 7, dtype=torch.long)},
    ),
    "padding shape": (
        ValueError,
        r"key_padding_mask must be \[B, L\] = \[2, 7\], got \[7\]",
        lambda *a: a,
        {"key_padding_mask": torch.zeros(7, dtype=torch.bool)},
    ),
    "padding dtype": (
        TypeError,
        "key_padding_mask must be bool",
        lambda *a: a,
        {"key_padding_mask": torch.zeros(2, 7)},
    ),
    "mask device": (
        ValueError,
        "attn_mask and k must be on one device",
        lambda *a: a,
        {"attn_mask": torch.zeros(5, 7, device="meta")},
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, message, spoil, masks = BAD[case]
    with pytest.raises(error, match=message):
        cross_attention(*spoil(*arguments()), **masks)
