"""What the kernels run on, and in which precision they multiply there."""

from __future__ import annotations

import functools
import os
from contextlib import nullcontext

import torch
import triton

from visproj.errors import InputError
from visproj.kernels.interpreter import interpreting, repair

INTERPRETING = interpreting()  # settled when the kernels are decorated, which is next
if INTERPRETING:
    repair()

# What the interpreter pretends to be, so that it runs shipped configurations.
_INTERPRETED_ARCHITECTURE = 80


def switched_on(variable: str) -> bool:
    """Return whether a variable of the environment is 1, as it is when unset or empty, and not 0.

    Raises:
        ValueError: If it is anything else.
    """
    value = os.environ.get(variable) or "1"
    if value not in ("0", "1"):
        raise InputError(f"{variable} must be 0 or 1, got {value!r}")
    return value == "1"


@functools.cache
def architecture(device: torch.device) -> int | str:
    """Return the compute capability of a device as 80, 90, …; AMD's name of it there."""
    if INTERPRETING:
        return _INTERPRETED_ARCHITECTURE
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return triton.runtime.driver.active.get_current_target().arch


def multiprocessors(device: torch.device) -> int:
    """Return how many programs of a large tile run at once; 4 where nothing runs in parallel."""
    if device.type != "cuda" or INTERPRETING:
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def dot_precision(dtype: torch.dtype) -> str:
    """Return ``input_precision`` of ``tl.dot`` for ``dtype``, as PyTorch's matmul has it.

    The setting of ``torch.backends.cuda.matmul.fp32_precision`` comes first: once it is set, the
    older ``torch.get_float32_matmul_precision()`` raises.
    """
    if dtype != torch.float32:
        return "ieee"
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    if newer != "none":
        return "tf32" if newer == "tf32" else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
