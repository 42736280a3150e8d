"""Cross-attention through its kernels: values that are large, not finite, or those of another."""

import math

import pytest
import torch
from kernels_support import (
    DTYPES,
    STYLES,
    attention_operands,
    cases,
    check_attention,
    evaluate,
    random,
)

from visproj.ops import cross_attention

pytest.importorskip("triton", reason="kernels need triton")

pytestmark = [
    pytest.mark.usefixtures("unwritten"),
    pytest.mark.filterwarnings("ignore:invalid value"),  # NumPy's, of inf - inf and the like
]

SHAPE = (2, 37, 45, 3, 24)  # images, queries, keys, heads, width


def run(tensors, upstream, **masks):
    def op(*tensors):
        return cross_attention(*tensors, **masks, backend="triton")

    return evaluate(op, tensors, upstream)


def upstream_of(dtype, device):
    B, Q, _, H, d = SHAPE
    return random(B, Q, H, d, dtype=dtype, device=device)


@pytest.mark.parametrize("size", [1e4, -1e4], ids=["+1e4", "-1e4"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("dtype", cases(["fp32", "bf16"], ["fp16"]))
def test_huge_logits(size, masked, dtype, tiles, device):
    """Logits of 1e4, whose exponentials overflow everything; softmax becomes one key."""
    tiles()
    q, kv = attention_operands(*SHAPE, DTYPES[dtype], device)
    mask = torch.zeros(37, 45, device=device).masked_fill(torch.eye(37, 45).bool().to(device), 1.0)
    check_attention([q * size, kv], mask if masked else None)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_huge_masks(dtype, tiles, device):
    tiles()
    tensors = attention_operands(*SHAPE, DTYPES[dtype], device)
    check_attention(tensors, 1e4 * torch.randn(37, 45).to(device))


@pytest.mark.parametrize("operand", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_outlier_channels(operand, dtype, tiles, device):
    """Vision features have channels 40 times the rest."""
    tiles()
    tensors = attention_operands(*SHAPE, DTYPES[dtype], device, packed=False)
    tensors["qkv".index(operand)][..., 3] *= 40
    check_attention(tensors)


SPOILED = [
    (value, operand, masks, style)
    for masks, style in (
        ("plain", "descriptors"),
        ("masked", "pointers"),
        ("plain", "pointers"),
        ("masked", "descriptors"),
    )
    for value in ("nan", "inf")
    for operand in ("q", "k", "v", "upstream")
]


@pytest.mark.parametrize(("value", "operand", "masks", "style"), cases(SPOILED[:12], SPOILED[12:]))
def test_not_finite_stays_in_its_image_and_head(value, operand, masks, style, tiles, device):
    """A head's 24 columns are padded to 32, its 37 rows fill no tile: neighbours are near."""
    tiles(style, attention=(64, 64))
    tensors = attention_operands(*SHAPE, torch.bfloat16, device, shared=False, packed=False)
    tensors.append(upstream_of(torch.bfloat16, device))
    mask = torch.randn(37, 45).masked_fill(torch.rand(37, 45) < 0.4, -math.inf).to(device)
    masks = {"attn_mask": mask} if masks == "masked" else {}
    clean = run(tensors[:3], tensors[3], **masks)
    index = ["q", "k", "v", "upstream"].index(operand)
    tensors[index][1, -1, 1, -1] = float(value)  # the last element of a head, beside the next one
    got = run(tensors[:3], tensors[3], **masks)
    assert not (got[0][1, :, 1].isfinite().all() and got[1][1, :, 1].isfinite().all())
    for mine, before in zip(got, clean, strict=True):
        mine[1, :, 1] = before[1, :, 1]
        assert torch.equal(mine, before)


@pytest.mark.parametrize("style", STYLES)
def test_not_finite_reaches_every_gradient_it_should(style, tiles, device):
    tiles(style)
    q, kv = attention_operands(*SHAPE, torch.bfloat16, device)
    kv[1, 3, 0, 2, 5] = math.nan
    upstream = upstream_of(torch.bfloat16, device)
    out, dq, dkv = run([q, kv], upstream)
    wanted = evaluate(lambda *t: cross_attention(*t, backend="torch"), [q, kv], upstream)
    for mine, theirs in zip((out, dq, dkv), wanted, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())


@pytest.mark.parametrize("value", [math.inf, -math.inf], ids=str)
def test_infinite_values_pass_through(value, tiles, device):
    """An infinite value gives what it gives in PyTorch: itself, in its column."""
    tiles()
    q, k, v = attention_operands(*SHAPE, torch.float32, device, packed=False)
    v[0, 7, 1, 2] = value
    out = cross_attention(q, k, v, backend="triton")
    assert torch.equal(out[0, :, 1, 2], torch.full((37,), value, device=device))
    out[0, :, 1, 2] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("hidden", ["bool", "padding", "-inf"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_hidden_keys_that_are_not_finite(hidden, dtype, tiles, device):
    """As in PyTorch: a masked key does not count, a masked value times zero is NaN."""
    tiles()
    q, k, v = attention_operands(*SHAPE, DTYPES[dtype], device, packed=False)
    where = torch.zeros(2, 45, dtype=torch.bool, device=device)
    where[:, -5:] = True
    masks = {
        "bool": {"attn_mask": where[:1].expand(37, -1)},
        "padding": {"key_padding_mask": where},
        "-inf": {"attn_mask": torch.zeros(37, 45, device=device).masked_fill(where[:1], -math.inf)},
    }[hidden]
    clean = cross_attention(q, k, v, **masks, backend="triton")
    k[:, -5:] = math.inf
    got = cross_attention(q.abs(), k, v, **masks, backend="triton")
    wanted = cross_attention(q.abs(), k, v, **masks, backend="torch")
    assert clean.isfinite().all()
    assert torch.equal(got.isnan(), wanted.isnan())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("batch", cases([2], [7]))
def test_repeats_are_bit_equal(batch, masked, style, tiles, device):
    """The gradient of shared queries too, which is a sum over the batch."""
    tiles(style, attention=(64, 32))
    _, Q, L, H, d = SHAPE
    tensors = attention_operands(batch, Q, L, H, d, torch.bfloat16, device)
    upstream = random(batch, Q, H, d, dtype=torch.bfloat16, device=device)
    masks = {"attn_mask": torch.randn(Q, L).to(device)} if masked else {}
    assert all(map(torch.equal, *(run(tensors, upstream, **masks) for _ in range(2))))


@pytest.mark.parametrize("style", STYLES)
def test_an_image_does_not_depend_on_the_batch(style, tiles, device):
    tiles(style)
    q, kv = attention_operands(*SHAPE, torch.bfloat16, device)
    both = cross_attention(q, kv, backend="triton")
    alone = [cross_attention(q, kv[i : i + 1], backend="triton") for i in range(2)]
    assert torch.equal(both, torch.cat(alone))


def test_one_key_gets_everything(tiles, device):
    """Values are integers, so that sums are exact in any order and the gradients of scores 0."""
    tiles()
    q, k, v = attention_operands(2, 37, 1, 2, 24, torch.bfloat16, device, packed=False)
    v = v.round()
    out, dq, dk, dv = run([q, k, v], ones := torch.ones(2, 37, 2, 24).to(q))
    assert torch.equal(out, v.expand(-1, 37, -1, -1))
    assert torch.equal(dv[:, 0], ones.sum(1))
    assert not dq.any()
    assert not dk.any()


def test_saved_for_backward_is_inputs_output_and_statistics(tiles, device):
    """No probabilities: nothing as large as queries times keys."""
    tiles()
    q, kv = attention_operands(1, 96, 160, 1, 8, torch.float32, device)
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        cross_attention(q.requires_grad_(), kv, backend="triton")
    assert sorted(sizes) == sorted([q.numel(), kv.numel(), q.numel(), 96])


def test_nothing_is_saved_without_grad(tiles, device):
    tiles()
    q, kv = attention_operands(*SHAPE, torch.float32, device)
    q.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        cross_attention(q.detach(), kv, backend="triton")
        with torch.no_grad():
            out = cross_attention(q, kv, backend="triton")
        with torch.inference_mode():
            assert torch.equal(cross_attention(q, kv, backend="triton"), out)
    assert not saved
    assert not out.requires_grad


# Images, tiles of queries of all heads, processors; the parts, and images one after another.
# 4, 16 and 38 are what an H100's 132 and an A100's 108 processors can come to.
@pytest.mark.parametrize(
    ("batch", "tiles", "processors", "parts", "time"),
    [
        (1, 64, 132, 1, 1),
        (2, 64, 132, 2, 1),
        (5, 64, 132, 2, 3),
        (8, 64, 132, 2, 4),
        (32, 64, 132, 2, 16),
        (32, 128, 108, 16, 38),
        (1024, 64, 132, 2, 512),
        (7, 1, 132, 7, 1),
        (7, 1000, 4, 1, 1750),
    ],
)
def test_split_of_the_batch(batch, tiles, processors, parts, time):
    from visproj.kernels.cross_attention_queries import split_of_the_batch

    found = split_of_the_batch(batch, tiles, processors)
    assert found == parts
    assert math.ceil(tiles * found / processors) * math.ceil(batch / found) == time


@pytest.mark.parametrize("batch", range(1, 40))
def test_no_part_of_the_batch_is_empty(batch):
    from visproj.kernels.cross_attention_queries import split_of_the_batch

    for tiles in (1, 3, 64, 131):
        parts = split_of_the_batch(batch, tiles, 132)
        assert (parts - 1) * math.ceil(batch / parts) < batch
