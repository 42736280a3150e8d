"""Attention masks: checked, merged, and cast without making large numbers infinite."""

from __future__ import annotations

import torch
from torch import Tensor

from visproj.errors import InputError
from visproj.ops.checks import check_device, check_tensor

_NEG_INF = float("-inf")


def check_masks(
    like: Tensor,
    shape: tuple[int, int, int, int],
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> None:
    """Raise unless both masks, where given, fit ``shape`` = (B, H, Q, L) and the device.

    Raises:
        TypeError: If a mask has an unsuitable dtype.
        ValueError: If a mask has an unsuitable shape or device.
    """
    batch, heads, queries, keys = shape
    if attn_mask is not None:
        check_tensor("attn_mask", attn_mask)
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise TypeError(f"attn_mask must be bool or floating point, got {attn_mask.dtype}")
        if tuple(attn_mask.shape) not in ((queries, keys), (batch * heads, queries, keys)):
            raise InputError(
                f"attn_mask must be [Q, L] = [{queries}, {keys}] or [B * heads, Q, L] = "
                f"[{batch * heads}, {queries}, {keys}], got {list(attn_mask.shape)}"
            )
        check_device("attn_mask", attn_mask, "k", like)
    if key_padding_mask is not None:
        check_tensor("key_padding_mask", key_padding_mask)
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be bool, got {key_padding_mask.dtype}")
        if tuple(key_padding_mask.shape) != (batch, keys):
            raise InputError(
                f"key_padding_mask must be [B, L] = [{batch}, {keys}], "
                f"got {list(key_padding_mask.shape)}"
            )
        check_device("key_padding_mask", key_padding_mask, "k", like)


def merge_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    batch: int,
    heads: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return one mask for SDPA that broadcasts to [B, H, Q, L], and its fully masked rows.

    Bool masks are merged into a bool mask (True = attend, as in SDPA), others into an additive mask
    of ``dtype``. Fully masked rows are unmasked in the result, so that no SDPA kernel gives NaN for
    them or their gradients; the caller sets their outputs to zero. At least one mask must be given.
    """
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
    """Return one mask ``[B or 1, H or 1, Q or 1, L]`` to add to the scores, or ``None``."""
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
