"""A Linear whose rows are scaled by the norm of another one, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def folded_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stats_weight: Tensor,
    stats_bias: Tensor,
    shift: Tensor | None = None,
    table: Tensor | None = None,
    *,
    eps: float,
) -> Tensor:
    """``rstd (x Wᵀ + bias) + shift + table``; arguments as :func:`visproj.ops.folded_linear`."""
    # Features after their CLS row: PyTorch would copy the weights for every image instead.
    x = x.contiguous()
    return scale_rows(F.linear(x, weight, bias), x, stats_weight, stats_bias, shift, table, eps=eps)


def scale_rows(
    out: Tensor,
    x: Tensor,
    factor: Tensor,
    factor_bias: Tensor,
    shift: Tensor | None = None,
    table: Tensor | None = None,
    *,
    eps: float,
) -> Tensor:
    """``rstd out + shift + table`` in place, ``rstd = (‖x factorᵀ + factor_bias‖² + eps)^(-1/2)``.

    ``rstd`` is up to ``eps^(-1/2)`` = 1e6, more than fp16 can hold, and stays in fp32 there.
    """
    norms = F.linear(x, factor, factor_bias)
    wide = torch.promote_types(norms.dtype, torch.float32)
    rstd = (norms.to(wide).square().sum(-1, keepdim=True) + eps).rsqrt()
    rstd = rstd if out.dtype == torch.float16 else rstd.to(out.dtype)
    added = out.new_zeros(out.shape[-1]) if shift is None else shift
    if table is not None:
        missing = out.shape[-1] - table.shape[-1]
        table = F.pad(table, (0, missing)) if missing else table
        added = table if shift is None else table + shift
    return torch.addcmul(added.to(out.dtype), out, rstd, out=out)
