"""Every projector against the literal oracle, upstream's modules and transformers."""

import pytest
import torch
from helpers import features, make, randomise, rms_error
from torch import nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from benchmarks.peers import UpstreamPerceiver
from visproj import LinearProjector, PerceiverProjector, ViTProjector, build_projector
from visproj.reference import perceiver_projector_ref, projector_ref

# fp64 with values of order 1 and sums of up to 400 terms; a tenth of this was seen.
EXACT = {"rtol": 1e-12, "atol": 1e-12}

PERCEIVERS = {
    "upstream": ({}, 257, None),
    "no cls": ({"has_cls": False}, 256, None),
    "24x24": ({}, 577, None),
    "24x32": ({}, 769, (24, 32)),
    "8x32": ({}, 257, (8, 32)),
    "one token": ({}, 2, None),
    "3x5 queries": ({"query_grid": (3, 5)}, 17, None),
    "1 head": ({"num_heads": 1}, 50, None),
    "16 heads": ({"num_heads": 16}, 50, None),
    "wide no cls": ({"has_cls": False, "query_grid": (2, 2)}, 35, (5, 7)),
}


@pytest.mark.parametrize("kind", ["baseline", "vit"])
@pytest.mark.parametrize("tokens", [1, 2, 50, 257])
@pytest.mark.parametrize("lang_dim", [1, 48, 199])
def test_baseline_and_vit(kind, tokens, lang_dim, device):
    projector = make(kind, lang_dim, device=device)
    x = features(2, tokens, device=device)
    torch.testing.assert_close(projector(x), projector_ref(projector, x), **EXACT)


@pytest.mark.parametrize("case", PERCEIVERS)
def test_perceiver(case, device):
    options, tokens, grid = PERCEIVERS[case]
    projector = make("perceiver", device=device, **(options or {"has_cls": True}))
    x = features(2, tokens, device=device)
    torch.testing.assert_close(
        projector(x, grid=grid), projector_ref(projector, x, grid=grid), **EXACT
    )


@pytest.mark.parametrize("lang_dim", [64, 576, 1000])
def test_perceiver_widths(lang_dim):
    heads = {64: 1, 576: 4, 1000: 8}[lang_dim]
    projector = make("perceiver", lang_dim, num_heads=heads, query_grid=(4, 4))
    x = features(1, 17)
    torch.testing.assert_close(projector(x), projector_ref(projector, x), **EXACT)


def masks_for(form, batch, heads, queries, keys):
    per_head = (batch * heads, queries, keys)
    hidden = torch.rand(queries, keys) < 0.4
    padding = torch.arange(keys).expand(batch, -1) >= torch.tensor([[keys], [keys - 3]])
    return {
        "bool": {"attn_mask": hidden},
        "bool per head": {"attn_mask": torch.rand(per_head) < 0.4},
        "additive": {"attn_mask": torch.randn(queries, keys).double()},
        "additive per head": {"attn_mask": torch.randn(per_head).double()},
        "additive with -inf": {
            "attn_mask": torch.randn(queries, keys).double().masked_fill(hidden, -torch.inf)
        },
        "padding": {"key_padding_mask": padding},
        "bool and padding": {"attn_mask": hidden, "key_padding_mask": padding},
        "everything": {"attn_mask": torch.ones(queries, keys, dtype=torch.bool)},
    }[form]


MASK_FORMS = [
    "bool",
    "bool per head",
    "additive",
    "additive per head",
    "additive with -inf",
    "padding",
    "bool and padding",
    "everything",
]


@pytest.mark.parametrize("form", MASK_FORMS)
@pytest.mark.parametrize("has_cls", [True, False], ids=["cls", "no cls"])
def test_perceiver_masks_and_maps(form, has_cls):
    projector = make("perceiver", num_heads=4, query_grid=(3, 3), has_cls=has_cls)
    x = features(2, 12 + has_cls)
    masks = masks_for(form, 2, 4, 9, 12)
    out, maps = projector(x, grid=(3, 4), return_attention=True, **masks)
    wanted, wanted_maps = perceiver_projector_ref(
        projector.state_dict(),
        x,
        num_heads=4,
        query_grid=(3, 3),
        grid=(3, 4),
        has_cls=has_cls,
        **masks,
    )
    torch.testing.assert_close(out, wanted, **EXACT)
    torch.testing.assert_close(maps, wanted_maps, **EXACT)
    assert torch.equal(out, projector(x, grid=(3, 4), **masks))


@pytest.mark.parametrize("masks", [{}, {"attn_mask": "bool"}, {"attn_mask": "additive"}], ids=str)
def test_perceiver_is_upstreams_multihead_attention(masks):
    """State dicts pass both ways and ``nn.MultiheadAttention`` agrees, masks included."""
    eager = randomise(UpstreamPerceiver(32, 64, 4)).double()
    projector = PerceiverProjector(32, 64, num_heads=4).double()
    assert set(projector.state_dict()) == set(eager.state_dict())
    projector.load_state_dict(eager.state_dict(), strict=True)
    masks = {name: masks_for(form, 2, 4, 256, 256)[name] for name, form in masks.items()}
    x = features(2, 257)
    torch.testing.assert_close(projector(x, **masks), eager(x, **masks), **EXACT)


@pytest.mark.parametrize("kind", ["baseline", "vit", "perceiver"])
def test_gradients_are_the_oracles(kind):
    projector = make(kind, query_grid=(3, 3)) if kind == "perceiver" else make(kind)
    x = features(2, 17).requires_grad_()
    upstream = torch.randn_like(projector(x))
    trained = [p for p in projector.parameters() if p.requires_grad]
    got = torch.autograd.grad(projector(x), [x, *trained], upstream)

    state = {
        k: v.clone().requires_grad_(v.is_floating_point())
        for k, v in projector.state_dict().items()
    }
    oracle = _OracleView(projector, state)
    names = [name for name, p in projector.named_parameters() if p.requires_grad]
    wanted = torch.autograd.grad(oracle(x), [x, *(state[n] for n in names)], upstream)
    for name, a, b in zip(["x", *names], got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


class _OracleView:
    """The oracle over tensors that record gradients."""

    def __init__(self, projector, state):
        self.projector, self.state = projector, state

    def __call__(self, x):
        from visproj import reference

        if isinstance(self.projector, PerceiverProjector):
            p = self.projector
            return reference.perceiver_projector_ref(
                self.state, x, num_heads=p.num_heads, query_grid=p.query_grid
            )[0]
        if isinstance(self.projector, ViTProjector):
            return reference.vit_projector_ref(self.state, x, num_heads=4)
        return reference.linear_projector_ref(self.state, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["baseline", "vit", "perceiver"])
def test_rounding_is_no_worse_than_eager(kind, dtype, device):
    """DESIGN's contract for whole projectors: judged against eager modules of the same dtype."""
    projector = make(kind, 128, dtype, device)
    x = features(2, 257, dtype=dtype, device=device)
    truth = projector_ref(projector, x)
    if kind == "perceiver":
        eager = UpstreamPerceiver(32, 128, 1).to(device, dtype)
        eager.load_state_dict(projector.state_dict())
        expected = eager(x)
    elif kind == "vit":
        expected = projector.projection(projector.vis_layer(x))
    else:
        expected = nn.Sequential(*projector)(x)
    # The floor: fp32 errors of 1e-7 differ by their order of summation alone.
    floor = torch.finfo(torch.float32).eps
    assert rms_error(projector(x), truth) <= 2 * rms_error(expected, truth) + floor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["baseline", "vit", "perceiver"])
def test_autocast_is_that_of_the_modules(kind, dtype, device):
    projector = make(kind, dtype=torch.float32, device=device)
    x = features(2, 257, dtype=torch.float32, device=device)
    truth = projector_ref(projector, x)
    with torch.autocast(device.type, dtype):
        out = projector(x)
        tail = projector[1] if kind == "baseline" else projector.projection[1]
        wanted = tail(torch.randn(3, tail.weight.shape[-1], device=device).to(dtype)).dtype
    assert out.dtype == wanted
    # A chain of at most six roundings to this dtype, each at most eps / 2.
    assert rms_error(out, truth) < 6 * torch.finfo(dtype).eps


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu", "gelu_pytorch_tanh", "relu", "silu"])
@pytest.mark.parametrize("implementation", [None, "eager", "sdpa"])
def test_clip_layer_is_transformers(hidden_act, implementation):
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, hidden_act=hidden_act
    )
    ours = ViTProjector(config, 20)
    config._attn_implementation = implementation or "sdpa"
    theirs = randomise(CLIPEncoderLayer(config))
    ours.vis_layer.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 50, 32)
    # The third argument went away in transformers 5, and with it the tuple around the result.
    extra = (None,) if "causal_attention_mask" in theirs.forward.__code__.co_varnames else ()
    wanted = theirs(x, None, *extra)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    # fp32 rounding: 2**-24 a step, a handful of steps.
    assert rms_error(ours.vis_layer(x), wanted) < 5e-7


def test_one_seed_gives_upstreams_weights():
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4)
    config._attn_implementation = "sdpa"
    torch.manual_seed(7)
    theirs = nn.ModuleDict(
        {
            "vis_layer": CLIPEncoderLayer(config),
            "projection": nn.Sequential(nn.Linear(32, 20), nn.LayerNorm(20, eps=1e-12)),
        }
    )
    torch.manual_seed(7)
    ours = ViTProjector(config, 20)
    assert_same_state(ours, theirs)

    torch.manual_seed(7)
    theirs = UpstreamPerceiver(32, 64, 4)
    torch.manual_seed(7)
    assert_same_state(PerceiverProjector(32, 64, num_heads=4), theirs)

    torch.manual_seed(7)
    theirs = nn.Sequential(nn.Linear(32, 20), nn.LayerNorm(20, eps=1e-12))
    torch.manual_seed(7)
    assert_same_state(LinearProjector(32, 20), theirs)


def assert_same_state(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def test_initialisation_follows_upstreams_rule():
    projector = PerceiverProjector(256, 512)
    for weight in (projector.query, projector.kv_proj.weight, projector.attn.out_proj.weight):
        # 131072 samples or more: the deviation's own deviation is below 0.02 / sqrt(2 * 131072).
        assert weight.std().item() == pytest.approx(0.02, rel=0.01)
        assert weight.mean().abs() < 3e-4
    xavier = (6 / (512 + 3 * 512)) ** 0.5
    assert projector.attn.in_proj_weight.abs().max().item() == pytest.approx(xavier, rel=1e-3)
    assert not projector.kv_proj.bias.any()
    assert not projector.attn.in_proj_bias.any()
    assert not projector.pos_embed.requires_grad


@pytest.mark.slow
def test_released_size():
    """CLIP-L/14 to a language model of 4096, the size that DeepSpeed-VisualChat trains."""
    config = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_attention_heads=16)
    for kind in ("baseline", "vit", "perceiver"):
        projector = build_projector(kind, config, 4096)
        x = torch.randn(1, 257, 1024)
        # fp32 against fp64 over reductions of 4096 terms.
        assert rms_error(projector(x), projector_ref(projector, x)) < 3e-6
