"""An autotuning configuration of a kernel, and the launch that every launcher uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visproj.kernels.device import INTERPRETING, architecture


@dataclass(frozen=True)
class Config:
    """An autotuning configuration: one way to compile a kernel.

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


class Launch:
    """A kernel with all its arguments except the tensors, which can be started repeatedly.

    The first start goes through Triton's binder, which compiles the kernel for its arguments. Later
    starts pass their tensors to the compiled kernel directly. Each of these tensors must have the
    dtype and alignment of the first start's tensor, and be ``None`` if that was ``None``.

    Args:
        kernel: The function that Triton compiles; its tensors come first.
        programs: Number of programs.
        config: Configuration that it is compiled with.
        device: Where it runs, on that device's current stream.
        rest: The arguments after the tensors, by name.
    """

    def __init__(
        self, kernel: Any, programs: int, config: Config, device: torch.device, **rest: Any
    ) -> None:
        self.kernel = kernel
        self.programs = programs
        self.config = config
        self.device = device
        self.rest = rest
        names = kernel.arg_names
        self._tensors = names[: len(names) - len(rest)]
        self._rest = [rest[name] for name in names[len(self._tensors) :]]
        self._compiled: Any = None

    def __call__(self, **tensors: Tensor | None) -> None:
        """Start the kernel.

        Raises:
            RuntimeError: If it does not compile or start; the message states the configuration.
        """
        device = self.device
        try:
            if device.type == "cuda" and torch.cuda.current_device() != device.index:
                with torch.cuda.device(device):
                    self.start(tensors)
            else:
                self.start(tensors)
        except Exception as error:
            raise RuntimeError(
                f"the Triton kernel {self.kernel.__name__} failed on {device} (architecture "
                f"{architecture(device)}) with the configuration {self.config}: {error}. "
                'visproj.use_backend("torch") or VISPROJ_BACKEND=torch avoids it'
            ) from error

    def start(self, tensors: dict[str, Tensor | None]) -> None:
        """Start the kernel on the current device; code that counts launches replaces this."""
        if not self.config.descriptors:
            self._start(tensors)
            return
        from triton.runtime import _allocation

        # Allocates the few bytes that descriptors made in a kernel need.
        token = _allocation._allocator.set(self._allocate)
        try:
            self._start(tensors)
        finally:
            _allocation._allocator.reset(token)

    def _start(self, tensors: dict[str, Tensor | None]) -> None:
        if self._compiled is not None:
            again = self._compiled[(self.programs, 1, 1)]
            again(*[tensors[name] for name in self._tensors], *self._rest)
            return
        config = self.config
        options = {} if INTERPRETING else {"num_warps": config.warps, "num_stages": config.stages}
        # The interpreter compiles nothing and returns None.
        self._compiled = self.kernel[(self.programs,)](**tensors, **self.rest, **options)

    def _allocate(self, size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=self.device)
