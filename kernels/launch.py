"""One way to compile a kernel, and the launch that every launcher goes through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visproj.kernels.device import INTERPRETING, architecture


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel.

    Attributes:
        blocks: Tile sizes, in the order in which the kernel's launcher names them.
        warps: Warps per program.
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


def launch(
    kernel: Any, programs: int, /, *, config: Config, device: torch.device, **arguments: Any
) -> None:
    """Launch ``programs`` instances of ``kernel`` on ``device`` and its current stream.

    Raises:
        RuntimeError: If the kernel does not compile or launch; the message has the configuration.
    """
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    try:
        with on_device, _workspace(device) if config.descriptors else nullcontext():
            start(kernel, programs, arguments, config)
    except Exception as error:
        raise RuntimeError(
            f"the Triton kernel {kernel.__name__} failed on {device} (architecture "
            f"{architecture(device)}) with the configuration {config}: {error}. "
            'visproj.use_backend("torch") or VISPROJ_BACKEND=torch avoids it'
        ) from error


def start(kernel: Any, programs: int, arguments: dict[str, Any], config: Config) -> None:
    """Hand a kernel to Triton; what counts launches instead of running them replaces this."""
    options = {} if INTERPRETING else {"num_warps": config.warps, "num_stages": config.stages}
    kernel[(programs,)](**arguments, **options)


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
