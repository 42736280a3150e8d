"""Folded projectors through the kernels: the numbers, the launches, and what never exists."""

import copy
import math
from unittest import mock

import pytest
import torch
from helpers import features, make, rms_error
from rounding import rms, roundings, within

from benchmarks import model
from visproj import LinearProjector, PerceiverProjector, fold, graphed, load_folded, use_backend
from visproj.reference import projector_ref

pytest.importorskip("triton", reason="kernels need triton")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KINDS = ["baseline", "vit", "perceiver"]


def build(kind, dtype, device, **options):
    if kind != "perceiver":
        return make(kind, 72, dtype, device)
    return make(kind, 64, dtype, device, **{"num_heads": 2, "query_grid": (3, 5), **options})


def check(projector, x, *, folded=None, **call):
    """Against the fp64 oracle: twice the projector's error in PyTorch and one more rounding."""

    def formula():
        return [projector_ref(projector, x, **call)]

    truth = formula()[0]
    with torch.no_grad():
        with use_backend("torch"):
            accepted = projector(x, **call).double() - truth
        with use_backend("triton"):
            out = (fold(projector) if folded is None else folded)(x, **call)
    assert out.dtype == x.dtype
    allowed = 2 * rms(accepted) + torch.finfo(x.dtype).eps / 2 * rms(truth)
    within(rms, out.double() - truth, allowed, lambda: roundings(formula, x.dtype)[0], "output")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind, dtype, device):
    check(build(kind, DTYPES[dtype], device), features(2, 17, dtype=DTYPES[dtype], device=device))


PERCEIVERS = {
    "no cls": ({"has_cls": False}, 16, None),
    "5x6 of keys": ({}, 31, (5, 6)),
    "one token": ({}, 2, None),
    "one query": ({"query_grid": (1, 1)}, 17, None),
    "8 heads": ({"num_heads": 8}, 17, None),
}


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", PERCEIVERS)
def test_perceivers(case, dtype, device):
    options, tokens, grid = PERCEIVERS[case]
    projector = build("perceiver", DTYPES[dtype], device, **options)
    x = features(2, tokens, dtype=DTYPES[dtype], device=device)
    check(projector, x, grid=grid)
    with use_backend("triton"):
        ready = fold(projector, grid=grid)
    check(projector, x, folded=ready, grid=grid)


@pytest.mark.parametrize("form", ["bool", "additive per head", "padding", "all of an image"])
def test_masks(form, device):
    projector = build("perceiver", torch.bfloat16, device)
    x = features(2, 31, dtype=torch.bfloat16, device=device)
    hidden = torch.rand(15, 30) < 0.4
    hidden[3] = True
    scores = torch.randn(4, 15, 30).masked_fill(torch.rand(4, 15, 30) < 0.4, -math.inf)
    padding = torch.arange(30).expand(2, -1) >= torch.tensor([[30], [23]])
    masks = {
        "bool": {"attn_mask": hidden},
        "additive per head": {"attn_mask": scores.bfloat16()},
        "padding": {"key_padding_mask": padding},
        "all of an image": {"key_padding_mask": torch.tensor([[False] * 30, [True] * 30])},
    }[form]
    check(projector, x, grid=(5, 6), **{name: mask.to(device) for name, mask in masks.items()})


def test_attention_maps(device):
    projector = build("perceiver", torch.float32, device)
    x = features(2, 31, dtype=torch.float32, device=device)
    with use_backend("torch"), torch.no_grad():
        wanted = projector(x, grid=(5, 6), return_attention=True)[1]
    with use_backend("triton"):
        folded = fold(projector)
        out, maps = folded(x, grid=(5, 6), return_attention=True)
        assert torch.equal(out, folded(x, grid=(5, 6)))
    assert rms_error(maps, wanted) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, dtype, device):
    projector = build(kind, torch.float32, device)
    x = features(2, 17, dtype=torch.float32, device=device)
    truth, errors, dtypes = projector_ref(projector, x), {}, set()
    for backend in ("torch", "triton"):
        with use_backend(backend), torch.autocast(device.type, dtype), torch.no_grad():
            out = (projector if backend == "torch" else fold(projector))(x)
        errors[backend] = rms_error(out, truth)
        dtypes.add(out.dtype)
    assert len(dtypes) == 1
    assert errors["triton"] < 2 * errors["torch"] + torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole_and_exports(kind, device):
    torch._dynamo.reset()
    x = features(2, 17, dtype=torch.float32, device=device)
    with use_backend("triton"):
        folded = fold(build(kind, torch.float32, device))
        wanted = folded(x)
        compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")(x)
        exported = torch.export.export(folded, (x,))
    # The eager product in between may be summed up otherwise when compiled: a few ulps.
    torch.testing.assert_close(compiled, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exported.module()(x), wanted, rtol=1e-4, atol=1e-4)
    names = {str(node.target) for node in exported.graph.nodes}
    operation = "folded_linear_fwd" if kind == "perceiver" else "linear_layer_norm_fwd"
    assert f"visproj.{operation}.default" in names


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_and_copies(kind, tmp_path, device):
    x = features(2, 17, dtype=torch.bfloat16, device=device)
    with use_backend("triton"):
        folded = fold(build(kind, torch.bfloat16, device))
        folded.save(tmp_path / "folded.safetensors")
        loaded = load_folded(tmp_path / "folded.safetensors", device=device)
        wanted = folded(x)
        for other in (loaded, copy.deepcopy(folded)):
            before, after = folded.state_dict(), other.state_dict()
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
            # How PyTorch's products, as in the ViT's layer, sum up depends on where in memory their
            # operands begin: one rounding more or less.
            assert rms_error(other(x), wanted) <= torch.finfo(torch.bfloat16).eps


def written(folded, x):
    """Shapes of what every launch on activations writes, from a run on fake tensors."""
    shapes, add = [], model._Recorder._add

    def recording(self, name, flops, read, outputs, *more):
        add(self, name, flops, read, outputs, *more)
        if not self.launches[-1].weights_only:
            shapes.append((name, [tuple(t.shape) for t in outputs]))

    with mock.patch.object(model._Recorder, "_add", recording), use_backend("triton"):
        model.costs(folded, [x], trains=False)
    return shapes


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("has_cls", [True, False])
def test_five_launches_and_nothing_wide_between(batch, has_cls):
    """Keys and values, the attention's output and the result are all that is D wide."""
    C, D, L, Q = 128, 512, 256, 256
    projector = PerceiverProjector(C, D, num_heads=4, has_cls=has_cls).bfloat16()
    x = torch.randn(batch, L + has_cls, C, dtype=torch.bfloat16)
    shapes = written(fold(projector), x)
    assert [name for name, _ in shapes] == [
        *("_linear_fwd_kernel",) * 2,
        "_cross_attention_fwd_kernel",
        *("_linear_fwd_kernel",) * 2,
    ]
    rows = batch * L
    squares = [(parts, rows) for parts in (1, 4)]
    assert [outputs for _, outputs in shapes] == [
        [squares[0]],
        [(batch, L, 2 * D)],
        [(batch, Q, 4, 128)],
        [squares[1]],
        [(batch, Q, D)],
    ]


def test_two_launches_of_a_linear():
    projector = LinearProjector(128, 512).bfloat16()
    x = torch.randn(2, 257, 128, dtype=torch.bfloat16)
    shapes = written(fold(projector), x)
    assert [name for name, _ in shapes] == ["aten.addmm", "_layer_norm_fwd_kernel"]


def test_the_queries_cost_nothing_an_image():
    """FLOPs are those of an image times their number."""
    folded = fold(PerceiverProjector(128, 512, num_heads=4).bfloat16())
    with use_backend("triton"):
        one, four = (
            model.costs(folded, [torch.randn(b, 257, 128).bfloat16()], trains=False)["forward"]
            for b in (1, 4)
        )
    assert four.flops == 4 * one.flops
    assert not any(launch.weights_only and launch.flops for launch in four.launches)


def test_a_triangle_costs_half():
    """Tiles that lie whole below the diagonal are skipped: 5/8 of a square of 4 x 4 tiles."""
    keys_and_values = fold(PerceiverProjector(512, 1024).bfloat16()).kv
    x = torch.randn(1, 256, 512, dtype=torch.bfloat16)
    with use_backend("triton"):
        cost = model.costs(keys_and_values, [x], trains=False)["forward"]
    assert [launch.flops for launch in cost.launches] == [
        2 * 256 * 512 * 512 * 5 // 8,
        2 * 256 * 512 * 2048,
    ]


def test_a_graph_needs_a_gpu():
    projector = make("baseline", dtype=torch.float32)
    with pytest.raises(ValueError, match="a CUDA graph needs a CUDA device"):
        graphed(fold(projector), features(1, 17, dtype=torch.float32))


def test_a_graph_outlives_no_casts():
    """Autocast frees the casts it keeps when it ends, and a graph would go on reading them."""
    projector = make("baseline", dtype=torch.float32)
    on_a_gpu = mock.Mock(device=torch.device("cuda", 0))
    with (
        mock.patch("visproj.folding.graphs.check_floating"),
        mock.patch("visproj.folding.graphs.check_device"),
        mock.patch.object(torch, "is_autocast_enabled", return_value=True),
        pytest.raises(RuntimeError, match="cache_enabled=False"),
    ):
        graphed(projector, on_a_gpu)
