"""Whether Triton kernels can run on this machine."""

from __future__ import annotations

from importlib.util import find_spec


def why_unavailable() -> str | None:
    """What keeps Triton kernels from running here, in a few words; ``None`` if nothing does."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from triton.runtime.driver import driver

    try:
        return None if driver.active.get_current_target() else "triton found no target"
    except RuntimeError as error:
        return f"triton found no usable GPU driver ({error})"
