"""The custom operations as PyTorch sees them: registration, autograd, tracing."""

import importlib

import pytest
import torch
from helpers import rms_error

from visproj import ops, use_backend

# The package's attributes of these names are the public functions.
linear_layer_norm, linear_norm_linear, attention, packed_attention, folded_linear = (
    importlib.import_module(f"visproj.ops.{name}")
    for name in (
        "linear_layer_norm",
        "linear_norm_linear",
        "cross_attention",
        "packed_cross_attention",
        "folded_linear",
    )
)

B, L, C, D, N = 2, 5, 8, 12, 16
Q, H, W = 3, 2, 4


def random(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


def norm_inputs(**options):
    return [random(*shape, **options) for shape in ((B, L, C), (D, C), (D,), (D,), (D,))]


def chain_inputs(**options):
    """Weights of four outputs of the queries and N others."""
    shapes = ((4 + N, D), (4 + N,), (L, D), (Q, D))
    return [*norm_inputs(**options), *(random(*shape, **options) for shape in shapes)]


def folded_inputs(**options):
    shapes = ((B, L, C), (D, C), (D,), (C, C), (C,), (D,), (L, 8))
    x, weight, bias, stats_weight, *others = (random(*shape, **options) for shape in shapes)
    return [x, weight, bias, stats_weight.triu(), *others]


def attention_inputs(form, **options):
    q = random(*([B] if "batched" in form else []), Q, H, W, **options)
    mask = None
    if "masked" in form:
        mask = torch.zeros(B, 1, Q, 128, device=q.device, dtype=q.dtype)
        mask[..., L:] = -torch.inf
        mask[:, :, 1, 2:] = -torch.inf
    if "packed" in form:
        return [q, random(B, L, 2, H, W, **options), None, mask]
    return [q, random(B, L, H, W, **options), random(B, L, H, W, **options), mask]


LENGTHS = [5, 1, 3]  # of images one after another


def images_inputs(form, **options):
    q = random(Q, H, W, **options)
    if "separate" in form:
        return [q, *(random(sum(LENGTHS), H, W, **options) for _ in range(2))]
    return [q, random(sum(LENGTHS), 2, H, W, **options), None]


FORMS = ("packed", "separate", "packed batched", "separate batched masked", "packed masked")
IMAGES = ("images", "images separate")
CHAINS = ("linear_norm_linear", "linear_norm_linear placed")


def places_of(rows, device):
    """Two of ``rows`` positions for every token."""
    return torch.randint(rows, (2, L), device=device)


def forward(case, save, **options):
    """A forward operation and its arguments."""
    if case == "linear_layer_norm":
        x = norm_inputs(**options)
        return linear_layer_norm._linear_layer_norm_fwd.custom, (*x, 1e-5, x[0].dtype, save)
    if case in CHAINS:
        *tensors, positions, queries = chain_inputs(**options)
        places = None
        if case == "linear_norm_linear placed":
            positions, places = random(3, D, **options), places_of(3, positions.device)
        others = (positions, queries, places, 10, 4, 1e-5, save)
        return linear_norm_linear._linear_norm_linear_fwd.custom, (*tensors, *others)
    if case in IMAGES:
        inputs = images_inputs(case, **options)
        starts = torch.tensor([0, *LENGTHS], device=inputs[0].device).cumsum(0).to(torch.int32)
        return packed_attention._packed_cross_attention_fwd.custom, (
            *inputs,
            starts,
            max(LENGTHS),
            save,
        )
    return attention._cross_attention_fwd.custom, (*attention_inputs(case, **options), save)


def backward(case, needs_dx=True, **options):
    """A backward operation and its arguments, from a forward of the same kind."""
    operation, args = forward(case, True, **options)
    out, *saved = operation(*args)
    grad = torch.randn_like(out)
    if case == "linear_layer_norm":
        x, weight, _, gain = args[:4]
        return linear_layer_norm._linear_layer_norm_bwd.custom, (
            grad,
            x,
            weight,
            gain,
            *saved,
            needs_dx,
        )
    if case in CHAINS:
        x, weight, _, gain, shift, out_weight, _, positions, queries, places = args[:10]
        projected, *saved = saved
        others = (positions, queries, places, *saved)
        tensors = (torch.randn_like(projected), x, weight, gain, shift, out_weight, *others)
        return linear_norm_linear._linear_norm_linear_bwd.custom, (
            grad,
            *tensors,
            10,
            4,
            1e-5,
            needs_dx,
            needs_dx,
            needs_dx,
        )
    if case in IMAGES:
        given = (grad, *args[:4], out, *saved, args[4])
        return packed_attention._packed_cross_attention_bwd.custom, given
    return attention._cross_attention_bwd.custom, (grad, *args[:4], out, *saved)


CASES = ["linear_layer_norm", *CHAINS, *FORMS, *IMAGES]


@pytest.mark.parametrize("case", CASES)
def test_opcheck_forward(case, device):
    operation, args = forward(case, True, device=device)
    args = [
        a.requires_grad_()
        if torch.is_tensor(a) and a.is_floating_point() and not (i == 3 and "masked" in case)
        else a
        for i, a in enumerate(args)
    ]
    torch.library.opcheck(operation, args)


@pytest.mark.parametrize("case", CASES)
def test_opcheck_without_backward(case, device):
    torch.library.opcheck(*forward(case, False, device=device))


@pytest.mark.parametrize(
    ("case", "needs_dx"),
    [
        *((case, True) for case in CASES),
        ("linear_layer_norm", False),
        ("linear_norm_linear", False),
    ],
)
def test_opcheck_backward(case, needs_dx, device):
    torch.library.opcheck(*backward(case, needs_dx, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_fakes_in_16_bits(case, dtype, device):
    """Shapes, strides and dtypes that tracing sees are those that running gives."""
    for save in (False, True):
        operation, args = forward(case, save, dtype=dtype, device=device)
        torch.library.opcheck(operation, args, test_utils="test_faketensor")
    operation, args = backward(case, dtype=dtype, device=device)
    torch.library.opcheck(operation, args, test_utils="test_faketensor")


def public(case, backend="triton"):
    """A public operation on the inputs of ``forward``."""
    if case == "linear_layer_norm":
        return lambda *t: ops.linear_layer_norm(*t, backend=backend)
    if case == "linear_norm_linear":

        def both(x, w, b, g, s, v, d, positions, queries):
            """The two results in one tensor."""
            others = {"positions": positions, "positioned": 10, "queries": queries, "queried": 4}
            found = ops.linear_norm_linear(x, w, b, g, s, 1e-12, v, d, **others, backend=backend)
            return torch.cat([out.flatten() for out in found])

        return both
    if case == "images":
        return lambda q, kv: ops.packed_cross_attention(q, kv, lengths=LENGTHS, backend=backend)
    return lambda q, kv: ops.cross_attention(q, kv, backend=backend)


def public_inputs(case, **options):
    if case == "images":
        return images_inputs(case, **options)[:2]
    inputs = {"linear_layer_norm": norm_inputs, "linear_norm_linear": chain_inputs}.get(case)
    return inputs(**options) if inputs else attention_inputs(case, **options)[:2]


BATCHED = ["linear_layer_norm", "linear_norm_linear", "packed"]
PUBLIC = [*BATCHED, "images"]


@pytest.mark.parametrize("case", PUBLIC)
def test_second_derivative_is_a_clear_error(case, device):
    inputs = [t.requires_grad_() for t in public_inputs(case, device=device)]
    out = public(case)(*inputs)
    first = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r'no second derivative.*use_backend\("torch"\)'):
        first.sum().backward()


@pytest.mark.parametrize("case", PUBLIC)
@pytest.mark.parametrize("trained", [True, False], ids=["training", "inference"])
def test_compiles_whole(case, trained, device):
    torch._dynamo.reset()
    inputs = public_inputs(case, device=device)
    inputs = [t.requires_grad_() for t in inputs] if trained else inputs
    function = public(case)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    out, wanted = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(out, wanted)
    if trained:
        upstream = torch.randn_like(out)
        got = torch.autograd.grad(out, inputs, upstream)
        torch.testing.assert_close(got, torch.autograd.grad(wanted, inputs, upstream))


@pytest.mark.parametrize("case", BATCHED)
def test_exports(case, device):
    """With a batch of any size."""
    function = public(case)

    class Module(torch.nn.Module):
        def forward(self, tensors):
            return function(*tensors)

    inputs = public_inputs(case, device=device)
    batched = 1 if case == "packed" else 0
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = [{0: batch} if i == batched else None for i in range(len(inputs))]
    exported = torch.export.export(Module(), (inputs,), dynamic_shapes=(shapes,))
    larger = list(inputs)
    larger[batched] = torch.randn(5, *inputs[batched].shape[1:], device=device)
    torch.testing.assert_close(exported.module()(larger), function(*larger))


def test_exports_images_of_different_sizes(device):
    """With the lengths that it was exported with."""
    function, inputs = public("images"), public_inputs("images", device=device)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    exported = torch.export.export(Module(), tuple(inputs)).module()
    torch.testing.assert_close(exported(*inputs), function(*inputs))


@pytest.mark.parametrize("case", PUBLIC)
def test_gradients_only_where_asked(case, device):
    """Frozen weights, frozen features, and everything at once give the same numbers."""
    inputs = public_inputs(case, device=device)
    function, upstream = public(case), None
    everything = [t.detach().requires_grad_() for t in inputs]
    out = function(*everything)
    upstream = torch.randn_like(out)
    wanted = torch.autograd.grad(out, everything, upstream)
    for i, gradient in enumerate(wanted):
        some = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)]
        function(*some).backward(upstream)
        for j, t in enumerate(some):
            assert (t.grad is None) == (i != j)
        torch.testing.assert_close(some[i].grad, gradient)


@pytest.mark.parametrize("case", PUBLIC)
def test_nothing_is_saved_without_grad(case, device):
    inputs = public_inputs(case, device=device)
    function, saved = public(case), []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        wanted = function(*inputs)
        inputs[0].requires_grad_()
        with torch.no_grad():
            assert torch.equal(function(*inputs), wanted)
        with torch.inference_mode():
            assert torch.equal(function(*inputs), wanted)
    assert not saved
    assert not wanted.requires_grad


@pytest.mark.parametrize("case", PUBLIC)
def test_inference_tensors(case, device):
    with torch.inference_mode():
        inputs = public_inputs(case, device=device)
        out = public(case)(*inputs)
    assert out.is_inference()
    assert rms_error(out, public(case, "torch")(*inputs)) < 1e-5


@pytest.mark.parametrize("case", PUBLIC)
def test_backward_runs_what_forward_ran(case, device, monkeypatch):
    """Elsewhere, later, and on another thread."""
    seen = []
    module = {"linear_layer_norm": linear_layer_norm, "linear_norm_linear": linear_norm_linear}
    module["images"] = packed_attention
    module = module.get(case, attention)
    name = f"_{module.__name__.rpartition('.')[2]}_bwd"
    backward = getattr(module, name)

    def spy(*inputs, **options):
        seen.append(case)
        return backward(*inputs, **options)

    monkeypatch.setattr(module, name, spy)
    inputs = [t.requires_grad_() for t in public_inputs(case, device=device)]
    with use_backend("triton"):
        out = public(case, None)(*inputs)
    with use_backend("torch"):
        out.sum().backward()
    assert seen == [case]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", PUBLIC)
def test_autocast(case, dtype, device):
    """fp32 parameters and inputs: the dtype of PyTorch's own modules, gradients in fp32."""
    inputs = [t.requires_grad_() for t in public_inputs(case, device=device)]
    truth = public(case, "torch")(*(t.detach().double() for t in inputs))
    with torch.autocast(device.type, dtype):
        out = public(case)(*inputs)
        wanted = public(case, "torch")(*inputs)
    assert out.dtype == wanted.dtype
    # Up to four roundings in a chain; PyTorch's own chain has as many.
    assert rms_error(out, truth) < 2 * rms_error(wanted, truth) + torch.finfo(dtype).eps
    upstream = torch.randn_like(truth)
    got = torch.autograd.grad(out, inputs, upstream.to(out.dtype))
    theirs = torch.autograd.grad(wanted, inputs, upstream.to(wanted.dtype))
    exact = [t.detach().double().requires_grad_() for t in inputs]
    exact = torch.autograd.grad(public(case, "torch")(*exact), exact, upstream)
    for mine, other, true in zip(got, theirs, exact, strict=True):
        assert mine.dtype == torch.float32
        assert rms_error(mine, true) < 3 * rms_error(other, true) + torch.finfo(dtype).eps


def test_autocast_of_linear_and_norm_is_that_of_the_modules(device):
    linear, norm = torch.nn.Linear(C, D).to(device), torch.nn.LayerNorm(D).to(device)
    x = random(B, L, C, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device.type, dtype):
            out = ops.linear_layer_norm(
                x, linear.weight, linear.bias, norm.weight, norm.bias, norm.eps, backend="triton"
            )
            wanted = norm(linear(x))
        assert out.dtype == wanted.dtype
        torch.testing.assert_close(out, wanted, rtol=2e-2, atol=2e-2)


def test_a_mask_that_requires_grad_goes_to_pytorch(device, monkeypatch):
    """By itself where any device may run it, with an error where the kernels were asked for."""
    q, kv = public_inputs("packed", device=device)
    mask = torch.zeros(Q, L, device=device, requires_grad=True)
    ops.cross_attention(q, kv, attn_mask=mask).sum().backward()
    assert mask.grad is not None
    with pytest.raises(ValueError, match="attn_mask requires a gradient"):
        ops.cross_attention(q, kv, attn_mask=mask, backend="triton")
    with torch.no_grad():
        ops.cross_attention(q, kv, attn_mask=mask, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
def test_opcheck_of_the_folded_linear(lead, dtype, device):
    x, *others = folded_inputs(dtype=dtype, device=device)
    x = x[0].expand(*lead, -1, -1)
    torch.library.opcheck(folded_linear._folded_linear_fwd.custom, (x, *others, 1e-5))
    without = (*others[:4], None, None)
    torch.library.opcheck(folded_linear._folded_linear_fwd.custom, (x, *without, 1e-5))


def test_the_folded_linear_has_no_gradient(device):
    x, *others = folded_inputs(device=device)
    out = ops.folded_linear(x.requires_grad_(), *others, eps=1e-5, backend="triton")
    with pytest.raises(RuntimeError, match="folded_linear has no gradient"):
        out.sum().backward()
