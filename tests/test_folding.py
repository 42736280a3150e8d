"""Folded projectors: the same numbers, no gradients, a round trip, and what is refused."""

import copy
import dataclasses

import pytest
import torch
from helpers import features, make, randomise, rms_error
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from benchmarks.peers import UpstreamPerceiver
from visproj import LinearProjector, PerceiverProjector, fold, load_folded, use_backend
from visproj.folding import FoldedLinear, FoldedPerceiver, FoldedViT
from visproj.reference import projector_ref

KINDS = ["baseline", "vit", "perceiver"]
# fp64 with one QR factorisation and products of up to 200 terms; 1e-13 was seen.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def masks_for(form, batch, heads, queries, keys):
    hidden = torch.rand(queries, keys) < 0.4
    added = torch.randn(queries, keys).double()
    padding = torch.zeros(batch, keys, dtype=torch.bool)
    padding[-1, keys // 2 :] = True
    return {
        "none": {},
        "bool": {"attn_mask": hidden},
        "bool per head": {"attn_mask": torch.rand(batch * heads, queries, keys) < 0.4},
        "additive": {"attn_mask": added},
        "additive with -inf": {"attn_mask": added.masked_fill(hidden, -torch.inf)},
        "finfo.min": {"attn_mask": torch.full_like(added, torch.finfo(torch.float64).min)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
        "everything": {"attn_mask": torch.ones(queries, keys, dtype=torch.bool)},
    }[form]


MASKS = [
    "none",
    "bool",
    "bool per head",
    "additive",
    "additive with -inf",
    "finfo.min",
    "padding",
    "both",
    "everything",
]


@pytest.mark.parametrize("kind", KINDS)
def test_identity(kind, device):
    projector = make(kind, device=device)
    x = features(2, 257, device=device)
    torch.testing.assert_close(projector.fold()(x), projector(x), **EXACT)


@dataclasses.dataclass(frozen=True)
class Shape:
    width: int
    heads: int
    head_width: int
    query_grid: tuple
    grid: tuple
    has_cls: bool
    batch: int


SHAPES = st.builds(
    Shape,
    width=st.integers(1, 40),
    heads=st.integers(1, 4),
    head_width=st.sampled_from([4, 8, 12, 36]),
    query_grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    has_cls=st.booleans(),
    batch=st.integers(1, 3),
)


@settings(max_examples=120, deadline=None)
@given(
    shape=SHAPES,
    form=st.sampled_from(MASKS),
    eps=st.sampled_from([1e-12, 1e-5, 0.1]),
    data=st.data(),
)
def test_perceiver_identity(shape, form, eps, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    lang_dim = shape.heads * shape.head_width
    projector = PerceiverProjector(
        shape.width,
        lang_dim,
        query_grid=shape.query_grid,
        num_heads=shape.heads,
        has_cls=shape.has_cls,
    ).double()
    randomise(projector)
    for norm in (projector.ln_q, projector.ln_kv, projector.projection[0]):
        norm.eps = eps
    keys, queries = shape.grid[0] * shape.grid[1], projector.num_queries
    x = features(shape.batch, keys + shape.has_cls, shape.width)
    masks = masks_for(form, shape.batch, shape.heads, queries, keys)
    folded = fold(projector, grid=shape.grid)
    got, got_maps = folded(x, grid=shape.grid, return_attention=True, **masks)
    wanted, wanted_maps = projector(x, grid=shape.grid, return_attention=True, **masks)
    # Weights of deviation 0.3 and near-empty rows: errors grow by up to 1e2 over the layers.
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got_maps, wanted_maps, rtol=1e-10, atol=1e-10)


def test_another_grid_is_resized_after_projection():
    projector = make("perceiver", query_grid=(4, 4))
    x = features(1, 31)
    wanted = projector(x, grid=(5, 6))
    exact = fold(projector, grid=(5, 6))(x, grid=(5, 6))
    other = fold(projector)(x, grid=(5, 6))
    torch.testing.assert_close(exact, wanted, **EXACT)
    # An fp32 resize on either side of a product: fp32 rounding times the weights.
    assert 0 < rms_error(other, wanted) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_leading_dimensions(kind):
    projector = make(kind)
    x = features(6, 26)
    folded = fold(projector)
    torch.testing.assert_close(
        folded(x.unflatten(0, (2, 3))).flatten(0, 1), folded(x), rtol=1e-13, atol=1e-13
    )


def inputs(kind, dtype):
    x = torch.randn(2, 257, 128)
    if kind == "outlier channels":
        x[..., 7] = x[..., 7] * 40 + 40
        x[..., 50] *= 25
        x[..., 33] *= 15
    if kind == "near-constant rows":
        x = 1 + 0.01 * x
    return x.to(dtype)


def gently_random(projector):
    """Fresh weights with some noise on gains and biases, as a trained projector has them."""
    with torch.no_grad():
        for name, parameter in projector.named_parameters():
            if "ln" in name or "projection.0" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return projector


# The mean over seeds of two random errors: in fp32 no worse than eager within 5 %; in bf16 within
# 10 %, for the combined weights are rounded once more than those that they are made of.
ROUNDING = {torch.float32: 1.05, torch.bfloat16: 1.1}


@pytest.mark.parametrize("kind", ["plain", "outlier channels", "near-constant rows"])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", torch.float32),
        ("torch", torch.bfloat16),
        pytest.param("triton", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("triton", torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rounding_against_eager(kind, dtype, backend):
    """Each form on the backend that it is for."""
    ours, theirs = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        projector = gently_random(PerceiverProjector(128, 512)).to(dtype)
        eager = UpstreamPerceiver(128, 512, 4).to(dtype)
        eager.load_state_dict(projector.state_dict())
        x = inputs(kind, dtype)
        with torch.no_grad():
            truth = projector_ref(projector, x)
            with use_backend(backend):
                ours.append(rms_error(fold(projector)(x), truth))
            theirs.append(rms_error(eager(x), truth))
    print(f"{kind} {dtype}: folded {sum(ours) / 4:.2e}, eager {sum(theirs) / 4:.2e}")
    assert sum(ours) <= ROUNDING[dtype] * sum(theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_from_fp32(kind, dtype):
    projector = make(kind, dtype=torch.float32)
    folded = fold(projector, dtype=dtype)
    assert {b.dtype for b in folded.state_dict().values()} == {dtype}
    x = features(1, 257, dtype=dtype)
    # Weights and a chain of at most six activations rounded to this dtype, eps / 2 each.
    assert rms_error(folded(x), projector_ref(projector, x)) < 6 * torch.finfo(dtype).eps


def test_autocast(device):
    projector = gently_random(PerceiverProjector(32, 64, num_heads=2)).to(device)
    x = features(2, 257, dtype=torch.float32, device=device)
    truth = projector_ref(projector, x)
    with torch.autocast(device.type, torch.bfloat16), torch.no_grad():
        out, expected = fold(projector)(x), projector(x)
    assert out.dtype == torch.bfloat16
    # One random error against another of the same kind, over 32768 numbers.
    assert rms_error(out, truth) <= 1.25 * rms_error(expected, truth)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0])
def test_fp16_holds_the_scale_of_empty_rows(scale):
    """1 / sqrt(eps) is 1e6: padded zero rows must not poison their image."""
    projector = PerceiverProjector(32, 64, query_grid=(4, 4), num_heads=2)
    x = torch.randn(2, 17, 32)
    x[:, 10:] = 0
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[:, 9:] = True
    masks = {"key_padding_mask": padding}
    x = (x * scale).half()
    truth = projector_ref(projector, x, **masks)
    got = fold(projector, dtype=torch.float16)(x, **masks)
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        cast = fold(projector)(x.float(), **masks)
    for out in (got, cast):
        # fp16 products of numbers near its smallest: 4 eps, and nothing where all is zero.
        bound = 4 * torch.finfo(torch.float16).eps * truth.abs().max() + 1e-6
        torch.testing.assert_close(out.double(), truth, rtol=0, atol=bound)


def test_fp16_holds_the_norm_of_wide_rows():
    """sqrt(D) times what a number of the unfolded product is would overflow in the factor's."""
    projector = gently_random(PerceiverProjector(32, 1024))
    with torch.no_grad():
        projector.kv_proj.weight[:, 0] = torch.where(torch.arange(1024) % 2 == 0, 1.0, -1.0)
    x = features(1, 17, dtype=torch.float32)
    x[..., 0] = 4096  # times sqrt(1024) is 131072, beyond fp16
    projector, x = projector.half(), x.half()
    truth = projector_ref(projector, x)
    out = fold(projector)(x)
    # A chain of at most six roundings of eps / 2 each, as in half precision from fp32.
    assert rms_error(out, truth) < 6 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_pieces_are_refused(kind):
    """As ZeRO-3 leaves them; gathered they fold."""
    projector = make(kind)
    whole = {name: p.data for name, p in projector.named_parameters()}
    for name, parameter in projector.named_parameters():
        parameter.ds_id, parameter.ds_shape = 0, parameter.shape
        parameter.data = whole[name].new_empty(0)
    with pytest.raises(ValueError, match=r"ZeRO-3 has partitioned its .*; fold inside"):
        fold(projector)
    for name, parameter in projector.named_parameters():
        parameter.data = whole[name]
    x = features(1, 257)
    torch.testing.assert_close(fold(projector)(x), projector(x), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_projector_is_left_alone_and_staleness_is_seen(kind):
    projector = make(kind)
    before = copy.deepcopy(projector.state_dict())
    folded = fold(projector)
    after = projector.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.requires_grad for n, p in projector.named_parameters() if n != "pos_embed")
    assert not folded.is_stale(projector)
    with torch.no_grad():
        next(p for p in projector.parameters() if p.requires_grad).add_(1)
    with pytest.warns(UserWarning, match="changed since it was folded"):
        assert folded.is_stale(projector)
    assert not torch.equal(folded(features(1, 17)), projector(features(1, 17)))


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, tmp_path):
    projector = make(kind)
    options = {"grid": (5, 6)} if kind == "perceiver" else {}
    folded = fold(projector, **options)
    folded.save(tmp_path / "folded.safetensors")
    loaded = load_folded(tmp_path / "folded.safetensors")
    assert type(loaded) is type(folded)
    x = features(2, 31)
    before, after = folded.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # How a product is summed up depends on where in memory its operands begin.
    torch.testing.assert_close(loaded(x, **options), folded(x, **options), rtol=1e-13, atol=1e-13)
    assert not loaded.is_stale(projector)
    with safe_open(tmp_path / "folded.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["class"] in repr(folded)
    if kind == "perceiver":
        assert '"grid": [5, 6]' in metadata["config"]


def test_loading_refuses_other_files(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no folded projector"):
        load_folded(tmp_path / "other.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_casts(kind):
    folded = fold(make(kind))
    x = features(1, 26)
    assert torch.equal(copy.deepcopy(folded)(x), folded(x))
    expected = {"baseline": FoldedLinear, "vit": FoldedViT, "perceiver": FoldedPerceiver}
    assert type(folded) is expected[kind]
    assert rms_error(copy.deepcopy(folded).float()(x.float()), folded(x)) < 1e-5
    assert not any(p.requires_grad for p in folded.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole_and_exports(kind):
    projector = make(kind)
    folded = fold(projector)
    x = features(2, 257)
    wanted = folded(x)
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wanted, **EXACT)
    torch.testing.assert_close(torch.export.export(folded, (x,)).module()(x), wanted, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_refused(kind):
    folded = fold(make(kind))
    x = features(1, 17).requires_grad_()
    with pytest.raises(RuntimeError, match="inference-only and has no gradients"):
        folded(x)
    with torch.no_grad():
        assert torch.equal(folded(x), folded(x.detach()))
    if kind == "perceiver":
        mask = torch.zeros(256, 16, dtype=torch.float64, requires_grad=True)
        with pytest.raises(RuntimeError, match="inference-only and has no gradients"):
            folded(x.detach(), attn_mask=mask)


def hooked(child):
    return lambda p: p.get_submodule(child).register_forward_hook(lambda *_: None)


class Wrapped(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.weight = base.weight

    def forward(self, x):
        return self.base(x) * 2


def wrap(child):
    def change(projector):
        parent, _, name = child.rpartition(".")
        setattr(projector.get_submodule(parent), name, Wrapped(projector.get_submodule(child)))

    return change


def replace_forward(projector):
    projector.forward = lambda x: 0 * x


def set_dropout(projector):
    projector.attn.dropout = 0.1


def replace_attention(**options):
    def change(projector):
        projector.attn = nn.MultiheadAttention(64, 1, **options)

    return change


def quantise(projector):
    weight = projector.kv_proj.weight
    projector.kv_proj.weight = nn.Parameter(weight.data.to(torch.int8), requires_grad=False)


def parametrise(projector):
    nn.utils.parametrizations.weight_norm(projector.kv_proj)


REFUSED = {
    "adapter on kv_proj": (wrap("kv_proj"), "cannot fold kv_proj"),
    "adapter on the last Linear": (wrap("projection.1"), r"cannot fold projection\.1"),
    "adapter on out_proj": (wrap("attn.out_proj"), r"cannot fold attn\.out_proj"),
    "hook on ln_kv": (hooked("ln_kv"), "cannot fold ln_kv"),
    "hook on ln_q": (hooked("ln_q"), "cannot fold ln_q"),
    "hook on attn": (hooked("attn"), "cannot fold attn"),
    "quantised": (quantise, "cannot fold kv_proj"),
    "parametrised": (parametrise, "cannot fold kv_proj"),
    "hook on the projector": (hooked(""), "cannot fold PerceiverProjector: it has forward_hooks"),
    "hook on the tail": (
        hooked("projection"),
        "cannot fold projection of .*: it has forward",
    ),
    "replaced forward": (replace_forward, "its forward was replaced"),
    "no gain": (lambda p: setattr(p, "ln_q", nn.LayerNorm(64, elementwise_affine=False)), "ln_q"),
    "dropout": (set_dropout, "cannot fold attn of .*: its dropout is active"),
    "bias_k": (replace_attention(add_bias_kv=True), "bias_k"),
    "add_zero_attn": (replace_attention(add_zero_attn=True), "add_zero_attn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    change, message = REFUSED[case]
    projector = make("perceiver")
    change(projector)
    with pytest.raises(ValueError, match=message):
        fold(projector)


@pytest.mark.parametrize("kind", ["baseline", "vit"])
def test_refused_tails(kind):
    projector = make(kind)
    child = "0" if kind == "baseline" else "projection.0"
    wrap(child)(projector)
    with pytest.raises(ValueError, match=rf"cannot fold {child} of .*: it is a .*\.Wrapped"):
        fold(projector)


def test_refused_subclass():
    class Doubled(PerceiverProjector):
        def forward(self, *args, **options):
            return 2 * super().forward(*args, **options)

    with pytest.raises(ValueError, match="cannot fold Doubled"):
        fold(Doubled(32, 64))


def test_refused_clip_layers():
    projector = make("vit")
    projector.vis_layer.self_attn.dropout = 0.5
    with pytest.raises(ValueError, match="its dropout is active"):
        fold(projector)
    projector = make("vit")
    hooked("vis_layer.mlp.fc1")(projector)
    with pytest.raises(ValueError, match=r"cannot fold vis_layer\.mlp\.fc1"):
        fold(projector)


def test_refused_types():
    with pytest.raises(TypeError, match="cannot fold a Linear"):
        fold(nn.Linear(2, 3))
    with pytest.raises(TypeError, match="unexpected keyword argument 'grid'"):
        fold(LinearProjector(4, 8), grid=(2, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input(kind):
    folded = fold(make(kind))
    with pytest.raises(ValueError, match=r"must be \[..., tokens, 32\]"):
        folded(features(1, 17, width=31))
    with pytest.raises(TypeError, match="visual features and the folded weights must have one"):
        folded(features(1, 17).float())
    if kind == "perceiver":
        with pytest.raises(ValueError, match="form no square grid"):
            folded(features(1, 18))


def test_without_biases():
    projector = make("perceiver", query_grid=(2, 2))
    projector.kv_proj.bias = None
    projector.attn.in_proj_bias = None
    projector.attn.out_proj.bias = None
    projector.projection[1].bias = None
    x = features(1, 17)
    torch.testing.assert_close(fold(projector, grid=(4, 4))(x), projector(x), **EXACT)
