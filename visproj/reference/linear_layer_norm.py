"""Linear followed by LayerNorm in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    shift: Tensor | None,
    eps: float = 1e-12,
) -> Tensor:
    """``LayerNorm(x Wᵀ + b)``; arguments as :func:`visproj.ops.linear_layer_norm`, unchecked."""
    # Features behind their CLS row: PyTorch would copy a frozen weight for every image instead.
    return F.layer_norm(F.linear(x.contiguous(), weight, bias), gain.shape, gain, shift, eps)
