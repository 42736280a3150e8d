"""Small kernels over everything the interpreter's repair touches, compared with torch bit by bit.

Run as a script under ``TRITON_INTERPRET=1``, with the argument ``repaired`` or ``stock``: prints
one JSON object, from the name of each check to what is wrong with it, empty if nothing is.
"""

import json
import math
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

from visproj.kernels import interpreter

BF16 = torch.bfloat16
# 256 patterns: zeros, subnormals, the ends of the normal range, infinities, NaNs of both kinds,
# neighbours of 1 and of 256 (where integers stop being exact), and 224 others.
SPECIAL = [0x0000, 0x0001, 0x0002, 0x007F, 0x0080, 0x0081, 0x3F7F, 0x3F80, 0x3F81, 0x437F, 0x4380]
SPECIAL += [0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x4049]
PATTERNS = np.concatenate(
    [SPECIAL, np.array(SPECIAL) | 0x8000, np.random.default_rng(0).integers(0, 1 << 16, 224)]
)


def bf16(patterns):
    return torch.from_numpy(np.asarray(patterns).astype(np.uint16).view(np.int16)).view(BF16)


EVERY = bf16(np.arange(1 << 16))
X, Y = (bf16(grid.ravel()) for grid in np.meshgrid(PATTERNS, PATTERNS))
Z = X.flip(0).roll(12345)
SMALL = (torch.arange(1 << 10).reshape(16, 64) * 37 % 97 - 40).to(BF16) / 8

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def same(got, want, signed_zeros=True):
    """Equal to the bit, any NaN like any other, and +0 like -0 unless ``signed_zeros``."""
    assert got.dtype == want.dtype, f"{got.dtype}, not {want.dtype}"
    assert got.shape == want.shape, f"{tuple(got.shape)}, not {tuple(want.shape)}"
    differ = (got != want) & ~(got.isnan() & want.isnan())
    if signed_zeros and got.is_floating_point():
        differ |= (got == 0) & (got.signbit() != want.signbit())
    if differ.any():
        first = differ.flatten().nonzero()[0].item()
        pair = got.flatten()[first].item(), want.flatten()[first].item()
        raise AssertionError(
            f"{int(differ.sum())} of {got.numel()}, first {pair[0]}, not {pair[1]}"
        )


def run(kernel, *inputs, shape=None, dtype=BF16, **constants):
    """What the kernel stores into an output full of -7, one program."""
    out = torch.full(shape or inputs[0].shape, -7, dtype=dtype)
    kernel[(1,)](*inputs, out, **constants)
    return out


@triton.jit
def _binary_kernel(x_ptr, y_ptr, z_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    cell = tl.arange(0, N)
    x, y, z = tl.load(x_ptr + cell), tl.load(y_ptr + cell), tl.load(z_ptr + cell)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "div":
        out = x / y
    elif OP == "neg":
        out = -x
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "fma":
        out = tl.fma(x, y, z)
    elif OP == "scalars":
        out = (x * 1.7 + 1) - 0.0
    elif OP == "mixed":
        out = x + y.to(tl.float32)
    elif OP == "lt":
        out = x < y
    elif OP == "le":
        out = x <= y
    elif OP == "gt":
        out = x > y
    elif OP == "ge":
        out = x >= y
    elif OP == "eq":
        out = x == y
    elif OP == "ne":
        out = x != y
    elif OP == "truth":
        out = x.to(tl.int1)
    elif OP == "where":
        out = tl.where(x < y, x, y)
    elif OP == "where_scalar":
        out = tl.where(x > y, x, 0.3)
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "minimum":
        out = tl.minimum(x, y)
    elif OP == "maximum_nan":
        out = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "minimum_nan":
        out = tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "clamp":
        out = tl.clamp(x, -1.5, 2.5)
    tl.store(out_ptr + cell, out)


def binary(op, dtype=BF16):
    return run(_binary_kernel, X, Y, Z, dtype=dtype, OP=op, N=len(X))


@check
def arithmetic():
    same(binary("add"), X + Y)
    same(binary("sub"), X - Y)
    same(binary("mul"), X * Y)
    same(binary("div"), X / Y)
    # Up to triton 3.7 a negation is 0 - x, compiled or not.
    same(binary("neg"), -X, signed_zeros=False)
    same(binary("mixed", torch.float32), X + Y.float())


@check
def absolute_values():
    same(binary("abs"), X.abs())


@check
def scalar_operands():
    # Triton rounds the scalar to bf16, torch does not: hence a tensor here.
    same(binary("scalars"), X * torch.tensor(1.7, dtype=BF16) + 1 - 0.0)


@check
def fused_multiply_add():
    # A product of two bf16 is exact in fp32 unless it leaves its range.
    same(binary("fma"), (X.float() * Y.float() + Z.float()).to(BF16))


@check
def comparisons():
    for op in ("lt", "le", "gt", "ge", "eq", "ne"):
        want = getattr(torch, op)(X, Y)
        same(binary(op, torch.bool), want)
        same(binary(op, torch.float32), want.float())
        same(binary(op, BF16), want.to(BF16))
    same(binary("truth", torch.bool), X.bool())


@check
def selection():
    same(binary("where"), torch.where(X < Y, X, Y))
    same(binary("where_scalar"), torch.where(X > Y, X, torch.tensor(0.3, dtype=BF16)))


@check
def maxima_and_minima():
    """Which zero wins is not defined."""
    same(binary("maximum_nan"), torch.maximum(X, Y), signed_zeros=False)
    same(binary("minimum_nan"), torch.minimum(X, Y), signed_zeros=False)


@check
def maxima_and_minima_without_nan():
    for name in ("maximum", "minimum"):
        want = torch.where(X.isnan(), Y, getattr(torch, name)(X, Y))
        same(binary(name), torch.where(Y.isnan(), X, want), signed_zeros=False)
    same(binary("clamp"), torch.where(X.isnan(), -1.5, X.clamp(-1.5, 2.5)).to(BF16))


@triton.jit
def _unary_kernel(x_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    cell = tl.arange(0, N)
    x = tl.load(x_ptr + cell).to(tl.float32)
    if OP == "exp":
        out = tl.exp(x)
    elif OP == "exp2":
        out = tl.exp2(x)
    elif OP == "log":
        out = tl.log(x)
    elif OP == "log2":
        out = tl.log2(x)
    elif OP == "sqrt":
        out = tl.sqrt(x)
    elif OP == "rsqrt":
        out = tl.rsqrt(x)
    elif OP == "erf":
        out = tl.erf(x)
    elif OP == "floor":
        out = tl.floor(x)
    elif OP == "ceil":
        out = tl.ceil(x)
    tl.store(out_ptr + cell, out.to(tl.bfloat16))


# NumPy's functions, since torch's may be a bit off from them in fp32.
UNARY = {
    name: getattr(np, name) for name in ("exp", "exp2", "log", "log2", "sqrt", "floor", "ceil")
}
UNARY["erf"] = np.vectorize(math.erf, otypes=[np.float32])
UNARY["rsqrt"] = lambda x: np.float32(1) / np.sqrt(x)


@check
def unary_functions():
    for name, function in UNARY.items():
        want = torch.from_numpy(function(EVERY.float().numpy())).to(BF16)
        same(run(_unary_kernel, EVERY, OP=name, N=len(EVERY)), want)


@check
def unary_functions_of_the_builder():
    """Triton itself refuses bf16 in most of these; the builder should not return nonsense."""
    patterns = EVERY.view(torch.int16).numpy().view(np.uint16)
    handle = triton_interpreter.TensorHandle(patterns, tl.bfloat16)
    builder = triton_interpreter.interpreter_builder
    for name, function in UNARY.items():
        got = getattr(builder, f"create_{name}")(handle)
        assert got.dtype == tl.bfloat16
        same(bf16(got.data), torch.from_numpy(function(EVERY.float().numpy())).to(BF16))


@triton.jit
def _cast_kernel(x_ptr, out_ptr, N: tl.constexpr, ROUNDING: tl.constexpr = None):
    cell = tl.arange(0, N)
    x = tl.load(x_ptr + cell)
    tl.store(out_ptr + cell, x.to(out_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING))


def cast(x, dtype, **rounding):
    return run(_cast_kernel, x, dtype=dtype, N=len(x), **rounding)


def fp32_around_bf16():
    """Every bf16, exact, just below and above the tie, on it, and just below its neighbour."""
    bits = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    bits = bits | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFF, 0x1234], np.uint32)
    return torch.from_numpy(bits.ravel().view(np.float32))


@check
def casts_from_fp32():
    x = fp32_around_bf16()
    same(cast(x, BF16), x.to(BF16))


@check
def casts_from_fp32_towards_zero():
    x = fp32_around_bf16()
    want = bf16(x.view(torch.int32).numpy().view(np.uint32) >> 16)
    want[x.isnan()] = torch.nan
    same(cast(x, BF16, ROUNDING="rtz"), want)


@check
def casts_from_other_floats():
    half = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    same(cast(half, BF16), half.to(BF16))
    double = torch.cat([X.double() * 1.0009765625, torch.rand(1 << 16, dtype=torch.float64) * 1e39])
    same(cast(double, BF16), double.to(BF16))


@check
def casts_from_integers():
    wide = torch.randint(-(2**62), 2**62, (1 << 10,)) >> torch.arange(1 << 10) % 62
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool):
        x = wide > 0 if dtype == torch.bool else wide.to(dtype)
        same(cast(x, BF16), x.to(BF16))


@check
def casts_to_floats():
    for dtype in (torch.float16, torch.float32, torch.float64):
        same(cast(EVERY, dtype), EVERY.to(dtype))


@check
def casts_to_integers():
    """Of what fits: the rest is not defined."""
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
        limits = torch.iinfo(dtype)
        fits = (EVERY.double() >= limits.min) & (EVERY.double() < limits.max)
        x = torch.where(fits, EVERY, torch.ones_like(EVERY))
        same(cast(x, dtype), x.to(dtype))
    same(cast(EVERY, torch.bool), EVERY.bool())


@check
def casts_to_and_from_fp8():
    """Of finite values, and to fp8 exact ones: the rest is triton's own way with fp8."""
    for dtype in (torch.float8_e5m2, torch.float8_e4m3fn):
        x = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
        x = torch.where(x.float().isfinite(), x.float(), 0.0).to(dtype)
        same(cast(x, BF16), x.to(BF16))
        normal = x.float().abs() >= torch.finfo(dtype).tiny
        exact = torch.where(normal, x.float(), 0.0)
        same(cast(exact.to(BF16), dtype).float(), exact)


@triton.jit
def _bitcast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    cell = tl.arange(0, N)
    bits = tl.load(x_ptr + cell).to(tl.uint16, bitcast=True) ^ 0x8000
    tl.store(out_ptr + cell, bits.to(tl.bfloat16, bitcast=True))


@check
def bitcasts():
    want = bf16(EVERY.view(torch.int16).numpy().view(np.uint16) ^ 0x8000)
    assert torch.equal(
        run(_bitcast_kernel, EVERY, N=len(EVERY)).view(torch.int16), want.view(torch.int16)
    )


@triton.jit
def _larger(x, y):
    return tl.where(x > y, x, y)


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, OP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    row, col = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + row[:, None] * N + col[None, :])
    if OP == "sum":
        out = tl.sum(x, 1)
    elif OP == "sum_in_fp32":
        out = tl.sum(x, 1, dtype=tl.float32)
    elif OP == "sum_of_all":
        out = tl.sum(x) + tl.zeros((M,), tl.bfloat16)
    elif OP == "max":
        out = tl.max(x, 1)
    elif OP == "min":
        out = tl.min(x, 1)
    elif OP == "argmax":
        out = tl.argmax(x, 1)
    elif OP == "argmin":
        out = tl.argmin(x, 1)
    elif OP == "raw_sum":
        out = tl.reduce(x, 1, tl.standard._sum_combine)
    elif OP == "raw_max":
        out = tl.reduce(x, 1, tl.standard._elementwise_max)
    elif OP == "own_max":
        out = tl.reduce(x, 1, _larger)
    tl.store(out_ptr + row, out)


@triton.jit
def _scan_kernel(x_ptr, out_ptr, OP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    row, col = tl.arange(0, M), tl.arange(0, N)
    cell = row[:, None] * N + col[None, :]
    x = tl.load(x_ptr + cell)
    if OP == "cumsum":
        out = tl.cumsum(x, 1)
    elif OP == "raw_cumsum":
        out = tl.associative_scan(x, 1, tl.standard._sum_combine)
    elif OP == "raw_cumprod":
        out = tl.associative_scan(x, 1, tl.standard._prod_combine)
    elif OP == "own_cummax":
        out = tl.associative_scan(x, 1, _larger)
    tl.store(out_ptr + cell, out)


def reduced(op, dtype=BF16):
    M, N = SMALL.shape
    return run(_reduce_kernel, SMALL, shape=(M,), dtype=dtype, OP=op, M=M, N=N)


@check
def reductions():
    """``SMALL`` holds eighths, so sums in fp32 are exact in any order."""
    same(reduced("sum_in_fp32", torch.float32), SMALL.float().sum(1))
    same(reduced("max"), SMALL.amax(1))
    same(reduced("min"), SMALL.amin(1))
    numbers = SMALL.float().numpy()  # NumPy takes the first of equal values, like triton
    same(reduced("argmax", torch.int32), torch.from_numpy(numbers.argmax(1).astype(np.int32)))
    same(reduced("argmin", torch.int32), torch.from_numpy(numbers.argmin(1).astype(np.int32)))
    same(run(_scan_kernel, SMALL, OP="cumsum", M=16, N=64), SMALL.float().cumsum(1).to(BF16))


def sum_by_halves(x):
    return x.squeeze(-1) if x.shape[-1] == 1 else sum_by_halves(sum(x.chunk(2, -1)))


@check
def reductions_that_stay_in_bf16():
    same(reduced("sum"), sum_by_halves(SMALL))
    same(reduced("sum_of_all"), sum_by_halves(sum_by_halves(SMALL.mT)).expand(16))
    same(reduced("raw_sum"), sum_by_halves(SMALL))
    same(reduced("raw_max"), SMALL.amax(1))
    same(reduced("own_max"), SMALL.amax(1))
    same(run(_scan_kernel, SMALL, OP="raw_cumsum", M=16, N=64), SMALL.float().cumsum(1).to(BF16))
    product = torch.from_numpy(np.cumprod(SMALL.float().numpy(), 1)).to(BF16)
    same(run(_scan_kernel, SMALL, OP="raw_cumprod", M=16, N=64), product)
    same(run(_scan_kernel, SMALL, OP="own_cummax", M=16, N=64), SMALL.cummax(1).values)


@triton.jit
def _dot_kernel(
    x_ptr, y_ptr, acc_ptr, out_ptr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr = None,
):  # fmt: skip
    row, inner, col = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    x = tl.load(x_ptr + row[:, None] * K + inner[None, :])
    y = tl.load(y_ptr + inner[:, None] * N + col[None, :])
    cell = row[:, None] * N + col[None, :]
    out = tl.dot(x, y, tl.load(acc_ptr + cell), input_precision=PRECISION)
    tl.store(out_ptr + cell, out)


def dot(x, y, acc=None, **precision):
    (M, K), N = x.shape, y.shape[1]
    acc = torch.zeros(M, N) if acc is None else acc
    sizes = {"M": M, "K": K, "N": N}
    return run(_dot_kernel, x, y, acc, shape=(M, N), dtype=torch.float32, **sizes, **precision)


@check
def dots_of_bf16():
    acc = torch.arange(256.0).reshape(16, 16)
    same(dot(SMALL, SMALL.mT.contiguous(), acc), SMALL.float() @ SMALL.float().mT + acc)
    one = torch.ones(16, 16, dtype=BF16)
    assert dot(one * torch.inf, one).isposinf().all()
    assert dot(one * torch.inf, one - 1).isnan().all()
    # Cancelling terms leave a 1 that neither bf16 nor fp16 sums would keep.
    x = torch.tensor([4096.0, 1.0, -4096.0, 0.0] * 4).expand(16, 16).contiguous()
    same(dot(x.to(BF16), one), torch.full((16, 16), 4.0))


@check
def dots_of_fp16_accumulate_in_fp32():
    x = torch.tensor([60000.0, 60000.0, 0.125, -2.0] * 4).expand(16, 16).half().contiguous()
    one = torch.ones(16, 16, dtype=torch.float16)
    same(dot(x, one), torch.full((16, 16), 4 * (float(x[0, 0]) * 2 - 1.875)))


# Ties and their neighbours in the mantissa bit below tf32's last, the largest fp32, Inf and NaN.
TF32_OPERANDS = [1, 1 + 2**-11, 1 + 2**-12, 1 + 3 * 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-23]
TF32_ROUNDED = [1, 1 + 2**-10, 1, 1 + 2 * 2**-10, -1 - 2**-10, 1]
TF32_OPERANDS += [3.4028235e38, 2**-126, 2**-149]
TF32_ROUNDED += [np.inf, 2**-126, 0]


def diagonal(values):
    return torch.diag(torch.tensor(values, dtype=torch.float32).resize_(16))


@check
def dots_in_tf32():
    for order in (dot, lambda x, y, **precision: dot(y, x, **precision)):
        got = order(diagonal(TF32_OPERANDS), torch.eye(16), PRECISION="tf32").diagonal()[:6]
        same(got, torch.tensor(TF32_ROUNDED[:6], dtype=torch.float32))
    one = torch.ones(1, 1)
    pairs = zip([*TF32_OPERANDS, np.inf, np.nan], [*TF32_ROUNDED, np.inf, np.nan], strict=True)
    for value, want in pairs:
        same(dot(one * value, one, PRECISION="tf32"), one * want)


@check
def dots_in_full_fp32():
    exact = torch.tensor(TF32_OPERANDS)
    for precision in ("ieee", "tf32x3"):
        got = [dot(value.view(1, 1), torch.ones(1, 1), PRECISION=precision) for value in exact]
        same(torch.cat(got).flatten(), exact)


@triton.jit
def _masked_kernel(x_ptr, out_ptr, valid, OTHER: tl.constexpr, N: tl.constexpr):
    cell = tl.arange(0, N)
    x = tl.load(x_ptr + cell, mask=cell < valid, other=OTHER)
    tl.store(out_ptr + cell, x, mask=cell < N - 1)


@triton.jit
def _constant_kernel(x_ptr, out_ptr, VALUE: tl.constexpr, N: tl.constexpr):
    cell = tl.arange(0, N)
    out = tl.full((N,), VALUE, tl.bfloat16) + tl.zeros((N,), tl.bfloat16)
    tl.store(out_ptr + cell, tl.where(cell < 8, out, tl.full((N,), tl.load(x_ptr), tl.bfloat16)))


@check
def masked_loads_and_stores():
    x = EVERY[0x3F80:0x3F90].contiguous()
    for other in (0.0, 1.7, -3.0, float("inf"), float("nan")):
        out = torch.full_like(x, -7)
        _masked_kernel[(1,)](x, out, 10, OTHER=other, N=16)
        same(out, torch.cat([x[:10], torch.full((5,), other, dtype=BF16), x.new_tensor([-7])]))


@check
def constants():
    value = torch.tensor([1 / 3])
    for constant in (1.7, 0.0, 3, 3.38e38):
        want = torch.full((16,), constant, dtype=BF16)
        want[8:] = value.to(BF16)
        same(run(_constant_kernel, value, shape=(16,), VALUE=constant, N=16), want)


@triton.jit
def _descriptor_kernel(
    x_ptr, out_ptr, M, N, PADDING: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    source = tl.make_tensor_descriptor(x_ptr, [M, N], [16, 1], [ROWS, COLS], padding_option=PADDING)
    x = source.load([0, 0])
    tl.store(out_ptr + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :], x)


@triton.jit
def _descriptor_store_kernel(x_ptr, out_ptr, M, N, ROWS: tl.constexpr, COLS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :])
    target = tl.make_tensor_descriptor(out_ptr, [M, N], [16, 1], [ROWS, COLS])
    target.store([0, 0], x)


def descriptor(padding, fill):
    x = SMALL.flatten()[:128].reshape(8, 16).contiguous()
    out, want = torch.full((8, 16), -7, dtype=BF16), torch.full((8, 16), fill, dtype=BF16)
    _descriptor_kernel[(1,)](x, out, 5, 13, PADDING=padding, ROWS=8, COLS=16)
    want[:5, :13] = x[:5, :13]
    same(out, want)


@check
def descriptors():
    descriptor("zero", 0.0)
    x = X[: 8 * 16].reshape(8, 16)
    out, want = torch.full((8, 16), -7, dtype=BF16), torch.full((8, 16), -7, dtype=BF16)
    _descriptor_store_kernel[(1,)](x, out, 5, 13, ROWS=8, COLS=16)
    want[:5, :13] = x[:5, :13]
    same(out, want)


@check
def descriptors_padded_with_nan():
    descriptor("nan", torch.nan)


@triton.jit
def _layout_kernel(x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    row, col = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + row[:, None] * N + col[None, :])
    even, odd = tl.split(tl.reshape(tl.trans(x), (N, M // 2, 2)))
    x = tl.join(odd, even).reshape(N, M).trans()
    x = tl.broadcast_to(x[None, :, :], (1, M, N)).permute(0, 2, 1).reshape(N * M)
    tl.store(out_ptr + tl.arange(0, N * M), tl.flip(x, 0))


@check
def layouts():
    x = EVERY[0x7F00:0x8100].reshape(32, 16).contiguous()
    want = x.reshape(16, 2, 16).flip(1).reshape(32, 16).mT.flatten().flip(0)
    got = run(_layout_kernel, x, shape=(512,), M=32, N=16)
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))


@triton.jit
def _softmax_kernel(x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    row, col = tl.arange(0, M), tl.arange(0, N)
    cell = row[:, None] * N + col[None, :]
    x = tl.load(x_ptr + cell)
    weights = tl.exp2((x - tl.max(x, 1)[:, None].to(tl.bfloat16)).to(tl.float32))
    tl.store(out_ptr + cell, (weights / tl.sum(weights, 1)[:, None]).to(tl.bfloat16))


@check
def softmax():
    """A whole kernel; one unit in the last place for the order of the sum."""
    want = torch.softmax((SMALL - SMALL.amax(1, keepdim=True)).double() * np.log(2), 1)
    torch.testing.assert_close(
        run(_softmax_kernel, SMALL, M=16, N=64).double(), want, rtol=2**-8, atol=0
    )


@triton.jit
def _atomic_kernel(x_ptr, out_ptr, N: tl.constexpr):
    tl.atomic_add(out_ptr + tl.arange(0, N), tl.load(x_ptr + tl.arange(0, N)))


@check
def atomics_raise():
    with pytest.raises(triton_interpreter.InterpreterError, match="Unsupported data type"):
        run(_atomic_kernel, EVERY[:16], N=16)


@check
def repairing_twice_is_repairing_once():
    before = dict(vars(triton_interpreter.InterpreterBuilder))
    if "repaired_by_visproj" in before:
        interpreter.repair()
    assert before == dict(vars(triton_interpreter.InterpreterBuilder))


def report():
    found = {}
    for name, function in CHECKS.items():
        torch.manual_seed(0)
        try:
            function()
            found[name] = ""
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    assert interpreter.interpreting()
    if sys.argv[1] == "repaired":
        interpreter.repair()
    # NumPy warns of every NaN and overflow, of which there are many here on purpose.
    with np.errstate(all="ignore"):
        print(json.dumps(report(), indent=1))
