"""Small kernels over everything the interpreter's repair touches, compared with torch bit by bit.

Run as a script under ``TRITON_INTERPRET=1``, with the argument ``repaired`` or ``stock``: prints
one JSON object, from the name of each check to what is wrong with it, empty if nothing is.
"""

import json
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from interpreter_elementwise import BF16, CHECKS, EVERY, SMALL, X, check, run, same
from triton.runtime import interpreter as triton_interpreter

from visproj.kernels import interpreter


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
