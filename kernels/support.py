"""Whether Triton kernels can run on a device. Imports no triton by itself."""

from __future__ import annotations

from importlib.util import find_spec

import torch

OLDEST = (8, 0)


def why_unavailable(device: torch.device) -> str | None:
    """What keeps the kernels from running on a device, in a few words; ``None`` if nothing does."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    from visproj.kernels.interpreter import interpreting

    if interpreting():
        return None
    if device.type != "cuda":
        return f"the tensors are on {device}, not on a GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"the GPU has compute capability {found}, the kernels need 8.0"
    return None
