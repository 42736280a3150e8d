"""Elementwise operations and casts in the interpreter, and what its other checks share."""

import math

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

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
