"""Triton's interpreter (``TRITON_INTERPRET=1``), repaired where it gets bf16 wrong.

The interpreter stores bf16 as bit patterns in uint16, because NumPy has no type for it. The errors,
seen in triton 3.6.0, 3.7.1 and 3.8.0:

- Arithmetic, comparisons, ``tl.fma``, ``tl.dot`` and reductions that stay in bf16 take the bit
  patterns for integers.
- fp32 becomes bf16 by truncation, which turns some NaNs into Inf. Casts lose subnormals.
- fp64 and integers become bf16 without conversion: 3 becomes the bit pattern 3.
- bf16 constants other than 0 raise.
- The NaN padding of a bf16 descriptor is 0.
- ``tl.dot`` does not round operands to tf32.
- In 3.6.0 and 3.7.1 ``tl.maximum``, ``tl.minimum`` and ``tl.clamp`` propagate a NaN that a GPU
  drops.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partialmethod
from importlib.util import find_spec
from typing import Any

import numpy as np

NAN = np.uint16(0x7FC0)


def interpreting() -> bool:
    """Return whether kernels that this process decorates from now on are interpreted."""
    if find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _widen(bits: np.ndarray) -> np.ndarray:
    """Return the fp32 values of bf16 bit patterns."""
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def _narrow(values: Any, to_nearest: bool = True) -> np.ndarray:
    """Return the bf16 bit patterns of numbers, rounded from fp32 to nearest even or to zero."""
    with np.errstate(over="ignore"):
        values = np.asarray(values, dtype=np.float32)
        bits = values.view(np.uint32)
        if to_nearest:
            bits = bits + (0x7FFF + (bits >> 16 & 1))
    return np.where(np.isnan(values), NAN, bits >> 16).astype(np.uint16)


def _round_to_tf32(values: np.ndarray) -> np.ndarray:
    """Round fp32 values to 10 bits of mantissa, ties away from zero, as PTX's ``cvt.rna.tf32``."""
    rounded = ((values.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def repair() -> None:
    """Make the interpreter compute bf16 in fp32 and round to nearest even; idempotent.

    A sum of bf16 numbers is rounded at every addition, as on a GPU: ``tl.sum``, unlike ``tl.max``
    and ``tl.cumsum``, does not convert to fp32.

    The repair also rounds the fp32 operands of ``tl.dot(..., input_precision="tf32")``, and makes
    ``tl.maximum``, ``tl.minimum`` and ``tl.clamp`` drop a NaN unless asked to propagate it. It does
    not repair bf16 atomics, which raise; ``tl.fma`` in fp32, which rounds twice; casts to and from
    fp8, except for their bf16 side; the NaN padding of block pointers; and printed bf16 tensors,
    which show bit patterns.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    Builder, Handle, ir = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter._ir
    if hasattr(Builder, "repaired_by_visproj"):
        return
    Builder.repaired_by_visproj = True

    def is_bf16(operand: Any) -> bool:
        # The stock builder labels a comparison's booleans with the type of what was compared.
        return (
            isinstance(operand, Handle)
            and operand.dtype.scalar == tl.bfloat16
            and operand.data.dtype == np.uint16
        )

    def widened(operand: Any) -> Any:
        return Handle(_widen(operand.data), tl.float32) if is_bf16(operand) else operand

    def narrowed(values: Any, to_nearest: bool = True) -> Any:
        return Handle(_narrow(values, to_nearest), tl.bfloat16)

    def replace(owner: type, *names: str) -> Callable:
        """Decorator: the function becomes the owner's method, with the stock one after ``self``."""

        def install(function: Callable) -> Callable:
            for name in names or [function.__name__]:
                setattr(owner, name, partialmethod(function, getattr(owner, name, None)))
            return function

        return install

    @replace(Builder)
    def get_bf16(self, stock, value):
        return narrowed([value])

    @replace(Builder, "unary_op", "binary_op", "create_fma", "create_erf", "create_rsqrt")
    def compute_in_fp32(self, stock, *operands):
        result = stock(self, *map(widened, operands))
        is_number = result.data.dtype != bool
        return narrowed(result.data) if is_number and any(map(is_bf16, operands)) else result

    @replace(Builder)
    def create_maxnumf(self, stock, x, y):
        return self.binary_op(x, y, np.fmax)

    @replace(Builder)
    def create_minnumf(self, stock, x, y):
        return self.binary_op(x, y, np.fmin)

    @replace(Builder)
    def create_clampf(self, stock, x, low, high, propagate_nan):
        if propagate_nan == ir.PROPAGATE_NAN.ALL:
            return stock(self, x, low, high, propagate_nan)
        return self.create_minnumf(self.create_maxnumf(x, low), high)

    @replace(Builder)
    def cast_impl(self, stock, source, target):
        if target.scalar == tl.bfloat16:
            return narrowed(widened(source).data)
        return stock(self, widened(source), target)

    @replace(Builder)
    def create_fp_to_fp(self, stock, source, target, rounding):
        if target.scalar != tl.bfloat16:
            return stock(self, widened(source), target, rounding)
        if source.dtype.scalar.is_fp8():
            source = stock(self, source, tl.float32, rounding)
        return narrowed(source.data, to_nearest=rounding != ir.ROUNDING_MODE.RTZ)

    @replace(Builder)
    def create_dot(self, stock, x, y, accumulator, precision, *rest):
        x, y = widened(x), widened(y)
        if precision == ir.INPUT_PRECISION.TF32 and x.data.dtype == np.float32:
            x, y = (Handle(_round_to_tf32(operand.data), tl.float32) for operand in (x, y))
        return stock(self, x, y, accumulator, precision, *rest)

    @replace(Builder)
    def create_descriptor_load(self, stock, descriptor, offsets, *hints):
        with np.errstate(invalid="ignore"):
            loaded = stock(self, descriptor, offsets, *hints)
        if descriptor.padding == ir.PADDING_OPTION.PAD_NAN and is_bf16(loaded):
            inside = descriptor.materialize_pointers(offsets)[1]
            loaded.data = np.where(inside, loaded.data, NAN)
        return loaded

    # A reduction that NumPy has too does not call the builder. It gets fp32 values with a bf16
    # type, and to_tensor rounds its result to bf16. Any other reduction calls its combine function,
    # and so the builder.
    @replace(interpreter.ReduceOps, "min_max")
    @replace(interpreter.ScanOps, "cumsum", "cumprod")
    def reduce_in_fp32(self, stock, tensor, **operations):
        return stock(self, tl.tensor(widened(tensor.handle), tensor.type), **operations)

    @replace(interpreter.ReduceOps, "sum")
    def sum_by_halves(self, stock, tensor):
        if not is_bf16(tensor.handle):
            return stock(self, tensor)
        values = _widen(tensor.handle.data)
        for axis in range(values.ndim) if self.axis is None else [self.axis]:
            while values.shape[axis] > 1:
                values = _widen(_narrow(sum(np.split(values, 2, axis))))
        return stock(self, tl.tensor(Handle(values, tl.float32), tensor.type))

    @replace(interpreter.ReduceScanOpInterface)
    def to_tensor(self, stock, values, dtype):
        if dtype.scalar == tl.bfloat16 and np.asarray(values).dtype.kind == "f":
            values = _narrow(values)
        return stock(self, values, dtype)
