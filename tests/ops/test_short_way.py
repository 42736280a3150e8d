"""Operations reach their kernels without the dispatcher, unless something has to see them."""

import pytest
import torch
from ops.test_custom_ops import (
    attention,
    folded_inputs,
    folded_linear,
    linear_layer_norm,
    linear_norm_linear,
    public,
    public_inputs,
)
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from visproj import ops
from visproj.ops.autograd import Operation

MODULES = {
    "linear_layer_norm": linear_layer_norm,
    "linear_norm_linear": linear_norm_linear,
    "packed": attention,
}
CASES = [*MODULES, "folded"]


@pytest.fixture
def asked(monkeypatch):
    """The operations that the dispatcher was asked for."""
    names = []

    def spy(operation):
        custom = operation.custom

        def call(*inputs):
            names.append(custom._qualname)
            return custom(*inputs)

        call._qualname = custom._qualname
        monkeypatch.setattr(operation, "custom", call)

    for module in (*MODULES.values(), folded_linear):
        for operation in vars(module).values():
            if isinstance(operation, Operation):
                spy(operation)
    return names


def run(case):
    if case == "folded":
        return lambda *t: ops.folded_linear(*t, eps=1e-5, backend="triton")
    return public(case)


def inputs(case, device):
    return folded_inputs(device=device) if case == "folded" else public_inputs(case, device=device)


@pytest.mark.parametrize("case", CASES)
def test_inference(asked, case, device):
    run(case)(*inputs(case, device))
    assert asked == []


@pytest.mark.parametrize("case", MODULES)
def test_training(asked, case, device):
    tensors = [t.requires_grad_() for t in inputs(case, device)]
    run(case)(*tensors).sum().backward()
    assert asked == []
    assert all(t.grad is not None for t in tensors)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", [FlopCounterMode, FakeTensorMode])
def test_a_mode_sees_it(asked, case, mode, device):
    tensors = inputs(case, device)
    options = {"display": False} if mode is FlopCounterMode else {"allow_non_fake_inputs": True}
    with mode(**options):
        run(case)(*tensors)
    assert len(asked) == 1


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("case", CASES)
def test_a_subclass_sees_it(asked, case, device):
    first, *others = inputs(case, device)
    run(case)(first.as_subclass(Subclass), *others)
    assert len(asked) == 1


@pytest.mark.parametrize("case", MODULES)
def test_a_second_derivative_asks_for_the_backward(asked, case, device):
    first, *others = (t.requires_grad_() for t in inputs(case, device))
    out = run(case)(first, *others)
    (grad,) = torch.autograd.grad(out.sum(), first, create_graph=True)
    assert len(asked) == 1
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("case", MODULES)
def test_both_ways_give_the_same(case, monkeypatch, device):
    """Numbers and gradients, to the bit, and which tensors take one."""

    def once():
        torch.manual_seed(0)
        tensors = [t.requires_grad_() for t in inputs(case, device)]
        out = run(case)(*tensors)
        out.square().sum().backward()
        return [out.detach(), *(t.grad for t in tensors)]

    direct = once()
    monkeypatch.setattr("visproj.ops.autograd._is_seen", lambda inputs: True)
    for got, want in zip(direct, once(), strict=True):
        assert torch.equal(got, want)
