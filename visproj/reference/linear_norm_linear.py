"""Linear, LayerNorm and Linear in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visproj.reference.linear_layer_norm import linear_layer_norm_ref


def linear_norm_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    shift: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    positions: Tensor | None = None,
    positioned: int = 0,
    *,
    eps: float,
) -> Tensor:
    """``LayerNorm(x Wᵀ + b) Vᵀ + d``; arguments as :func:`visproj.ops.linear_norm_linear`."""
    normal = linear_layer_norm_ref(x, weight, bias, gain, shift, eps)
    if positions is None:
        return F.linear(normal, out_weight, out_bias)
    split = (positioned, out_weight.shape[0] - positioned)
    weights = out_weight.split(split)
    biases = (None, None) if out_bias is None else out_bias.split(split)
    rows = (normal + positions, normal)
    return torch.cat([F.linear(*parts) for parts in zip(rows, weights, biases, strict=True)], -1)
