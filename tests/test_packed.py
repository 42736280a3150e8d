"""Images of different sizes in one batch, as a list or packed, against one call per image."""

import peft
import pytest
import torch
from helpers import make, randomise
from resamplers import PATCHES
from torch import nn

from visproj import fold, use_backend
from visproj.errors import InputError
from visproj.ops import packed_cross_attention
from visproj.projectors import attention
from visproj.projectors.aria import AriaProjector
from visproj.projectors.kosmos2 import Kosmos2Projection
from visproj.projectors.resamplers import MiniCPM2Resampler, MiniCPMResampler, QwenVLResampler

GRIDS = [(3, 4), (5, 4), (1, 12), (4, 4)]
SMALL = {"query_grid": (3, 3), "num_heads": 4}
MAKERS = {
    "perceiver": lambda: make("perceiver", **SMALL),
    "perceiver without cls": lambda: make("perceiver", has_cls=False, **SMALL),
    "qwen-vl": lambda: QwenVLResampler(32, 64, **SMALL),
    "minicpm-v-2.0": lambda: MiniCPM2Resampler(32, 64, **SMALL),
    "minicpm-v-2.6": lambda: MiniCPMResampler(32, 64, num_queries=5, num_heads=4, max_size=(4, 9)),
    "aria": lambda: AriaProjector(
        32, 40, patch_to_query_dict=dict.fromkeys(PATCHES, 3) | {16: 3}, num_heads=4
    ),
    "kosmos-2": lambda: Kosmos2Projection(32, 64, num_queries=5, num_heads=4),
}
NAMES = tuple(MAKERS)
FORMS = (None, "keys", "absorbed")


def resampler(name, form=None):
    module = randomise(MAKERS[name]()).double().eval()
    return module if form is None else fold(module, form=form)


def images_of(module, grids=GRIDS):
    torch.manual_seed(2)
    extra = int(module.has_cls)
    return [torch.randn(h * w + extra, 32, dtype=torch.float64) for h, w in grids]


def packed(images):
    lengths = torch.tensor([0, *(len(image) for image in images)])
    return torch.cat(images), lengths.cumsum(0).to(torch.int32)


def positioned(module, grids=GRIDS):
    return {"grid": grids} if module.positioned else {}


def separately(module, images, grids=GRIDS, **options):
    found = []
    for image, grid in zip(images, grids, strict=True):
        at = {"grid": grid} if module.positioned else {}
        found.append(module(image[None], **at, **options))
    return found


def features(found):
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_list_is_each_image_by_itself(name, form):
    module = resampler(name, form)
    images = images_of(module)
    wanted = torch.cat([features(out) for out in separately(module, images)])
    bound = 1e-12 * wanted.abs().max()
    got = features(module(images, **positioned(module)))
    assert (got - wanted).abs().max() <= bound
    rows, starts = packed(images)
    got = features(module(rows, cu_seqlens=starts, **positioned(module)))
    assert (got - wanted).abs().max() <= bound


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_maps(name, form):
    module = resampler(name, form)
    images = images_of(module)
    _, maps = module(images, return_attention=True, **positioned(module))
    wanted = separately(module, images, return_attention=True)
    assert len(maps) == len(images)
    for got, (_, expected) in zip(maps, wanted, strict=True):
        torch.testing.assert_close(got, expected[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    module = resampler(name)
    images = [image.requires_grad_() for image in images_of(module)]
    parameters = [*module.parameters()]
    parameters = [p for p in parameters if p.requires_grad]

    def gradients(outs):
        loss = torch.cat([features(out) for out in outs]).square().sum()
        return torch.autograd.grad(loss, [*images, *parameters])

    got = gradients([module(images, **positioned(module))])
    wanted = gradients(separately(module, images))
    largest = max(grad.abs().max() for grad in wanted)
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-12 * largest


@pytest.mark.parametrize("name", ["perceiver", "minicpm-v-2.6", "aria"])
def test_attention_that_is_called_whole(name):
    module = resampler(name)
    target = "multihead_attn" if name == "aria" else "attn"
    config = peft.LoraConfig(target_modules=[target], init_lora_weights=False)
    peft.get_peft_model(nn.ModuleDict({"resampler": module}), config)
    module.double()
    images = images_of(module)
    got = module(images, **positioned(module))
    wanted = torch.cat(separately(module, images))
    assert (got - wanted).abs().max() <= 1e-12 * wanted.abs().max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["perceiver", "minicpm-v-2.6", "kosmos-2"])
@torch.no_grad()
def test_kernels(name, form):
    """Interpreted; fp32 against fp64, by the roundings of a few chained products."""
    module = resampler(name, form)
    images = images_of(module)
    wanted = features(module(images, **positioned(module)))
    module.float()
    with use_backend("triton"):
        got = features(module([image.float() for image in images], **positioned(module)))
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.fixture
def projected(monkeypatch):
    """The shapes of the positions that the kernels' operation multiplies."""
    shapes, run = [], attention.linear_norm_linear

    def spy(*arguments, positions, places, **others):
        shapes.append(None if positions is None else list(positions.shape))
        return run(*arguments, positions=positions, places=places, **others)

    monkeypatch.setattr(attention, "linear_norm_linear", spy)
    return shapes


# Rows and columns of the four grids, two of which are the same one here.
SAME = [(3, 4), (5, 4), (1, 12), (3, 4)]
PLACED = 3 + 4 + 5 + 4 + 1 + 12


@pytest.mark.parametrize("name", ["perceiver", "qwen-vl", "minicpm-v-2.0", "minicpm-v-2.6"])
def test_kernels_multiply_one_position_per_row_and_column(name, projected):
    """Outputs and gradients are those of all positions; fp32, so by roundings of a few products."""
    module = resampler(name)
    assert module._is_separable()
    images = images_of(module, SAME)
    parameters = [p for p in module.parameters() if p.requires_grad]
    wanted = module(images, grid=SAME)
    gradients = torch.autograd.grad(wanted.square().sum(), parameters)
    scale = max(gradient.abs().max() for gradient in gradients)
    module.float()
    parameters = [p for p in module.parameters() if p.requires_grad]
    with use_backend("triton"):
        got = module([image.float() for image in images], grid=SAME)
        found = torch.autograd.grad(got.square().sum(), parameters)
    assert projected == [[PLACED, 64]]
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    for one, other in zip(found, gradients, strict=True):
        assert (one - other).abs().max() <= 1e-4 * scale


@pytest.mark.parametrize("reason", ["not separable", "trained", "changed in place", "one size"])
def test_kernels_multiply_all_positions(reason, projected):
    module = resampler("perceiver")
    images = images_of(module, SAME)
    if reason == "trained":
        module.pos_embed.requires_grad_()
    if reason == "changed in place":
        assert module._is_separable()
    if reason in ("not separable", "changed in place"):
        with torch.no_grad():
            module.pos_embed[1, 0] += 1
    wanted = module(images, grid=SAME)
    module.float()
    images = [image.float() for image in images]
    with use_backend("triton"):
        got = module(images, grid=SAME)
        if reason == "one size":
            module(images[0][None], grid=SAME[0])
    whole = sum(h * w for h, w in SAME)
    assert projected == {"one size": [[PLACED, 64], [12, 64]]}.get(reason, [[whole, 64]])
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@torch.no_grad()
def test_frames_of_clips_on_the_kernels(projected):
    """The time of a frame is one more position, shared by all its tokens."""
    module = resampler("minicpm-v-2.6")
    x = torch.randn(3, 12, 32, dtype=torch.float64)
    call = torch.tensor([[3, 4], [2, 5], [1, 9]]), [[0, 7], [-1]]
    wanted = module(x, *call)
    module.float()
    with use_backend("triton"):
        got = module(x.float(), *call)
    assert projected == [[3 + 4 + 2 + 5 + 1 + 9 + 3, 64]]
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("target", ["attn", "kv_proj"])
@torch.no_grad()
def test_placed_positions_where_a_child_is_called(target):
    module = resampler("minicpm-v-2.6")
    config = peft.LoraConfig(target_modules=[target], init_lora_weights=False)
    peft.get_peft_model(nn.ModuleDict({"resampler": module}), config)
    module.double()
    images = images_of(module, SAME)
    wanted = module(images, grid=SAME)
    module.float()
    with use_backend("triton"):
        got = module([image.float() for image in images], grid=SAME)
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_compiled(form):
    torch.compiler.reset()
    module = resampler("minicpm-v-2.6", form)
    images = images_of(module)
    wanted = module(images, grid=GRIDS)
    got = torch.compile(module, fullgraph=True, backend="aot_eager")(images, grid=GRIDS)
    rows, starts = packed(images)
    whole = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(rows, cu_seqlens=starts, grid=GRIDS), got)
    # Sines of the rows beyond the stored table are traced as PyTorch's, in fp32.
    assert (got - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_compiled_with_dynamic_sizes(form):
    """On the interpreted kernels where there are any: fp32, against images one by one."""
    module = resampler("minicpm-v-2.6", form).float()
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for grids in (GRIDS, [(2, 3), (4, 7), (3, 5)]):
        images = [image.float() for image in images_of(module, grids)]
        wanted = torch.cat(separately(module, images, grids))
        with use_backend("triton"):
            got = compiled(images, grid=grids)
        assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_sizes_are_not_read_while_compiling(form):
    """One graph for all grids; off the table the result is NaN, not another image's positions."""
    torch.compiler.reset()
    module = resampler("minicpm-v-2.6", form)
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for sizes in ([[3, 4], [2, 3]], [[4, 3], [1, 9]]):
        got = compiled(x, torch.tensor(sizes))
        wanted = module(x, torch.tensor(sizes))
        assert (got - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    grown = torch.tensor([[1, 12], [3, 4]])
    got, wanted = compiled(x, grown), module(x, grown)
    assert got[0].isnan().all()
    assert (got[1] - wanted[1]).abs().max() <= 1e-12 * wanted.abs().max()
    assert wanted.isfinite().all()


@pytest.mark.parametrize("form", [None, "keys", "absorbed"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_one_size_compiles_and_exports(name, form):
    module = resampler(name, form)
    x = torch.randn(2, 16 + module.has_cls, 32, dtype=torch.float64)
    wanted = features(module(x))
    exported = torch.export.export(module, (x,)).module()
    assert torch.equal(features(exported(x)), wanted)
    torch.compiler.reset()  # one forward compiled for more modules than PyTorch allows
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    # A table is resized in fp32, compiled by other steps.
    assert (features(compiled(x)) - wanted).abs().max() <= 1e-6 * wanted.abs().max()


BAD = [
    ({"grid": [(3, 4)] * 3}, "there are 4 images, but 3 grids"),
    ({"grid": [(3, 4), (5, 4), (1, 12), (4, 5)]}, "image 3: grid 4x5 has 20 cells"),
    ({}, "image 0: 12 visual tokens .* form no square"),
    ({"grid": GRIDS, "attn_mask": torch.zeros(5, 12)}, "take no masks"),
    ({"grid": GRIDS, "key_padding_mask": torch.zeros(4, 12).bool()}, "take no masks"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_grids(options, message):
    module = resampler("perceiver without cls")
    with pytest.raises(InputError, match=message):
        module(images_of(module), **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, at: (x, at.long()), TypeError, "cu_seqlens must be int32"),
        (lambda x, at: (x, at + 1), InputError, "must rise from 0 to the 60 rows"),
        (lambda x, at: (x[:-1], at), InputError, "must rise from 0 to the 59 rows"),
        (lambda x, at: (x, at.flip(0)), InputError, "must rise from 0"),
        (lambda x, at: (x, at[[0, 2, 1, 3, 4]]), InputError, "must rise from 0"),
        (lambda x, at: (x, at[[0, 1, 1, 3, 4]]), InputError, "image 1: 0 visual tokens"),
        (lambda x, at: (x, at[None]), InputError, r"cu_seqlens must be \[B \+ 1\]"),
        (lambda x, at: (x[None], at), InputError, r"features must be \[T, C\]"),
        (lambda x, at: (x[:, :5], at), InputError, r"must be \[\.\.\., tokens, 32\]"),
        (lambda x, at: (x, at[:1]), InputError, "must rise from 0 to the 60 rows"),
        (lambda x, at: (x, [0, 60]), TypeError, "cu_seqlens"),
    ],
)
def test_bad_cu_seqlens(change, error, message):
    module = resampler("perceiver without cls")
    rows, starts = change(*packed(images_of(module)))
    with pytest.raises(error, match=message):
        module(rows, cu_seqlens=starts, grid=GRIDS)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images"),
        ([torch.randn(12, 32), torch.randn(12, 32).double()], "image 1 is torch.float64"),
        ([torch.randn(1, 12, 32)], r"image 0 must be \[L, 32\]"),
    ],
)
def test_bad_lists(images, message):
    with pytest.raises(InputError, match=message):
        resampler("kosmos-2").float()(images)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        (torch.tensor([[3, 4]]), InputError, "there are 2 images, but 1 sizes"),
        (torch.tensor([[3, 4], [3, 5]]), InputError, "image 1 cannot have a 3x5 grid"),
        (
            torch.tensor([[3, 4], [0, 5]]),
            InputError,
            r"image 1: grid must .*, got \[0, 5\]",
        ),
        (torch.tensor([3, 4]), InputError, r"sizes must be \[B, 2\]"),
        (
            torch.tensor([[3, 4], [3.5, 2]]),
            InputError,
            r"image 1: grid must .*, got \[3.5, 2.0\]",
        ),
    ],
)
def test_bad_sizes(sizes, error, message):
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    for form in FORMS:
        with torch.no_grad(), pytest.raises(error, match=message):
            resampler("minicpm-v-2.6", form)(x, sizes)


def masks_of(module, queries, kind):
    closed = torch.rand(queries, 16) < 0.4
    closed[1] = True  # a query without keys
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[1, 9:] = True
    additive = torch.randn(2 * module.num_heads, queries, 16, dtype=torch.float64)
    additive = additive.masked_fill(closed, float("-inf"))
    return {
        "padding": {"key_padding_mask": padding},
        "no keys": {"key_padding_mask": padding.logical_not().logical_or(padding)},
        "bool": {"attn_mask": closed, "key_padding_mask": padding},
        "additive": {"attn_mask": additive, "key_padding_mask": padding},
    }[kind]


# Aria's own mask is one of padding, Kosmos-2 takes none.
MASKED = [
    *((name, kind) for name in NAMES[:-1] for kind in ("padding", "no keys")),
    *((name, kind) for name in NAMES[:-2] for kind in ("bool", "additive")),
]


@pytest.mark.parametrize("form", ["keys", "absorbed"])
@pytest.mark.parametrize(("name", "kind"), MASKED)
@torch.no_grad()
def test_masks(name, kind, form):
    """Folded as unfolded: a query whose keys are all masked attends to nothing, never NaN."""
    module = resampler(name)
    folded = fold(module, form=form)
    x = torch.randn(2, 16 + module.has_cls, 32, dtype=torch.float64)
    queries = module(x).shape[1]
    masks = masks_of(module, queries, kind)
    if name == "aria":
        masks = {"attn_mask": masks["key_padding_mask"]}
    wanted, maps = module(x, return_attention=True, **masks)
    assert wanted.isfinite().all()
    got, found = folded(x, return_attention=True, **masks)
    resized = name in ("perceiver", "perceiver without cls", "qwen-vl")
    bound = 1e-6 if resized else 1e-12  # of a table, in fp32
    assert (got - wanted).abs().max() <= bound * wanted.abs().max()
    torch.testing.assert_close(found, maps, rtol=0, atol=bound)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_no_images(name, form):
    module = resampler(name, form)
    x = torch.randn(0, 16 + module.has_cls, 32, dtype=torch.float64)
    one = features(module(torch.randn(1, *x.shape[1:], dtype=torch.float64)))
    assert features(module(x)).shape == (0, *one.shape[1:])
    if name == "minicpm-v-2.6":
        assert module(x, torch.zeros(0, 2, dtype=torch.int32)).shape == (0, *one.shape[1:])


@pytest.mark.parametrize("times", [[[0, 1, 2]], [[0], []], [[0]]])
def test_bad_times(times):
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    with pytest.raises(InputError, match="frames for 2 images"):
        resampler("minicpm-v-2.6")(x, torch.tensor([[3, 4], [3, 4]]), times)


def test_images_with_other_numbers_of_queries():
    module = AriaProjector(32, 40, patch_to_query_dict={12: 3, 20: 5}, num_heads=4).double()
    with pytest.raises(InputError, match=r"images of \[12, 20\] tokens have \[3, 5\] queries"):
        module([torch.randn(12, 32).double(), torch.randn(20, 32).double()])


def test_lengths_that_do_not_cut():
    q, k = torch.randn(3, 2, 8), torch.randn(10, 2, 8)
    for lengths in ([], [4, 5], [4, 6, 0]):
        with pytest.raises(InputError, match="add up to the 10 keys"):
            packed_cross_attention(q, k, k, lengths=lengths)
