"""The projectors through the kernels against the literal oracle, judged by PyTorch's."""

import copy
import math
from functools import cache

import pytest
import torch
from helpers import features, make, rms_error
from rounding import rms, roundings, within

from visproj import use_backend
from visproj.reference import perceiver_projector_ref, projector_ref

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def perceiver(dtype, device, lang_dim=64, **options):
    options = {"num_heads": 2, "query_grid": (3, 5), **options}
    projector = make("perceiver", lang_dim, dtype, device, **options)
    with torch.no_grad():
        # Logits of order 1: where a softmax is almost one key, the gradients behind it nearly
        # cancel, and which of two roundings comes out better is chance.
        projector.attn.in_proj_weight[: 2 * lang_dim] *= 2 / lang_dim**0.5
    return projector


def build(kind, dtype, device):
    return perceiver(dtype, device) if kind == "perceiver" else make(kind, 72, dtype, device)


def check(projector, x, truth, **call):
    """Forward against the oracle, gradients against an fp64 copy on the torch backend.

    Twice PyTorch's error is allowed, for gradients three times, and one more rounding: eps / 2.
    """
    upstream = torch.randn_like(truth)
    exact = copy.deepcopy(projector).double()
    exact_call = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in call.items()
    }

    def formula():
        return gradients(exact, x.double(), upstream, "torch", exact_call)

    wanted, moved = formula(), cache(lambda: roundings(formula, x.dtype))
    assert rms_error(wanted[0], truth) < 1e-6  # positions are resized in fp32
    theirs, mine = (gradients(projector, x, upstream, name, call) for name in ("torch", "triton"))
    names = ["output", "x", *(n for n, p in projector.named_parameters() if p.requires_grad)]
    for i, name in enumerate(names):
        error, accepted = (found[i].double() - wanted[i] for found in (mine, theirs))
        allowed = (3 if i else 2) * rms(accepted) + torch.finfo(x.dtype).eps / 2 * rms(wanted[i])
        within(rms, error, allowed, lambda i=i: moved()[i], name)


def gradients(projector, x, upstream, backend, call):
    x = x.detach().requires_grad_()
    leaves = [x, *(p for p in projector.parameters() if p.requires_grad)]
    with use_backend(backend):
        out = projector(x, **call)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["baseline", "vit", "perceiver"])
def test_parity(kind, dtype, device):
    projector = build(kind, DTYPES[dtype], device)
    x = features(2, 17, dtype=DTYPES[dtype], device=device)
    check(projector, x, projector_ref(projector, x))


SLOW_IN_FP32 = pytest.mark.parametrize(
    "dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)]
)
PERCEIVERS = {
    "no cls": ({"has_cls": False}, 16, None),
    "5x6 of keys": ({}, 31, (5, 6)),
    "5x6 without cls": ({"has_cls": False}, 30, (5, 6)),
    "one token": ({}, 2, None),
    "one query": ({"query_grid": (1, 1)}, 17, None),
    "1 head": ({"num_heads": 1}, 17, None),
    "8 heads": ({"num_heads": 8}, 17, None),
    "head of 104": ({"num_heads": 1, "lang_dim": 104}, 10, None),
    "head of 144": ({"num_heads": 1, "lang_dim": 144}, 10, None),
}


@SLOW_IN_FP32
@pytest.mark.parametrize("case", PERCEIVERS)
def test_perceivers(case, dtype, device):
    options, tokens, grid = PERCEIVERS[case]
    projector = perceiver(DTYPES[dtype], device, **options)
    x = features(2, tokens, dtype=DTYPES[dtype], device=device)
    check(projector, x, projector_ref(projector, x, grid=grid), grid=grid)


def masks(form, device, B=2, H=2, Q=15, L=30):
    hidden = torch.rand(Q, L) < 0.4
    per_head = torch.rand(B * H, Q, L) < 0.4
    scores = torch.randn(B * H, Q, L).masked_fill(per_head, -math.inf)
    dead = hidden.clone()
    dead[3] = True
    padding = torch.arange(L).expand(B, -1) >= torch.tensor([[L], [L - 7]])
    found = {
        "bool": {"attn_mask": hidden},
        "bool per head": {"attn_mask": per_head},
        "additive": {"attn_mask": torch.randn(Q, L)},
        "additive per head": {"attn_mask": scores},
        "padding": {"key_padding_mask": padding},
        "bool and padding": {"attn_mask": hidden, "key_padding_mask": padding},
        "a query without keys": {"attn_mask": dead},
        "an image of padding": {"key_padding_mask": torch.tensor([[False] * L, [True] * L])},
    }[form]
    return {name: mask.to(device) for name, mask in found.items()}


FORMS = [
    *("bool", "bool per head", "additive", "additive per head", "padding", "bool and padding"),
    *("a query without keys", "an image of padding"),
]


@SLOW_IN_FP32
@pytest.mark.parametrize("form", FORMS)
def test_masks(form, dtype, device):
    projector = perceiver(DTYPES[dtype], device)
    x = features(2, 31, dtype=DTYPES[dtype], device=device)
    given = masks(form, device)
    if dtype != "fp32" and form.startswith("additive"):
        given["attn_mask"] = given["attn_mask"].to(DTYPES[dtype])
    truth = projector_ref(projector, x, grid=(5, 6), **given)
    check(projector, x, truth, grid=(5, 6), **given)


def test_attention_maps(device):
    projector = perceiver(torch.float32, device)
    x = features(2, 31, dtype=torch.float32, device=device)
    given = masks("bool and padding", device)
    with use_backend("triton"):
        out, maps = projector(x, grid=(5, 6), return_attention=True, **given)
        assert torch.equal(out, projector(x, grid=(5, 6), **given))
    state = {key: value.double() for key, value in projector.state_dict().items()}
    wanted = perceiver_projector_ref(
        state, x.double(), num_heads=2, query_grid=(3, 5), grid=(5, 6), **given
    )
    assert rms_error(out, wanted[0]) < 1e-5
    assert rms_error(maps, wanted[1]) < 1e-5


def test_leading_dimensions(device):
    projector = perceiver(torch.float32, device)
    x = features(6, 31, dtype=torch.float32, device=device)
    padding = torch.rand(6, 30, device=device) < 0.3
    with use_backend("triton"):
        flat = projector(x, grid=(5, 6), key_padding_mask=padding)
        nested = projector(
            x.view(2, 3, 31, 32), grid=(5, 6), key_padding_mask=padding.view(2, 3, 30)
        )
        assert torch.equal(nested.flatten(0, 1), flat)
        assert projector(x[:0], grid=(5, 6)).shape == (0, 15, 64)


@pytest.mark.parametrize(
    "frozen", ["everything", "features", "kv_proj", "attn", "ln_", "projection", "query"]
)
def test_frozen_parts(frozen, device):
    """The gradients of the rest are what they are with nothing frozen."""
    projector = perceiver(torch.float32, device)
    x = features(2, 17, dtype=torch.float32, device=device).requires_grad_()
    with use_backend("triton"):
        out = projector(x)
        upstream = torch.randn_like(out)
        out.backward(upstream)
        leaves = {"features": x, **dict(projector.named_parameters())}
        wanted = {name: leaf.grad for name, leaf in leaves.items()}
        for name, leaf in leaves.items():
            leaf.grad = None
            if frozen in ("everything", name) or name.startswith(frozen):
                leaf.requires_grad_(False)
        if frozen == "everything":
            projector.query.requires_grad_()
        projector(x).backward(upstream)
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (not leaf.requires_grad)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, wanted[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["baseline", "vit", "perceiver"])
def test_autocast(kind, dtype, device):
    projector = build(kind, torch.float32, device)
    x = features(2, 17, dtype=torch.float32, device=device)
    truth, outputs = projector_ref(projector, x), {}
    for backend in ("torch", "triton"):
        with use_backend(backend), torch.autocast(device.type, dtype):
            outputs[backend] = projector(x)
        outputs[backend].float().square().sum().backward()
    assert outputs["triton"].dtype == outputs["torch"].dtype
    theirs, mine = (rms_error(outputs[backend], truth) for backend in ("torch", "triton"))
    assert mine < 2 * theirs + torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", ["baseline", "vit", "perceiver"])
def test_compiles_whole_and_exports(kind, device):
    torch._dynamo.reset()
    projector = build(kind, torch.float32, device)
    x = features(2, 17, dtype=torch.float32, device=device)
    call = {"grid": (4, 4)} if kind == "perceiver" else {}
    with use_backend("triton"):
        wanted = projector(x, **call)
        compiled = torch.compile(projector, fullgraph=True, backend="aot_eager")
        out = compiled(x, **call)
        out.square().sum().backward()
        exported = torch.export.export(projector, (x,), call)
    # Positions are resized in fp32 and a compiled resize rounds otherwise: 1e-6 before the layers.
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exported.module()(x, **call), wanted, rtol=1e-4, atol=1e-4)
    names = {str(node.target) for node in exported.graph.nodes}
    assert any(name.startswith("visproj.") for name in names)
    assert all(p.grad is not None for p in projector.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["baseline", "vit", "perceiver"])
def test_inference_mode(kind, device):
    projector = build(kind, torch.bfloat16, device).eval()
    x = features(2, 17, dtype=torch.bfloat16, device=device)
    with use_backend("triton"):
        with torch.inference_mode():
            out = projector(x)
        again = projector(x)
        again.sum().backward()  # nothing from inference mode may reach training
    assert rms_error(out, again) < 4 * torch.finfo(torch.bfloat16).eps


def test_one_image_of_nan_leaves_the_others(device):
    projector = perceiver(torch.bfloat16, device)
    x = features(3, 31, dtype=torch.bfloat16, device=device)
    with use_backend("triton"), torch.no_grad():
        clean = projector(x, grid=(5, 6))
        x[1, 7, 3] = math.nan
        out = projector(x, grid=(5, 6))
        x[:, 0] = math.nan  # the CLS row is nobody's
        assert torch.equal(projector(x, grid=(5, 6))[0], clean[0])
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
