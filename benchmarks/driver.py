"""A Triton driver for a device that is absent: kernels are compiled for it, launches do nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.backends.compiler import GPUTarget


class AbsentDriver:
    """The part of Triton's driver interface that compiling and launching need.

    Args:
        target: Target that kernels are compiled for.
        launched: Called with the arguments of every launch, those of the kernel last.
    """

    def __init__(
        self, target: GPUTarget, launched: Callable[..., None] = lambda *arguments: None
    ) -> None:
        self._target = target
        self._launched = launched
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return the function that a compiled kernel calls to launch."""
        return self._launched

    def load_binary(self, *binary: object) -> tuple[int, int, int, int, int]:
        """Return module, function, registers, spills and the maximum number of threads."""
        return 1, 1, 0, 0, 1024

    def is_active(self) -> bool:
        """Return that Triton uses this driver."""
        return True

    def get_current_target(self) -> GPUTarget:
        """Return the target that kernels are compiled for."""
        return self._target

    def get_current_device(self) -> str:
        """Return a device per target, so that each target has its own compiled kernels."""
        return f"{self._target.backend}{self._target.arch}"

    def get_current_stream(self, device: object = None) -> int:
        """Return the default stream."""
        return 0

    def get_device_properties(self, device: object = None) -> dict[str, int]:
        """Return properties that are large enough for every kernel."""
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": 132, "warpSize": 32}
