"""What the bounds of the kernels' tests let pass, and what they must not."""

import math

import pytest
import torch
from helpers import features, small
from kernels_support import (
    DTYPES,
    attention_operands,
    attention_oracle,
    check_op,
    evaluate,
    linear_norm_linear_oracle,
    random,
)
from rounding import SHARE, largest, rms, roundings, within

from visproj import ops
from visproj.reference import projector_ref


def moved(function, dtype=torch.float32):
    return [largest(tensor) for tensor in roundings(function, dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_a_sum_that_cancels_is_moved_by_its_terms(size, dtype):
    x, y = torch.tensor([[size, -size]]).double(), torch.ones(2, 1).double()
    (found,) = moved(lambda: [x @ y], dtype)
    # Both terms are moved, by half of eps each and one way or the other, from either factor.
    assert 0.9 < found / (SHARE[dtype] * torch.finfo(dtype).eps * size) < 2.1


def test_the_gradient_of_a_softmax_over_one_key_is_moved():
    """It is 0 whatever the operands: softmax is 1, and the gradients of both its paths cancel."""
    q, kv = (t.double() for t in attention_operands(1, 5, 1, 2, 16, torch.float64, "cpu"))
    upstream = torch.randn(1, 5, 2, 16).double()

    def formula():
        return evaluate(lambda q, kv: attention_oracle(q, *kv.unbind(2)), [q, kv], upstream)

    assert not formula()[1].any()
    assert 2**-24 < moved(formula)[1] < 64 * 2**-24


def test_a_mask_that_hides_is_not_moved():
    """Else any of the keys, all at finfo.min, might win."""
    scores = torch.randn(3, 5).double() + torch.finfo(torch.float32).min
    assert moved(lambda: [scores.softmax(-1)])[0] < 4 * 2**-24


@pytest.mark.parametrize("kind", ["baseline", "vit", "perceiver"])
def test_of_a_projector_it_is_some_roundings(kind):
    """Of a few thousand outputs of order 1, made in two to six products."""
    projector, x = small(kind), features(2, 17)
    assert 2**-24 < moved(lambda: [projector_ref(projector, x)])[0] < 2**10 * 2**-24


def test_within():
    error = torch.tensor([0.0, 3.0]).double()
    asked = []

    def scale():
        asked.append(None)
        return torch.ones(2)

    within(largest, error, 3.0, scale, "result")
    assert not asked
    within(largest, error / 3, 0.5, scale, "result")
    assert asked
    with pytest.raises(AssertionError, match="result: error 3, allowed 2"):
        within(largest, error, 2.0, scale, "result")
    with pytest.raises(AssertionError, match="result: error 3, allowed 1"):
        within(largest, error, 0.5, scale, "result")
    for norm in (largest, rms):
        with pytest.raises(AssertionError):
            within(norm, error * math.nan, 3.0, scale, "result")


class GradientTimes(torch.autograd.Function):
    """The tensor itself, its gradient times a factor."""

    @staticmethod
    def forward(ctx, tensor, factor):
        ctx.factor = factor
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def attention(q, kv):
    return ops.cross_attention(q, kv, backend="torch")


def attention_formula(q, kv):
    return attention_oracle(q, *kv.unbind(2))


def chain(*tensors):
    *first, out_weight, out_bias = tensors
    return ops.linear_norm_linear(*first, 1e-12, out_weight, out_bias, backend="torch")


def operands(case, dtype):
    if case == "attention":
        return attention_operands(2, 17, 33, 2, 16, dtype, "cpu")
    shapes = (2, 17, 24), (40, 24), (40,), (40,), (40,), (32, 40), (32,)
    return [random(*shape, dtype=dtype, device="cpu") for shape in shapes]


CASES = {"attention": (attention, attention_formula), "chain": (chain, linear_norm_linear_oracle)}
# Of a relative error. 16 bits: more than twice the contract, 0.005.
PLANTED = {"fp32": 1e-5, "fp16": 1.2e-2, "bf16": 1.2e-2}


@pytest.mark.parametrize("where", ["nowhere", "output", 0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_small_errors_fail(case, dtype, where):
    """The formula in the place of the kernels, right and with a factor in one of its results."""
    function, formula = CASES[case]
    factor = 1 + PLANTED[dtype]

    def op(*tensors, backend):
        if backend == "torch":
            return function(*tensors)
        out = formula(
            *(
                GradientTimes.apply(t.double(), factor if i == where else 1.0)
                for i, t in enumerate(tensors)
            )
        )
        return (out * (factor if where == "output" else 1.0)).to(tensors[0].dtype)

    given = operands(case, DTYPES[dtype])
    if where == "nowhere":
        check_op(op, formula, given)
        return
    name = "output" if where == "output" else f"gradient {where}"
    with pytest.raises(AssertionError, match=name):
        check_op(op, formula, given)


def test_an_error_where_the_truth_is_zero_fails():
    """The gradient of q with one key, a thousandth of the part that cancels left."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, kv):
            ctx.save_for_backward(kv)
            return attention(q, kv)

        @staticmethod
        def backward(ctx, upstream):
            (kv,) = ctx.saved_tensors
            k, v = kv.unbind(2)
            left = 1e-3 * torch.einsum("bqhd,blhd,blhe->qhe", upstream, v, k)
            return left / 4, torch.stack((0 * k, upstream.sum(1, keepdim=True)), dim=2)

    given = attention_operands(1, 5, 1, 2, 16, torch.float32, "cpu")

    def op(*tensors, backend):
        return attention(*tensors) if backend == "torch" else Attention.apply(*tensors)

    with pytest.raises(AssertionError, match="gradient 0"):
        check_op(op, attention_formula, given)
