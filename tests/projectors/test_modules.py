"""The projectors as modules: keys, copies, dtypes, caches, compilers, and bad input."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from helpers import VIS_CONFIG, features, make
from torch import nn
from transformers import CLIPConfig, CLIPVisionConfig

import visproj
from visproj import LinearProjector, PerceiverProjector, ViTProjector, build_projector

CLIP_KEYS = {
    f"vis_layer.{module}.{leaf}"
    for module in (
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.q_proj",
        "self_attn.out_proj",
        "layer_norm1",
        "layer_norm2",
        "mlp.fc1",
        "mlp.fc2",
    )
    for leaf in ("weight", "bias")
}
TAIL = {"projection.0.weight", "projection.0.bias", "projection.1.weight", "projection.1.bias"}
KEYS = {
    "baseline": {"0.weight", "0.bias", "1.weight", "1.bias"},
    "vit": CLIP_KEYS | TAIL,
    "perceiver": TAIL
    | {
        "query",
        "pos_embed",
        "kv_proj.weight",
        "kv_proj.bias",
        "attn.in_proj_weight",
        "attn.in_proj_bias",
        "attn.out_proj.weight",
        "attn.out_proj.bias",
        "ln_q.weight",
        "ln_q.bias",
        "ln_kv.weight",
        "ln_kv.bias",
    },
}
KINDS = list(KEYS)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_keys_and_strict_loading(kind):
    projector = make(kind)
    state = projector.state_dict()
    assert set(state) == KEYS[kind]
    fresh = build_projector(kind, VIS_CONFIG, 64).double()
    fresh.load_state_dict(state, strict=True)
    x = features(2, 257)
    assert torch.equal(fresh(x), projector(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_key_is_named(kind):
    projector = make(kind)
    state = projector.state_dict()
    missing = sorted(state)[0]
    del state[missing]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        projector.load_state_dict(state)


def test_aliases():
    assert visproj.VisProjection_vit is ViTProjector
    assert visproj.VisProjection_perceiver is PerceiverProjector


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_equal_and_separate(kind, duplicate):
    projector = make(kind)
    x = features(1, 50)
    wanted = projector(x)
    other = duplicate(projector)
    assert torch.equal(other(x), wanted)
    with torch.no_grad():
        next(iter(other.parameters())).add_(1)
    assert torch.equal(projector(x), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_leading_dimensions(kind):
    projector = make(kind)
    x = features(6, 26)
    flat = projector(x)
    torch.testing.assert_close(
        projector(x.unflatten(0, (2, 3))).flatten(0, 1), flat, rtol=1e-13, atol=1e-13
    )
    torch.testing.assert_close(projector(x[4]), flat[4], rtol=1e-13, atol=1e-13)
    assert projector(x[:0]).shape == (0, *flat.shape[1:])


def test_leading_dimensions_of_masks_and_maps():
    projector = make("perceiver", query_grid=(2, 2), num_heads=2)
    x = features(6, 10)
    padding = torch.arange(9).expand(6, -1) > torch.arange(3, 9)[:, None]
    flat, flat_maps = projector(x, key_padding_mask=padding, return_attention=True)
    out, maps = projector(
        x.unflatten(0, (2, 3)),
        key_padding_mask=padding.unflatten(0, (2, 3)),
        return_attention=True,
    )
    torch.testing.assert_close(out.flatten(0, 1), flat, rtol=1e-13, atol=1e-13)
    assert maps.shape == (2, 3, 2, 4, 9)
    torch.testing.assert_close(maps.flatten(0, 1), flat_maps, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_any_strides(kind):
    projector = make(kind)
    x = features(2, 50)
    strided = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    torch.testing.assert_close(projector(strided), projector(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_to_casts_everything(kind, dtype, device):
    projector = make(kind, dtype=dtype, device=device)
    assert {p.dtype for p in projector.parameters()} == {dtype}
    assert projector(features(1, 17, dtype=dtype, device=device)).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_meta_device_and_default_dtype(kind):
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            projector = build_projector(kind, VIS_CONFIG, 64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(p.dtype, p.device.type) for p in projector.parameters()} == {(torch.bfloat16, "meta")}
    out = projector(torch.empty(2, 257, 32, dtype=torch.bfloat16, device="meta"))
    assert out.shape == (2, 256 if kind == "perceiver" else 257, 64)


def test_slicing_the_baseline_gives_plain_modules():
    projector = make("baseline")
    x = features(1, 3)
    assert type(projector[:1]) is nn.Sequential
    assert torch.equal(projector[:1](x), projector[0](x))
    assert projector[-1] is list(projector)[1]
    projector.append(nn.ReLU())
    assert (projector(x) >= 0).all()


class TestPositions:
    """The resized table follows the parameter through everything that can happen to it."""

    @pytest.fixture(autouse=True, params=["train", "eval"])
    def prepare(self, request):
        self.projector = make("perceiver", query_grid=(4, 4)).train(request.param == "train")
        self.x = features(1, 31)

    def forward(self):
        return self.projector(self.x, grid=(5, 6))

    def test_follows_loading(self):
        self.forward()
        state = self.projector.state_dict()
        state["pos_embed"] = state["pos_embed"] * 2
        self.projector.load_state_dict(state)
        fresh = make("perceiver", query_grid=(4, 4))
        fresh.load_state_dict(state)
        assert torch.equal(self.forward(), fresh(self.x, grid=(5, 6)))

    def test_follows_assignment(self):
        before = self.forward()
        state = {
            k: v * 2 if k == "pos_embed" else v for k, v in self.projector.state_dict().items()
        }
        self.projector.load_state_dict(state, assign=True)
        assert not torch.allclose(self.forward(), before)

    def test_follows_writes_through_data_in_training(self):
        self.projector.train()
        before = self.forward()
        self.projector.pos_embed.data.mul_(-1)
        assert not torch.allclose(self.forward(), before)

    def test_is_remembered_in_eval_mode(self):
        self.projector.eval()
        assert torch.equal(self.forward(), self.forward())
        assert len(self.projector._positions._entries) == 1

    def test_follows_dtype(self):
        self.forward()
        self.projector.float()
        self.x = self.x.float()
        assert self.forward().dtype == torch.float32

    def test_inference_then_training(self):
        with torch.inference_mode():
            wanted = self.forward().clone()
        out = self.forward()
        out.square().sum().backward()
        # fp64: a product in training may be summed up in another order than one in inference.
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
        assert self.projector.kv_proj.weight.grad.abs().max() > 0

    def test_functional_call_uses_the_table_it_is_given(self):
        before = self.forward()
        state = dict(self.projector.state_dict())
        state["pos_embed"] = state["pos_embed"] * 2
        other = torch.func.functional_call(self.projector, state, (self.x,), {"grid": (5, 6)})
        assert not torch.allclose(other, before)
        assert torch.equal(self.forward(), before)

    def test_is_not_in_the_state_dict(self):
        self.forward()
        assert set(self.projector.state_dict()) == KEYS["perceiver"]


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole_and_exports(kind):
    projector = make(kind)
    kwargs = {"grid": (5, 6)} if kind == "perceiver" else {}
    x = features(2, 31)
    wanted = projector(x, **kwargs)
    compiled = torch.compile(projector, fullgraph=True, backend="aot_eager")
    # Positions are resized in fp32 and a compiled resize rounds otherwise: 1e-6 before the layers.
    torch.testing.assert_close(compiled(x, **kwargs), wanted, rtol=1e-4, atol=1e-4)
    compiled(x, **kwargs).square().sum().backward()
    assert all(p.grad is not None for p in projector.parameters() if p.requires_grad)

    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"x": {0: batch}, **dict.fromkeys(kwargs, (None, None))}
    exported = torch.export.export(projector, (x,), kwargs, dynamic_shapes=shapes)
    larger = features(5, 31)
    torch.testing.assert_close(exported.module()(larger, **kwargs), projector(larger, **kwargs))


def test_compiled_grids_recompile_at_most_once():
    """A second grid makes the graph dynamic; the third and fourth run on it."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    projector = make("perceiver", query_grid=(2, 2), dtype=torch.float32)
    counter = CompileCounter()
    compiled = torch.compile(projector, fullgraph=True, backend=counter)
    for rows, columns in ((3, 4), (5, 6), (7, 5), (4, 9)):
        x = features(2, rows * columns + 1, dtype=torch.float32)
        torch.testing.assert_close(
            compiled(x, grid=(rows, columns)), projector(x, grid=(rows, columns))
        )
    assert counter.frame_count <= 2


@pytest.mark.parametrize("folded", [False, True], ids=["plain", "folded"])
def test_compiled_square_grids(folded):
    """Without an explicit grid the number of tokens may vary as well."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    projector = make("perceiver", query_grid=(2, 2), dtype=torch.float32)
    projector = projector.fold() if folded else projector
    counter = CompileCounter()
    compiled = torch.compile(projector, fullgraph=True, backend=counter)
    for side in (3, 4, 5, 6):
        x = features(2, side * side + 1, dtype=torch.float32)
        # The folded form's rows of 1 / sqrt(variance) see another order of summation.
        torch.testing.assert_close(compiled(x), projector(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap over CPU SDPA
def test_ensembles_of_projectors():
    """``vmap`` over stacked weights, on a grid that needs resized positions."""
    members = [make("perceiver", query_grid=(2, 2)).eval() for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(members)
    x = features(1, 10)

    def call(parameters, buffers):
        return torch.func.functional_call(members[0], (parameters, buffers), (x,))

    got = torch.vmap(call)(parameters, buffers)
    for one, member in zip(got, members, strict=True):
        torch.testing.assert_close(one, member(x), rtol=1e-12, atol=1e-12)


def test_attention_maps_on_the_meta_device():
    with torch.device("meta"):
        projector = PerceiverProjector(32, 64, num_heads=2)
        _, maps = projector(torch.empty(2, 17, 32), return_attention=True)
    assert maps.shape == (2, 2, 256, 16)


def test_attention_is_computed_on_request_only():
    projector = make("perceiver", query_grid=(8, 8), num_heads=4, dtype=torch.float32)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(
                t.shape for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t)
            )
            return out

    with Watch():
        projector(features(2, 65, dtype=torch.float32))
    assert (2, 4, 64, 64) not in largest
    assert (8, 64, 64) not in largest
    _, maps = projector(features(2, 65, dtype=torch.float32), return_attention=True)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 64))


def test_queries_are_projected_once_a_call():
    """The FLOPs of every product with the queries must not grow with the batch."""
    from torch.utils.flop_counter import FlopCounterMode

    projector = make("perceiver", query_grid=(8, 8), dtype=torch.float32)

    def flops(batch):
        with FlopCounterMode(display=False) as counter:
            projector(features(batch, 17, dtype=torch.float32))
        return counter.get_total_flops()

    shared = 2 * 64 * 64 * 64  # one [Q, D] x [D, D] product
    assert 2 * flops(4) - flops(8) == shared


WIDTH = r"must be \[..., tokens, 32\], got shape"
BAD_FORWARD = {
    "integer features": (TypeError, "floating point, got torch.int64", lambda x: x.long()),
    "not a tensor": (TypeError, "must be a tensor, got list", lambda x: x.tolist()),
    "wrong width": (ValueError, WIDTH, lambda x: x[..., :31]),
    "one dimension": (ValueError, WIDTH, lambda x: x[0, 0]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", BAD_FORWARD)
def test_bad_features(kind, case):
    error, message, spoil = BAD_FORWARD[case]
    with pytest.raises(error, match=message):
        make(kind)(spoil(features(2, 17)))


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_devices_and_dtypes(kind):
    with pytest.raises(ValueError, match=r"must be on one device, got .*meta"):
        make(kind)(features(2, 17).to("meta"))
    with pytest.raises(TypeError, match=r"must have one dtype, got .*torch\.float32"):
        make(kind)(features(2, 17).float())


BAD_PERCEIVER = {
    "no square": ({}, ValueError, "768 visual tokens .* form no square grid"),
    "grid": ({"grid": (24, 33)}, ValueError, "24x33 has 792 cells, but there are 768"),
    "mask shape": (
        {"grid": (24, 32), "attn_mask": torch.zeros(256, 769)},
        ValueError,
        r"\[Q, L\] = \[256, 768\] .* got \[256, 769\]",
    ),
    "mask dtype": (
        {"grid": (24, 32), "attn_mask": torch.zeros(256, 768, dtype=torch.uint8)},
        TypeError,
        "bool or floating point, got torch.uint8",
    ),
    "padding shape": (
        {"grid": (24, 32), "key_padding_mask": torch.zeros(2, 769, dtype=torch.bool)},
        ValueError,
        r"\[B, L\] = \[2, 768\], got \[2, 769\]",
    ),
}


@pytest.mark.parametrize("case", BAD_PERCEIVER)
@pytest.mark.parametrize("replaced", [False, True], ids=["plain", "replaced attention"])
def test_bad_perceiver_input(case, replaced):
    options, error, message = BAD_PERCEIVER[case]
    projector = make("perceiver")
    if replaced:
        projector.attn.register_forward_hook(lambda *_: None)
    with pytest.raises(error, match=message):
        projector(features(2, 769), **options)


BAD_CONSTRUCTION = {
    "heads of 960": (
        lambda: PerceiverProjector(32, 960),
        ValueError,
        r"7 heads do not divide .* 960.*\[1, 2, 3",
    ),
    "heads of 1600": (lambda: PerceiverProjector(32, 1600), ValueError, "12 heads do not divide"),
    "no heads": (lambda: PerceiverProjector(32, 64, num_heads=0), ValueError, "0 heads"),
    "width of 2": (lambda: PerceiverProjector(32, 66), ValueError, "divisible by 4, got 66"),
    "query grid": (
        lambda: PerceiverProjector(32, 64, query_grid=(0, 4)),
        ValueError,
        "two positive",
    ),
    "lang_dim": (lambda: LinearProjector(32, 0), ValueError, "lang_dim must be positive, got 0"),
    "vision width": (lambda: LinearProjector(-1, 8), ValueError, "vision width must be positive"),
    "string config": (lambda: LinearProjector("32", 8), TypeError, "got str"),
    "whole clip config": (lambda: LinearProjector(CLIPConfig(), 8), TypeError, "vision_config"),
    "vit from a width": (lambda: ViTProjector(32, 8), TypeError, "lacks hidden_size"),
    "vit without mlp": (
        lambda: ViTProjector(
            SimpleNamespace(
                **{k: v for k, v in vars(VIS_CONFIG).items() if k != "intermediate_size"}
            ),
            8,
        ),
        TypeError,
        "lacks intermediate_size",
    ),
    "vit activation": (
        lambda: ViTProjector(SimpleNamespace(**{**vars(VIS_CONFIG), "hidden_act": "swish9"}), 8),
        ValueError,
        "hidden_act must be one of .* got 'swish9'",
    ),
    "vit heads": (
        lambda: ViTProjector(SimpleNamespace(**{**vars(VIS_CONFIG), "num_attention_heads": 5}), 8),
        ValueError,
        "5 heads do not divide a width of 32",
    ),
    "kind": (
        lambda: build_projector("mlp", 32, 8),
        ValueError,
        "unknown projector kind 'mlp'.*baseline, vit, perceiver",
    ),
    "encoder": (
        lambda: build_projector("vit", 32, 8, encoder="sam"),
        ValueError,
        "unknown encoder 'sam'",
    ),
    "qwen perceiver": (
        lambda: build_projector("perceiver", 32, 64, encoder="qwen-vl"),
        ValueError,
        "Perceiver resampler of its own",
    ),
}


@pytest.mark.parametrize("case", BAD_CONSTRUCTION)
def test_bad_construction(case):
    construct, error, message = BAD_CONSTRUCTION[case]
    with pytest.raises(error, match=message):
        construct()


def test_build_projector():
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4)
    built = {kind: type(build_projector(kind, config, 64)) for kind in KINDS}
    assert built == {
        "baseline": LinearProjector,
        "vit": ViTProjector,
        "perceiver": PerceiverProjector,
    }
    assert type(build_projector("baseline", 32, 64, encoder="qwen-vl")) is LinearProjector


@pytest.mark.parametrize(("width", "heads"), [(64, 1), (128, 1), (576, 4), (1024, 8), (4096, 32)])
def test_default_heads(width, heads):
    with torch.device("meta"):
        assert PerceiverProjector(32, width).num_heads == heads
