"""The algebra of the kernels in PyTorch, forward and backward, in any floating dtype.

What the custom operations compute where no kernel runs. In fp64 gradcheck proves these formulas.
Statistics and sums are in fp32, or in fp64 for fp64.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from visproj.reference.cross_attention import cross_attention_ref


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype of sums: fp64 for fp64, else fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def row_statistics(y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and ``1 / sqrt(var + eps)`` over the last dimension."""
    variance, mean = torch.var_mean(wide(y), dim=-1, correction=0)
    return mean, (variance + eps).rsqrt()


def normalise(y: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor, shift: Tensor | None) -> Tensor:
    """``(y - mean) * rstd * gain + shift`` in the dtype of sums."""
    out = (wide(y) - mean[..., None]) * rstd[..., None] * wide(gain)
    return out if shift is None else out + wide(shift)


def layer_norm_backward(
    grad: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``dy = rstd (g - mean(g) - ŷ mean(g ŷ))``, ``g = grad * gain``; ``Σ grad ŷ``; ``Σ grad``."""
    grad = wide(grad)
    normal = (wide(y) - mean[..., None]) * rstd[..., None]
    g = grad * wide(gain)
    centred = g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True)
    rows = (grad * normal).flatten(0, -2), grad.flatten(0, -2)
    return (centred * rstd[..., None]).to(y.dtype), rows[0].sum(0), rows[1].sum(0)


def linear_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias: ``gradᵀ x`` and ``Σ grad`` over all rows."""
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    return grad.T @ x, wide(grad).sum(0).to(x.dtype)


def norm_linear(
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
) -> Tensor:
    """``rstd (y W_γᵀ - mean s) + c + table``: a LayerNorm behind which a Linear stands.

    ``W_γ = W diag(gain)``, ``s`` its row sums, ``c = W shift + bias``; the table is added to the
    first columns.
    """
    folded = (wide(weight) * wide(gain)).to(weight.dtype)
    constant = 0 if shift is None else wide(weight) @ wide(shift)
    constant = constant if bias is None else constant + wide(bias)
    out = wide(F.linear(y, folded)) - mean[..., None] * wide(folded).sum(1)
    out = out * rstd[..., None] + constant
    if table is not None:
        out = out + F.pad(wide(table), (0, out.shape[-1] - table.shape[-1]))
    return out.to(y.dtype)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """``[B, Q, H, d]``; the mask is additive, ``[B or 1, H or 1, Q or 1, L]``."""
    if mask is not None:
        batch, heads = k.shape[0], k.shape[2]
        mask = mask.expand(batch, heads, q.shape[-3], -1).flatten(0, 1)
    return cross_attention_ref(q, k, v, attn_mask=mask).contiguous()


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from recomputed probabilities ``p``, zero for a query without a key.

    ``dv = pᵀ dout``, ``ds = p (dout vᵀ - Σ dout out)``, ``dq = ds k / √d``, ``dk = dsᵀ q / √d``;
    the gradient of shared queries is summed over the batch.
    """
    scores = _scores(q, k, mask)  # [B, H, Q, L]
    p = scores.softmax(-1).masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0)
    dout, delta = wide(dout), (wide(dout) * wide(out)).sum(-1).transpose(1, 2)
    dp = torch.einsum("bqhd,blhd->bhql", dout, wide(v))
    ds = p * (dp - delta[..., None]) / math.sqrt(q.shape[-1])
    dq = torch.einsum("bhql,blhd->bqhd" if q.ndim == 4 else "bhql,blhd->qhd", ds, wide(k))
    dk = torch.einsum("bhql,bqhd->blhd", ds, wide(q).expand(k.shape[0], -1, -1, -1))
    dv = torch.einsum("bhql,bqhd->blhd", p, dout)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    q = wide(q).expand(k.shape[0], -1, -1, -1)
    scores = torch.einsum("bqhd,blhd->bhql", q, wide(k)) / math.sqrt(q.shape[-1])
    return scores if mask is None else scores + wide(mask)
