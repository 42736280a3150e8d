"""Cross-attention in plain PyTorch: SDPA over merged masks."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

_NEG_INF = float("-inf")


def cross_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Arguments as :func:`visproj.ops.cross_attention`, unchecked; shared queries stay shared."""
    batch, _, heads, _ = k.shape
    mask, dead = _merge_masks(attn_mask, key_padding_mask, batch, heads, q.dtype)
    out = F.scaled_dot_product_attention(
        _by_head(q, batch), _by_head(k, batch), _by_head(v, batch), attn_mask=mask
    )
    if dead is not None:
        out = out.masked_fill(dead, 0.0)
    return out.transpose(1, 2)


def cross_attention_maps_ref(
    q: Tensor,
    k: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Arguments as :func:`visproj.ops.cross_attention_maps`, unchecked."""
    batch, _, heads, width = k.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    mask, dead = _merge_masks(attn_mask, key_padding_mask, batch, heads, dtype)
    q, k = _by_head(q, batch).to(dtype), _by_head(k, batch).to(dtype)
    kind = q.device.type
    autocasts = torch.amp.is_autocast_available(kind)
    with torch.autocast(kind, enabled=False) if autocasts else nullcontext():
        scores = q @ k.transpose(-1, -2) / math.sqrt(width)
    if mask is not None:
        scores = scores.masked_fill(~mask, _NEG_INF) if mask.dtype == torch.bool else scores + mask
    maps = scores.softmax(-1)
    return maps if dead is None else maps.masked_fill(dead, 0.0)


def _by_head(x: Tensor, batch: int) -> Tensor:
    """``[(B,) N, H, d] -> [B, H, N, d]`` without a copy."""
    return x.transpose(-3, -2).expand(batch, -1, -1, -1)


def _merge_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    batch: int,
    heads: int,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """One mask for SDPA that broadcasts to [B, H, Q, L], and which of its rows have no key left.

    Bool masks merge into a bool one (True = attend, SDPA's sense), anything else into an additive
    one of ``dtype``. Rows without a key are opened up, so that neither they nor their gradients are
    NaN in any SDPA kernel; the caller zeroes what comes out of them.
    """
    if attn_mask is None and key_padding_mask is None:
        return None, None
    padding = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
    if attn_mask is not None:
        attn_mask = attn_mask.unflatten(0, (batch, heads)) if attn_mask.ndim == 3 else attn_mask
    if attn_mask is None or attn_mask.dtype == torch.bool:
        masked = [mask for mask in (attn_mask, padding) if mask is not None]
        closed = masked[0] if len(masked) == 1 else masked[0] | masked[1]
        dead = closed.all(-1, keepdim=True)
        return _four_d(~closed | dead), _four_d(dead)
    added = cast_mask(attn_mask, dtype)
    if padding is not None:
        added = added.masked_fill(padding, _NEG_INF)
    dead = added.isneginf().all(-1, keepdim=True)
    return _four_d(added.masked_fill(dead, 0.0)), _four_d(dead)


def additive_mask(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    batch: int,
    heads: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Both masks as one to be added to the scores, ``[B or 1, H or 1, Q or 1, L]``."""
    mask = None
    if attn_mask is not None:
        mask = attn_mask.unflatten(0, (batch, heads)) if attn_mask.ndim == 3 else attn_mask
        mask = _four_d(_added(mask, dtype) if mask.dtype == torch.bool else cast_mask(mask, dtype))
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None, :]
        mask = _added(padding, dtype) if mask is None else mask.masked_fill(padding, _NEG_INF)
    return mask


def _added(closed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(closed, dtype=dtype).masked_fill(closed, _NEG_INF)


def _four_d(mask: Tensor) -> Tensor:
    return mask[(None,) * (4 - mask.ndim)]


def cast_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast an additive mask so that -inf stays -inf and large finite values stay finite."""
    limits = torch.finfo(dtype)
    if limits.max >= torch.finfo(mask.dtype).max:
        return mask.to(dtype)
    return mask.clamp(limits.min, limits.max).to(dtype).masked_fill(mask.isneginf(), _NEG_INF)
