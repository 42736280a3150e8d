"""What PyTorch does with modules: compiling for many shapes, exporting, checkpointing and more."""

import copy
from functools import cache

import pytest
import torch
from helpers import features, rms_error, small
from rounding import rms, roundings, within
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from visproj import use_backend

KINDS = ["baseline", "vit", "perceiver"]
BACKENDS = ["torch", "triton"]
both = pytest.mark.parametrize("backend", BACKENDS)
every_kind = pytest.mark.parametrize("kind", KINDS)
# Interpreted kernels take seconds where a test runs many of them.
KERNELS_SLOW = ["torch", pytest.param("triton", marks=pytest.mark.slow)]
both_in_time = pytest.mark.parametrize("backend", KERNELS_SLOW)

# Compiled and eager fp32 sum in other orders, and a compiled resize rounds otherwise: 1e-6 before
# the layers, and ten times as much where the gradients of a softmax cancel.
CLOSE = 1e-5


def trained(projector):
    return {name: p for name, p in projector.named_parameters() if p.requires_grad}


def step(module, projector, x, **call):
    """Output and gradients of one training step."""
    out = module(x, **call)
    leaves = list(trained(projector).values())
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def exact_step(projector, x, **call):
    """A step in fp64, when called."""
    exact = copy.deepcopy(projector).double()
    return lambda: step(exact, exact, x.double(), **call)


def agree(found, wanted, formula, dtype=torch.float32, allowed=CLOSE):
    """Relative to each tensor; a gradient that is 0, as that of a key's bias, is only roundings."""
    moved = cache(lambda: roundings(formula, dtype))
    for i, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        error, size = (mine - theirs).double(), rms(theirs.double())
        within(rms, error, allowed * size, lambda i=i: moved()[i], f"tensor {i}")


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        *((kind, "torch") for kind in KINDS),
        ("baseline", "triton"),
        *(pytest.param(kind, "triton", marks=pytest.mark.slow) for kind in ("vit", "perceiver")),
    ],
)
def test_batches_and_tokens_share_one_graph(kind, backend, device):
    """One compilation, forward and training step, where the caller says what varies."""
    torch._dynamo.reset()
    projector = small(kind, torch.float32, device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(projector, fullgraph=True, backend=counter)
    tokens = (26, 26, 26) if kind == "perceiver" else (26, 17, 41)
    with use_backend(backend):
        for batch, length in zip((2, 3, 5), tokens, strict=True):
            x = features(batch, length, dtype=torch.float32, device=device)
            torch._dynamo.mark_dynamic(x, 0)
            if kind != "perceiver":
                torch._dynamo.mark_dynamic(x, 1)
            wanted = step(projector, projector, x)
            agree(step(compiled, projector, x), wanted, exact_step(projector, x))
    assert counter.frame_count == 1


@both_in_time
def test_grids_share_a_graph_in_training(backend, device):
    """Unmarked: the second grid and batch make the graph dynamic, the others run on it."""
    torch._dynamo.reset()
    projector = small("perceiver", torch.float32, device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(projector, fullgraph=True, backend=counter)
    counts = []
    with use_backend(backend):
        for batch, grid in ((2, (5, 6)), (3, (4, 7)), (4, (7, 3)), (2, (6, 6)), (5, (3, 9))):
            x = features(batch, grid[0] * grid[1] + 1, dtype=torch.float32, device=device)
            wanted = step(projector, projector, x, grid=grid)
            found = step(compiled, projector, x, grid=grid)
            agree(found, wanted, exact_step(projector, x, grid=grid))
            counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2, 2]


@both
@every_kind
def test_exports_for_any_batch(kind, backend, device):
    projector = small(kind, torch.float32, device)
    x = features(2, 26, dtype=torch.float32, device=device)
    shapes = {0: torch.export.Dim.DYNAMIC}
    if kind != "perceiver":
        shapes[1] = torch.export.Dim.DYNAMIC
    with use_backend(backend):
        exported = torch.export.export(projector, (x,), dynamic_shapes={"x": shapes}).module()
        for batch in (1, 5):
            x = features(batch, 26, dtype=torch.float32, device=device)
            assert rms_error(exported(x), projector(x)) < CLOSE
        if kind != "perceiver":
            assert exported(x[:, :9]).shape == (5, 9, 64)


@both
@every_kind
def test_functional_call(kind, backend, device):
    """Given parameters are used and get the gradients; the module's own stay out of it."""
    projector = small(kind, torch.float32, device)
    other = small(kind, torch.float32, device)
    x = features(2, 17, dtype=torch.float32, device=device)
    with use_backend(backend):
        given = dict(other.named_parameters())
        out = functional_call(projector, given, (x,))
        assert torch.equal(out, other(x))
        assert not torch.equal(out, projector(x))
        out.square().sum().backward()
    assert all(p.grad is not None for p in other.parameters() if p.requires_grad)
    assert all(p.grad is None for p in projector.parameters())


@both
@every_kind
def test_gradients_of_each_sample(kind, backend, device):
    """Sample by sample, without ``vmap``: they add up to the batch's."""
    projector = small(kind, torch.float32, device)
    parameters = trained(projector)
    x = features(2, 10, dtype=torch.float32, device=device)
    weights = torch.randn(2, 1, 1, device=device)

    def loss(parameters, x, weights):
        return (functional_call(projector, parameters, (x,)) * weights).square().sum()

    with use_backend(backend):
        one_by_one = [
            torch.autograd.grad(loss(parameters, x[i], weights[i]), list(parameters.values()))
            for i in range(2)
        ]
        wanted = torch.autograd.grad(loss(parameters, x, weights), list(parameters.values()))
    summed = [sum(grads) for grads in zip(*one_by_one, strict=True)]
    double = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}

    def formula():
        return torch.autograd.grad(
            loss(double, x.double(), weights.double()), list(double.values())
        )

    agree(summed, wanted, formula)


@every_kind
def test_transforms_of_torch_func(kind, device):
    """Left to PyTorch, also where the kernels would run; refused where they are insisted on."""
    projector = small(kind, torch.float32, device)
    parameters = {name: p.detach() for name, p in projector.named_parameters()}
    x = features(2, 10, dtype=torch.float32, device=device)

    def gradients():
        def loss(parameters):
            return functional_call(projector, parameters, (x,)).square().sum()

        return torch.func.grad(loss)(parameters)

    wanted = step(projector, projector, x)[1:]
    found = gradients()
    formula = exact_step(projector, x)
    agree([found[name] for name in trained(projector)], wanted, lambda: formula()[1:])
    with (
        use_backend("triton"),
        pytest.raises(ValueError, match=r"transforms of torch\.func .* are not supported"),
    ):
        gradients()


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@both
@every_kind
def test_gradient_checkpointing(kind, backend, reentrant, device):
    """Computed anew in the backward: the same bits."""
    projector = small(kind, torch.float32, device)
    x = features(2, 10, dtype=torch.float32, device=device).requires_grad_()
    calls = []
    projector.register_forward_pre_hook(lambda *_: calls.append(None))
    with use_backend(backend):
        wanted = projector(x)
        wanted.square().sum().backward()
        leaves = {"x": x, **trained(projector)}
        gradients = {name: leaf.grad for name, leaf in leaves.items()}
        for leaf in leaves.values():
            leaf.grad = None
        out = checkpoint(projector, x, use_reentrant=reentrant)
        out.square().sum().backward()
    assert torch.equal(out, wanted)
    assert all(torch.equal(leaf.grad, gradients[name]) for name, leaf in leaves.items())
    assert len(calls) == 3


@every_kind
def test_copies_among_kernels(kind, device):
    """A copy made after a training step owes the original nothing."""
    projector = small(kind, torch.float32, device)
    x = features(2, 10, dtype=torch.float32, device=device)
    with use_backend("triton"):
        wanted = projector(x)
        wanted.square().sum().backward()
        other = copy.deepcopy(projector)
        assert torch.equal(other(x), wanted)
        with torch.no_grad():
            for parameter in projector.parameters():
                parameter.mul_(2)
        assert torch.equal(other(x), wanted)


@both_in_time
@every_kind
def test_compiles_under_autocast(kind, backend, device):
    torch._dynamo.reset()
    projector = small(kind, torch.float32, device)
    x = features(2, 17, dtype=torch.float32, device=device)
    compiled = torch.compile(projector, fullgraph=True, backend="aot_eager")
    with use_backend(backend), torch.autocast(device.type, torch.bfloat16):
        wanted = step(projector, projector, x)
        found = step(compiled, projector, x)
    assert found[0].dtype == wanted[0].dtype
    # Casts of the same values, but sums of gradients in another order, rounded to bf16.
    allowed = 4 * torch.finfo(torch.bfloat16).eps
    agree(found, wanted, exact_step(projector, x), torch.bfloat16, allowed)
