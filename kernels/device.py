"""The device that kernels run on, and the precision of their matmuls."""

from __future__ import annotations

import functools
import os
from contextlib import nullcontext

import torch
import triton

from visproj.errors import InputError
from visproj.kernels.interpreter import interpreting, repair

INTERPRETING = interpreting()  # does not change once the kernels are decorated, on import
if INTERPRETING:
    repair()

# The architecture whose shipped configurations the interpreter runs.
_INTERPRETED_ARCHITECTURE = 80


def switched_on(variable: str) -> bool:
    """Return whether an environment variable is 1, not 0; unset or empty, it counts as 1.

    Raises:
        ValueError: If it is anything else.
    """
    value = os.environ.get(variable) or "1"
    if value not in ("0", "1"):
        raise InputError(f"{variable} must be 0 or 1, got {value!r}")
    return value == "1"


@functools.cache
def architecture(device: torch.device) -> int | str:
    """Return the compute capability of a device as 80, 90, …; on AMD the architecture's name."""
    if INTERPRETING:
        return _INTERPRETED_ARCHITECTURE
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return triton.runtime.driver.active.get_current_target().arch


def multiprocessors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors; 4 on a CPU and in the interpreter."""
    if device.type != "cuda" or INTERPRETING:
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def dot_precision(dtype: torch.dtype) -> str:
    """Return ``input_precision`` of ``tl.dot`` for ``dtype``, by PyTorch's setting for matmuls.

    The setting of ``torch.backends.cuda.matmul.fp32_precision`` comes first: once it is set, the
    older ``torch.get_float32_matmul_precision()`` raises.
    """
    if dtype != torch.float32:
        return "ieee"
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    if newer != "none":
        return "tf32" if newer == "tf32" else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
