"""Cross-attention through its kernels, forward and backward: shapes, layouts, masks."""

import math

import pytest
import torch
from kernels_support import (
    DTYPES,
    LAYOUTS,
    STYLES,
    attention_operands,
    cases,
    check_attention,
    random,
)

pytest.importorskip("triton", reason="kernels need triton")

pytestmark = pytest.mark.usefixtures("unwritten")


# (images, queries, keys, heads, width): each at the edges of tiles of 32 queries and 32 keys.
EDGES = [
    *((1, Q, 37, 2, 24) for Q in (1, 31, 32, 33, 37, 97)),
    *((2, 37, L, 1, 24) for L in (1, 31, 32, 33, 97)),
    *((1, 33, 45, 1, d) for d in (1, 5, 16, 17, 32, 33)),
    *((1, 5, 37, H, 16) for H in (1, 3, 7)),
    *((B, 33, 17, 1, 8) for B in (1, 3, 5)),
]
ALIGNED = [shape for shape in EDGES if shape[-1] % 8 == 0]
WIDTHS = [(1, 17, 33, 2, d) for d in (32, 64, 104, 128, 144)]
LARGER = [
    (2, 64, 257, 2, 64),
    (1, 199, 257, 1, 104),
    (2, 37, 199, 2, 128),
    (1, 256, 256, 1, 144),
    (1, 40, 70, 1, 200),
    (1, 40, 70, 1, 256),
]


@pytest.mark.parametrize(
    ("B", "Q", "L", "H", "d", "style", "dtype"),
    cases(
        [(*shape, "pointers", "fp32") for shape in EDGES]
        + [(*shape, "descriptors", "bf16") for shape in ALIGNED]
        + [(*shape, "pointers", "bf16") for shape in WIDTHS]
        + [(*shape, "descriptors", "fp16") for shape in WIDTHS],
        [(*shape, "pointers", dtype) for shape in EDGES for dtype in ("bf16", "fp16")]
        + [(*shape, "descriptors", "fp32") for shape in (*ALIGNED, *WIDTHS)]
        + [(*shape, style, "bf16") for shape in LARGER for style in STYLES],
    ),
)
def test_shapes(B, Q, L, H, d, style, dtype, tiles, device):
    ran = tiles(style)
    check_attention(attention_operands(B, Q, L, H, d, DTYPES[dtype], device))
    assert ran == {style}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "batched"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "separate"])
@pytest.mark.parametrize("dtype", cases(["bf16"], ["fp32", "fp16"]))
def test_forms(shared, packed, style, dtype, tiles, device):
    """Tiles of keys and queries of different size, neither dividing its length."""
    ran = tiles(style, attention=(16, 32))
    shape = (2, 37, 45, 2, 24)
    check_attention(attention_operands(*shape, DTYPES[dtype], device, shared=shared, packed=packed))
    assert ran == {style}


@pytest.mark.parametrize("batch", cases([2, 7], [3, 5, 16]))
@pytest.mark.parametrize("style", STYLES)
def test_shared_queries_of_many_images(batch, style, tiles, device):
    """Their gradient is a sum over the batch, in parts whose number follows the processors'."""
    tiles(style)
    check_attention(attention_operands(batch, 5, 9, 1, 16, torch.bfloat16, device))


@pytest.mark.parametrize(
    "lengths", [(0, 5, 7, 2), (2, 0, 7, 2), (2, 5, 0, 2), (2, 5, 7, 0)], ids=str
)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "batched"])
def test_nothing(lengths, shared, device):
    """Without keys there is nothing to attend to: zero."""
    tensors = attention_operands(*lengths, 8, torch.float32, device, shared=shared)
    out, *gradients = check_attention(tensors)
    assert not out.any()
    assert not any(gradient.any() for gradient in gradients)


def additive(*shape, device):
    """Scores and a good part of -inf, fp32 whatever the operands are."""
    hidden = torch.rand(shape) < 0.4
    return torch.randn(shape).masked_fill(hidden, -math.inf).to(device)


def closed(*shape, device):
    return (torch.rand(shape) < 0.4).to(device)


def padding(B, L, device):
    return (torch.arange(L) >= torch.randint(1, L + 1, (B, 1))).to(device)


def rows_of(mask, value, rows=(3, 36)):
    for row in rows:
        mask[..., row, :] = value
    return mask


def a_tile_of(mask, value, start):
    mask[..., start : start + 32] = value
    return mask


# From (B, H, Q, L, dtype, device) both masks.
MASKS = {
    "bool": lambda B, H, Q, L, t, on: (closed(Q, L, device=on), None),
    "bool per head": lambda B, H, Q, L, t, on: (closed(B * H, Q, L, device=on), None),
    "additive": lambda B, H, Q, L, t, on: (additive(Q, L, device=on), None),
    "additive of the dtype": lambda B, H, Q, L, t, on: (additive(Q, L, device=on).to(t), None),
    "additive per head": lambda B, H, Q, L, t, on: (additive(B * H, Q, L, device=on), None),
    "padding": lambda B, H, Q, L, t, on: (None, padding(B, L, on)),
    "bool and padding": lambda B, H, Q, L, t, on: (closed(Q, L, device=on), padding(B, L, on)),
    "both per head": lambda B, H, Q, L, t, on: (
        additive(B * H, Q, L, device=on),
        padding(B, L, on),
    ),
    "closed rows": lambda B, H, Q, L, t, on: (rows_of(closed(Q, L, device=on), True), None),
    "rows at -inf": lambda B, H, Q, L, t, on: (
        rows_of(additive(B * H, Q, L, device=on), -math.inf),
        None,
    ),
    "all closed": lambda B, H, Q, L, t, on: (torch.ones(Q, L, dtype=torch.bool, device=on), None),
    "an image of padding": lambda B, H, Q, L, t, on: (
        None,
        torch.arange(B, device=on)[:, None].eq(1).expand(B, L),
    ),
    "first tile closed": lambda B, H, Q, L, t, on: (
        a_tile_of(torch.zeros(Q, L, dtype=torch.bool, device=on), True, 0),
        None,
    ),
    "last tile closed": lambda B, H, Q, L, t, on: (
        a_tile_of(torch.zeros(Q, L, dtype=torch.bool, device=on), True, L - L % 32),
        None,
    ),
    "lowest rows": lambda B, H, Q, L, t, on: (
        rows_of(additive(Q, L, device=on), torch.finfo(t).min),
        None,
    ),
    "lowest for closed": lambda B, H, Q, L, t, on: (
        torch.zeros(Q, L, device=on, dtype=t).masked_fill(
            rows_of(closed(Q, L, device=on), True), torch.finfo(t).min
        ),
        padding(B, L, on),
    ),
}


@pytest.mark.parametrize(
    ("style", "dtype"),
    cases(
        [("pointers", "bf16")],
        [("descriptors", dtype) for dtype in DTYPES] + [("pointers", "fp32"), ("pointers", "fp16")],
    ),
)
@pytest.mark.parametrize("form", MASKS)
def test_masks(form, style, dtype, tiles, device):
    ran = tiles(style)
    B, Q, L, H = 2, 37, 45, 2
    tensors = attention_operands(B, Q, L, H, 24, DTYPES[dtype], device, shared="bool" in form)
    masks = MASKS[form](B, H, Q, L, DTYPES[dtype], device)
    # SDPA on a CPU is wrong backward where all keys of a query have finfo.min.
    check_attention(tensors, *masks, explicit="lowest" in form)
    assert ran == {style}


@pytest.mark.parametrize("form", ["bool per head", "both per head", "rows at -inf", "lowest rows"])
def test_masks_in_fp32(form, tiles, device):
    tiles()
    tensors = attention_operands(2, 37, 33, 2, 16, torch.float32, device)
    masks = MASKS[form](2, 2, 37, 33, torch.float32, device)
    check_attention(tensors, *masks, explicit="lowest" in form)


@pytest.mark.parametrize("keys", [1, 127, 128, 129])
def test_masks_at_the_edge_of_their_padding(keys, tiles, device):
    tiles(attention=(16, 128))
    tensors = attention_operands(1, 5, keys, 2, 16, torch.float32, device)
    check_attention(tensors, closed(2, 5, keys, device=device))


@pytest.mark.parametrize("layout", [*LAYOUTS, "broadcast"])
def test_layouts_of_masks(layout, tiles, device):
    tiles()
    mask = additive(37, 45, device=device)
    if layout == "broadcast":
        mask = mask[:, :1].masked_fill(mask[:, :1].isinf(), 1.0).expand(-1, 45)
    elif layout == "without_cls":
        mask = torch.nn.functional.pad(mask, (1, 0))[:, 1:]
    else:
        mask = LAYOUTS[layout](mask)
    check_attention(attention_operands(2, 37, 45, 2, 16, torch.bfloat16, device), mask)


OPERANDS = {"q": 0, "q of an image": 0, "k": 1, "v": 2, "upstream": 3}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "without_cls"])
@pytest.mark.parametrize("operand", cases(["q", "v", "upstream"], ["q of an image", "k"]))
@pytest.mark.parametrize("style", cases(["descriptors"], ["pointers"]))
def test_layouts(operand, layout, style, tiles, device):
    tiles(style)
    tensors = attention_operands(
        2, 17, 37, 2, 24, torch.bfloat16, device, shared=operand == "q", packed=False
    )
    tensors.append(random(2, 17, 2, 24, dtype=torch.bfloat16, device=device))
    index = OPERANDS[operand]
    tensors[index] = LAYOUTS[layout](tensors[index])
    check_attention(tensors[:3], upstream=tensors[3])


@pytest.mark.parametrize("layout", ["heads apart", "keys after a CLS", "heads first", "offset"])
@pytest.mark.parametrize("style", STYLES)
def test_layouts_of_packed_keys(layout, style, tiles, device):
    tiles(style)
    q, kv = attention_operands(2, 33, 37, 2, 24, torch.bfloat16, device)
    pad = torch.nn.functional.pad
    kv = {
        "heads apart": lambda: pad(kv, (0, 8), value=math.nan)[..., :24],
        "keys after a CLS": lambda: pad(kv, (0, 0) * 3 + (1, 0), value=math.nan)[:, 1:],
        "heads first": lambda: kv.transpose(1, 3).contiguous().transpose(1, 3),
        "offset": lambda: LAYOUTS["offset"](kv),
    }[layout]()
    check_attention([q, kv])


def test_strides_of_single_entries(tiles, device):
    """One query: no 16 bytes divide the stride between it and the next, which is not there."""
    tiles("descriptors")
    q = random(64, dtype=torch.bfloat16, device=device).as_strided((1, 2, 16), (17, 16, 1))
    check_attention([q, random(2, 5, 2, 2, 16, dtype=torch.bfloat16, device=device)])
