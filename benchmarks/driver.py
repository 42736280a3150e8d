"""A driver for a device that is not there: kernels compile for it, and launches go nowhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.backends.compiler import GPUTarget


class AbsentDriver:
    """As much of Triton's driver as compiling and launching need.

    Args:
        target: What kernels are compiled for.
        launched: Called with the arguments of every launch, those of the kernel last.
    """

    def __init__(
        self, target: GPUTarget, launched: Callable[..., None] = lambda *arguments: None
    ) -> None:
        self._target = target
        self._launched = launched
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What a compiled kernel calls to launch."""
        return self._launched

    def load_binary(self, *binary: object) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills and most threads."""
        return 1, 1, 0, 0, 1024

    def is_active(self) -> bool:
        """It is the one that Triton uses."""
        return True

    def get_current_target(self) -> GPUTarget:
        """What kernels are compiled for."""
        return self._target

    def get_current_device(self) -> str:
        """A device of its own for every target, so that each has its own compiled kernels."""
        return f"{self._target.backend}{self._target.arch}"

    def get_current_stream(self, device: object = None) -> int:
        """The default stream."""
        return 0

    def get_device_properties(self, device: object = None) -> dict[str, int]:
        """Enough of everything."""
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": 132, "warpSize": 32}
