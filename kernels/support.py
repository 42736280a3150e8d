"""The check whether Triton kernels can run on a device; works without triton installed."""

from __future__ import annotations

from importlib.util import find_spec

import torch

OLDEST = (8, 0)


def why_unavailable(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a device, or ``None`` if they can."""
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
