"""What every launcher shares: configurations, alignment, precision, and the launch itself."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

from visproj.errors import InputError
from visproj.kernels.interpreter import interpreting, repair

P = ParamSpec("P")
R = TypeVar("R")

INTERPRETING = interpreting()  # settled when the kernels are decorated, which is next
if INTERPRETING:
    repair()

# What the interpreter pretends to be, so that it runs shipped configurations.
_INTERPRETED_ARCHITECTURE = 80


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel.

    Attributes:
        blocks: Tile sizes, in the order in which the kernel's launcher names them.
        warps: Warps a program.
        stages: Stages of the software pipeline.
        descriptors: Whether tiles move through tensor descriptors instead of pointers.
    """

    blocks: tuple[int, ...]
    warps: int
    stages: int
    descriptors: bool = False

    def __str__(self) -> str:
        style = "descriptors" if self.descriptors else "pointers"
        return f"{'x'.join(map(str, self.blocks))}/{self.warps}w{self.stages}s {style}"


def switched_on(variable: str) -> bool:
    """Whether a variable of the environment is 1, as it is when unset or empty, and not 0.

    Raises:
        ValueError: If it is anything else.
    """
    value = os.environ.get(variable) or "1"
    if value not in ("0", "1"):
        raise InputError(f"{variable} must be 0 or 1, got {value!r}")
    return value == "1"


def architecture() -> int | str:
    """Compute capability of the current device as 80, 90, …; AMD's name of it there."""
    if INTERPRETING:
        return _INTERPRETED_ARCHITECTURE
    return triton.runtime.driver.active.get_current_target().arch


def multiprocessors(device: torch.device) -> int:
    """How many programs of a large tile a device runs at once; 4 where nothing runs in parallel."""
    if device.type != "cuda" or INTERPRETING:
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot`` for operands of ``dtype``, as PyTorch's matmul has it.

    The setting of ``torch.backends.cuda.matmul.fp32_precision`` comes first: once it is set, the
    older ``torch.get_float32_matmul_precision()`` raises.
    """
    if dtype != torch.float32:
        return "ieee"
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    if newer != "none":
        return "tf32" if newer == "tf32" else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def describable(*tensors: Tensor | None) -> bool:
    """Whether tensor descriptors can address these tensors.

    They need 16-byte aligned bases and strides, and a last dimension that is contiguous.
    """
    return all(
        tensor.data_ptr() % 16 == 0
        and tensor.stride(-1) == 1
        and all(
            stride > 0 and stride * tensor.element_size() % 16 == 0
            for stride in tensor.stride()[:-1]
        )
        for tensor in tensors
        if tensor is not None
    )


def unit_columns(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def on_its_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """Run a launcher with the device of its first tensor current, also while it tunes."""

    @functools.wraps(launcher)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else next(iter(kwargs.values()))
        with torch.cuda.device_of(first):
            return launcher(*args, **kwargs)

    return guarded


def packed(*vectors: Tensor | None) -> list[Tensor | None]:
    """The vectors with unit strides, copied only where they have others."""
    return [None if vector is None else vector.contiguous() for vector in vectors]


def launch(
    kernel: Any, programs: int, *args: Any, config: Config, device: torch.device, **constants: Any
) -> None:
    """Launch ``programs`` instances of ``kernel`` on ``device`` and its current stream.

    Raises:
        RuntimeError: If the kernel does not compile or launch; the message has the configuration.
    """
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    try:
        with on_device, _workspace(device) if config.descriptors else nullcontext():
            start(kernel, programs, args, constants, config)
    except Exception as error:
        raise RuntimeError(
            f"the Triton kernel {kernel.__name__} failed on {device} (architecture "
            f"{architecture()}) with the configuration {config}: {error}. "
            'visproj.use_backend("torch") or VISPROJ_BACKEND=torch avoids it'
        ) from error


def start(
    kernel: Any,
    programs: int,
    args: tuple[Any, ...],
    constants: dict[str, Any],
    config: Config,
) -> None:
    """Hand a kernel to Triton; what counts launches instead of running them replaces this."""
    options = {} if INTERPRETING else {"num_warps": config.warps, "num_stages": config.stages}
    kernel[(programs,)](*args, **constants, **options)


@contextmanager
def _workspace(device: torch.device) -> Iterator[None]:
    """Let Triton allocate the few bytes that descriptors made in a kernel need."""
    from triton.runtime import _allocation

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    token = _allocation._allocator.set(allocate)
    try:
        yield
    finally:
        _allocation._allocator.reset(token)
