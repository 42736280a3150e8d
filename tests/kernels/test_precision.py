"""fp32 products follow torch.get_float32_matmul_precision(), or the newer setting if it is set."""

import pytest
import torch
from helpers import rms_error
from kernels_support import (
    attention_operands,
    attention_oracle,
    evaluate,
    linear_norm_linear_oracle,
    random,
)

from visproj import ops

kernels = pytest.importorskip("visproj.kernels.device", reason="kernels need triton")

pytestmark = pytest.mark.usefixtures("unwritten", "restored")

# tf32 keeps 10 bits of each factor: a relative rms error of 2**-11 / sqrt(3) for each of the two,
# 4e-4 for a product, and again for a chain of two. fp32 sums of 100 terms: a few 1e-7.
TF32, FP32 = 2e-3, 2e-6


@pytest.fixture
def restored():
    before = torch.get_float32_matmul_precision()
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision(before)


def linear_norm_linear(device):
    """Of features without their CLS row, whose first product is a kernel's."""
    shapes = (2, 34, 40), (48, 40), (48,), (48,), (48,), (56, 48), (56,)
    tensors = [random(*shape, dtype=torch.float32, device=device) for shape in shapes]

    def op(x, weight, bias, gain, shift, out_weight, out_bias):
        others = weight, bias, gain, shift, 1e-12, out_weight, out_bias
        return ops.linear_norm_linear(x[:, 1:], *others, backend="triton")

    def oracle(x, *others):
        return linear_norm_linear_oracle(x[:, 1:], *others)

    return op, oracle, tensors


def attention(device):
    def op(q, kv):
        return ops.cross_attention(q, kv, backend="triton")

    def oracle(q, kv):
        return attention_oracle(q, *kv.unbind(2))

    return op, oracle, attention_operands(2, 33, 37, 1, 40, torch.float32, device)


def masked_attention(device):
    mask = torch.randn(33, 37).to(device)

    def op(q, kv):
        return ops.cross_attention(q, kv, attn_mask=mask, backend="triton")

    def oracle(q, kv):
        return attention_oracle(q, *kv.unbind(2), mask.double())

    return op, oracle, attention_operands(2, 33, 37, 1, 40, torch.float32, device)


def errors(case, device):
    """Relative rms errors of the output and of every gradient."""
    op, oracle, tensors = case(device)
    exact = [t.double() for t in tensors]
    upstream = random(*oracle(*exact).shape, dtype=torch.float32, device=device)
    truth = evaluate(oracle, exact, upstream.double())
    return [
        rms_error(got, wanted)
        for got, wanted in zip(evaluate(op, tensors, upstream), truth, strict=True)
    ]


CASES = [linear_norm_linear, attention, masked_attention]


@pytest.mark.parametrize("style", ["pointers", "descriptors"])
@pytest.mark.parametrize("case", CASES)
def test_highest_means_no_tf32(case, style, tiles, device):
    tiles(style)
    torch.set_float32_matmul_precision("highest")
    assert max(errors(case, device)) < FP32


@pytest.mark.parametrize("style", ["pointers", "descriptors"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("setting", ["high", "medium"])
def test_anything_else_means_tf32(case, setting, style, tiles, device):
    tiles(style)
    torch.set_float32_matmul_precision(setting)
    found = errors(case, device)
    assert max(found) < TF32
    assert found[0] > FP32, "tf32 must be seen in the output"


@pytest.mark.parametrize(
    ("older", "newer", "precision"),
    [("highest", "tf32", "tf32"), ("high", "ieee", "ieee")],
    ids=["tf32", "ieee"],
)
def test_the_newer_setting_comes_first(older, newer, precision):
    """Once it is set, torch.get_float32_matmul_precision() raises."""
    torch.set_float32_matmul_precision(older)
    torch.backends.cuda.matmul.fp32_precision = newer
    assert kernels.dot_precision(torch.float32) == precision
    assert kernels.dot_precision(torch.bfloat16) == "ieee"
