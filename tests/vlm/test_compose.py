import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visproj import insert_visual_tokens
from visproj.errors import InputError
from visproj.vlm.compose import IGNORE_INDEX

IMAGE, WIDTH = 99, 3


def test_images_of_different_lengths():
    """A list gives what the same images give where each is padded away."""
    ids = torch.tensor([[1, IMAGE, 2, IMAGE], [IMAGE, 3, 4, 5], [6, 7, 8, 9]])
    embeds = torch.randn(3, 4, WIDTH)
    images = [torch.randn(length, WIDTH, requires_grad=True) for length in (2, 5, 1)]
    labels = torch.arange(12).view(3, 4)
    found = insert_visual_tokens(embeds, ids, images, [2, 1, 0], IMAGE, labels=labels)
    mask = torch.ones_like(ids)
    wanted = by_hand(embeds, ids, images, None, mask, labels, 1, "right", 1)
    for got, expected in zip(found, wanted, strict=False):
        assert torch.equal(got, expected)
    found.inputs_embeds.sum().backward()
    assert all(torch.equal(image.grad, torch.ones_like(image)) for image in images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "empty list"),
        ([torch.ones(2, WIDTH), torch.ones(2)], r"visual_tokens\[1\] must be \[K, D\]"),
        ([torch.ones(2, WIDTH), torch.ones(2, 5)], r"visual_tokens\[1\] has width 5"),
        ([torch.ones(2, WIDTH)], "adds up to 2"),
    ],
)
def test_bad_lists_of_images(images, message):
    ids = torch.tensor([[1, IMAGE, IMAGE]])
    with pytest.raises(InputError, match=message):
        insert_visual_tokens(torch.ones(1, 3, WIDTH), ids, images, [2], IMAGE)


def by_hand(embeds, ids, images, counts, mask, labels, multiple, side, value):
    """The same, one token at a time."""
    images = list(images)
    rows = []
    for b in range(len(ids)):
        attended = [t for t in range(len(ids[b])) if mask[b, t]]
        row = []
        for t in range(attended[0], attended[-1] + 1) if attended else ():
            if ids[b, t] == IMAGE:
                row += [(token, value, IGNORE_INDEX) for token in images.pop(0)]
            else:
                row.append((embeds[b, t], int(mask[b, t]), int(labels[b, t])))
        rows.append(row)
    longest = max(map(len, rows), default=0)
    longest = -(-longest // multiple) * multiple
    pad = (torch.zeros(WIDTH), 0, IGNORE_INDEX)
    rows = [
        r + [pad] * (longest - len(r)) if side == "right" else [pad] * (longest - len(r)) + r
        for r in rows
    ]
    out = [[[cell[i] for cell in row] for row in rows] for i in range(3)]
    if longest:
        embeds = torch.stack([torch.stack(row) for row in out[0]])
    else:
        embeds = torch.zeros(len(rows), 0, WIDTH)
    return embeds, torch.tensor(out[1]), torch.tensor(out[2])


@st.composite
def batches(draw):
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    token = st.integers(0, 5).map(lambda t: IMAGE if t == 5 else t)
    ids = torch.tensor([[draw(token) for _ in range(length)] for _ in range(batch)])
    mask = torch.ones(batch, length, dtype=torch.long)
    for b in range(batch):
        left, right = draw(st.integers(0, length)), draw(st.integers(0, length))
        mask[b, :left] = 0
        mask[b, length - right :] = 0
        if draw(st.booleans()) and ids[b, length // 2] != IMAGE:
            mask[b, length // 2] = 0
    return ids, mask


@settings(max_examples=150, deadline=None)
@given(
    batch=batches(),
    per_image=st.integers(0, 4),
    multiple=st.sampled_from([1, 8]),
    side=st.sampled_from(["left", "right"]),
    value=st.sampled_from([1, 2]),
)
def test_token_by_token(batch, per_image, multiple, side, value):
    ids, mask = batch
    embeds = torch.randn(*ids.shape, WIDTH)
    labels = torch.randint(0, 50, ids.shape)
    inside = (mask.cumsum(1) > 0) & (mask.flip(1).cumsum(1).flip(1) > 0)
    counts = ((ids == IMAGE) & inside).sum(1)
    images = torch.randn(int(counts.sum()), per_image, WIDTH)
    got = insert_visual_tokens(
        embeds,
        ids,
        images,
        counts,
        IMAGE,
        attention_mask=mask,
        labels=labels,
        pad_to_multiple_of=multiple,
        padding_side=side,
        visual_mask_value=value,
    )
    wanted = by_hand(embeds, ids, images, counts, mask, labels, multiple, side, value)
    assert torch.equal(got.inputs_embeds, wanted[0])
    assert torch.equal(got.attention_mask, wanted[1])
    assert torch.equal(got.labels, wanted[2])
    attended = got.attention_mask != 0
    for row, positions in zip(attended, got.position_ids, strict=True):
        assert positions[row].tolist() == list(range(int(row.sum())))


def sample():
    ids = torch.tensor([[1, IMAGE, 2, IMAGE], [3, 4, 0, 0], [IMAGE, 5, 6, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    return torch.randn(3, 4, WIDTH), ids, torch.randn(3, 2, WIDTH), [2, 0, 1], mask


def test_upstreams_training_form():
    embeds, ids, images, counts, mask = sample()
    out = insert_visual_tokens(
        embeds,
        ids,
        images,
        counts,
        IMAGE,
        attention_mask=mask,
        labels=ids,
        pad_to_multiple_of=8,
        visual_mask_value=2,
    )
    assert out.attention_mask.tolist() == [
        [1, 2, 2, 1, 2, 2, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [2, 2, 1, 1, 0, 0, 0, 0],
    ]
    i = IGNORE_INDEX
    assert out.labels.tolist() == [
        [1, i, i, 2, i, i, i, i],
        [3, 4, i, i, i, i, i, i],
        [i, i, 5, 6, i, i, i, i],
    ]
    assert out.position_ids.tolist()[0] == [0, 1, 2, 3, 4, 5, 5, 5]
    # The first image stands at the first placeholder; upstream reverses them.
    assert torch.equal(out.inputs_embeds[0, 1:3], images[0])
    assert torch.equal(out.inputs_embeds[0, 4:6], images[1])


def test_left_padding_for_generation():
    embeds, ids, images, counts, mask = sample()
    out = insert_visual_tokens(
        embeds, ids, images, counts, IMAGE, attention_mask=mask.bool(), padding_side="left"
    )
    assert out.attention_mask.dtype == torch.bool
    assert out.attention_mask.long().tolist() == [
        [1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 1, 1, 1, 1],
    ]
    assert out.labels is None
    assert out.position_ids[1].tolist() == [0, 0, 0, 0, 0, 1]
    assert torch.equal(out.inputs_embeds[1, 4:], embeds[1, :2])


SIDES = {
    "left": ([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]], "left"),
    "right": ([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], "right"),
    "a gap inside": ([[1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], "right"),
    "none": ([[1, 1, 1, 1]] * 3, "right"),
    "a row on both": ([[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]], None),
    "rows that differ": ([[0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]], None),
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
@pytest.mark.parametrize("case", SIDES)
def test_the_side_that_the_mask_shows_is_kept(case, dtype):
    rows, side = SIDES[case]
    mask = torch.tensor(rows, dtype=dtype)
    ids = torch.tensor([[1, 2, IMAGE, 3], [IMAGE, 4, 5, 6], [7, 8, 9, 7]])
    counts = ((ids == IMAGE) & (mask != 0)).sum(1)
    given = torch.randn(3, 4, WIDTH), ids, torch.randn(int(counts.sum()), 2, WIDTH), counts, IMAGE
    options = {"attention_mask": mask, "labels": ids, "pad_to_multiple_of": 8}
    if side is None:
        with pytest.raises(InputError, match="on the left and on the right: pass padding_side"):
            insert_visual_tokens(*given, **options)
        side = "left"
        got = insert_visual_tokens(*given, padding_side=side, **options)
    else:
        got = insert_visual_tokens(*given, **options)
    assert got.attention_mask.dtype == dtype
    padding, attended = got.attention_mask == 0, (mask != 0).any(1)
    outer, inner = (-1, 0) if side == "right" else (0, -1)
    assert padding[:, outer].all()
    assert not padding[attended, inner].any()
    assert (got.labels[:, outer] == IGNORE_INDEX).all()
    want = insert_visual_tokens(*given, padding_side=side, **options)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def test_nothing_but_padding():
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.zeros(2, 3)
    out = insert_visual_tokens(
        torch.randn(2, 3, WIDTH), ids, torch.zeros(0, 1, WIDTH), [0, 0], IMAGE, attention_mask=mask
    )
    assert out.inputs_embeds.shape == (2, 0, WIDTH)


def test_without_a_mask_padding_is_on_the_right():
    ids = torch.tensor([[1, IMAGE], [2, 3]])
    out = insert_visual_tokens(
        torch.randn(2, 2, WIDTH), ids, torch.randn(1, 3, WIDTH), [1, 0], IMAGE
    )
    assert out.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


EMPTY = [(0, 0, 0), (0, 4, 0), (2, 0, 0), (2, 4, 0), (2, 4, 2)]


@pytest.mark.parametrize("per_image", [0, 3])
@pytest.mark.parametrize(("batch", "length", "images"), EMPTY)
def test_empty_batches(batch, length, images, per_image):
    shape = (batch, length)
    ids = torch.zeros(shape, dtype=torch.long)
    ids[:, :1] = IMAGE if images else 0
    counts = [1 if images else 0] * shape[0]
    out = insert_visual_tokens(
        torch.randn(*shape, WIDTH), ids, torch.randn(images, per_image, WIDTH), counts, IMAGE
    )
    length = shape[1] + (per_image - 1 if images else 0) if shape[0] else 0
    assert out.inputs_embeds.shape == (shape[0], length, WIDTH)
    assert out.attention_mask.shape == out.position_ids.shape == (shape[0], length)


def test_gradients_reach_text_and_images():
    embeds, ids, images, counts, mask = sample()
    embeds, images = embeds.double().requires_grad_(), images.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda e, v: insert_visual_tokens(e, ids, v, counts, IMAGE, attention_mask=mask)[0],
        (embeds, images),
    )


def test_visual_tokens_take_the_texts_dtype():
    embeds, ids, images, counts, _ = sample()
    out = insert_visual_tokens(embeds.bfloat16(), ids, images, torch.tensor(counts), IMAGE)
    assert out.inputs_embeds.dtype == torch.bfloat16
    assert torch.equal(out.inputs_embeds[2, :2], images[2].bfloat16())


def test_text_only_batch():
    ids = torch.tensor([[1, 2]])
    embeds = torch.randn(1, 2, WIDTH)
    out = insert_visual_tokens(embeds, ids, torch.empty(0, 4, WIDTH), [0], IMAGE)
    assert torch.equal(out.inputs_embeds, embeds)


BAD = {
    "sample named": (
        ValueError,
        "sample 0 holds 2 image placeholders.*says 1",
        {"counts": [1, 1, 1]},
    ),
    "entries": (ValueError, "images_per_sample has 2 entries for a batch of 3", {"counts": [2, 1]}),
    "image total": (
        ValueError,
        "adds up to 3, but visual_tokens holds 4",
        {"images": torch.zeros(4, 2, 3)},
    ),
    "width": (
        ValueError,
        "visual_tokens have width 5, but text_embeds have width 3",
        {"images": torch.zeros(3, 2, 5)},
    ),
    "rank": (ValueError, "visual_tokens must have 3 dimensions", {"images": torch.zeros(3, 3)}),
    "integer": (
        TypeError,
        "visual_tokens must be floating",
        {"images": torch.zeros(3, 2, 3).long()},
    ),
    "float ids": (TypeError, "input_ids must be integer", {"ids": torch.zeros(3, 4)}),
    "ids shape": (ValueError, "text_embeds must be", {"ids": torch.zeros(3, 5).long()}),
    "mask shape": (ValueError, "attention_mask must be", {"attention_mask": torch.ones(3, 3)}),
    "labels shape": (ValueError, "labels must be", {"labels": torch.ones(3, 3).long()}),
    "side": (ValueError, "padding_side must be", {"padding_side": "both"}),
    "float counts": (TypeError, "integer", {"counts": [2.0, 0.0, 1.0]}),
    "float labels": (TypeError, "labels must be integer", {"labels": torch.ones(3, 4)}),
    "negative multiple": (ValueError, "must be positive, got -8", {"pad_to_multiple_of": -8}),
    "hidden images": (ValueError, "from 1 to .* got 0", {"visual_mask_value": 0}),
    "mask device": (
        ValueError,
        "one device, got cpu, meta",
        {"attention_mask": torch.ones(3, 4, device="meta")},
    ),
    "additive mask": (
        InputError,
        "0 at padding and positive elsewhere, got -inf",
        {"attention_mask": torch.zeros(3, 4).index_fill(1, torch.tensor([3]), -torch.inf)},
    ),
    "uint8 mask of 256": (
        InputError,
        "from 1 to 255 in an attention_mask of torch.uint8",
        {"attention_mask": torch.ones(3, 4, dtype=torch.uint8), "visual_mask_value": 256},
    ),
    "bfloat16 mask of 257": (
        InputError,
        "from 1 to 256 in an attention_mask of torch.bfloat16",
        {"attention_mask": torch.ones(3, 4).bfloat16(), "visual_mask_value": 257},
    ),
    "unsigned labels": (TypeError, "integer and signed", {"labels": torch.ones(3, 4).byte()}),
    "counts of rank 2": (InputError, r"must be \[B\], got", {"counts": torch.ones(3, 1).long()}),
    "counts of rank 0": (InputError, r"must be \[B\], got", {"counts": torch.tensor(3)}),
    "bool mask of 2": (
        ValueError,
        "from 1 to 1 in an attention_mask of torch.bool",
        {"attention_mask": torch.ones(3, 4).bool(), "visual_mask_value": 2},
    ),
    "device": (
        ValueError,
        "one device, got cpu, meta",
        {"images": torch.zeros(3, 2, 3, device="meta")},
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, message, change = BAD[case]
    embeds, ids, images, counts, _ = sample()
    given = {"ids": ids, "images": images, "counts": counts, **change}
    ids, images, counts = (given.pop(name) for name in ("ids", "images", "counts"))
    with pytest.raises(error, match=message):
        insert_visual_tokens(embeds, ids, images, counts, IMAGE, **given)
