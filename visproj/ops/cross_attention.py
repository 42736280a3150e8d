"""Attention of a set of queries, shared by the batch or not, over the keys of each image."""

from __future__ import annotations

import torch
from torch import Tensor

from visproj.ops.checks import (
    check_alike,
    check_device,
    check_floating,
    check_shape,
    to_autocast_dtype,
)
from visproj.reference import cross_attention_maps_ref, cross_attention_ref


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention with masks as ``nn.MultiheadAttention`` takes them.

    ``out[b, :, h] = softmax(q[b, :, h] k[b, :, h]ᵀ / sqrt(d) + mask) v[b, :, h]``. A query whose
    keys are all masked attends to nothing: its output is zero.

    Args:
        q: ``[Q, H, d]`` shared by the batch, or ``[B, Q, H, d]``.
        k: ``[B, L, H, d]``.
        v: ``[B, L, H, d]``.
        attn_mask: ``[Q, L]`` or ``[B * H, Q, L]`` with index ``b * H + h``; bool, True = masked
            out, or floating, added to the scores.
        key_padding_mask: bool ``[B, L]``, True = padding.

    Returns:
        ``[B, Q, H, d]`` in the dtype of ``q`` (the autocast dtype under autocast).

    Raises:
        TypeError: If a tensor is not floating point, a mask is neither bool nor floating, or,
            outside autocast, the dtypes differ.
        ValueError: If shapes do not fit or devices differ.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1.
    """
    _check_qk(q, k)
    check_shape("v", v, tuple(k.shape))
    check_alike("v", v, "q", q)
    check_masks(k, _scores_shape(q, k), attn_mask, key_padding_mask)
    q, k, v = to_autocast_dtype(q, k, v)
    return cross_attention_ref(q, k, v, attn_mask=attn_mask, key_padding_mask=key_padding_mask)


def cross_attention_maps(
    q: Tensor,
    k: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """The attention probabilities of :func:`cross_attention`, for a person to look at.

    Args:
        q: ``[Q, H, d]`` or ``[B, Q, H, d]``.
        k: ``[B, L, H, d]``.
        attn_mask: As in :func:`cross_attention`.
        key_padding_mask: As in :func:`cross_attention`.

    Returns:
        ``[B, H, Q, L]``, fp32 (fp64 for fp64 inputs); rows of fully masked queries are zero.

    Raises:
        TypeError: As :func:`cross_attention`.
        ValueError: As :func:`cross_attention`.
    """
    _check_qk(q, k)
    check_masks(k, _scores_shape(q, k), attn_mask, key_padding_mask)
    return cross_attention_maps_ref(q, k, attn_mask=attn_mask, key_padding_mask=key_padding_mask)


def _check_qk(q: Tensor, k: Tensor) -> None:
    """Raise unless queries and keys fit each other."""
    check_floating("q", q)
    if q.ndim not in (3, 4):
        raise ValueError(f"q must be [Q, H, d] or [B, Q, H, d], got shape {list(q.shape)}")
    if k.ndim != 4:
        raise ValueError(f"k must be [B, L, H, d], got shape {list(k.shape)}")
    if q.shape[-2:] != k.shape[-2:]:
        raise ValueError(
            f"q and k must have the same heads and head width, got {list(q.shape[-2:])} and "
            f"{list(k.shape[-2:])}"
        )
    if q.ndim == 4 and q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch {q.shape[0]}, but k has batch {k.shape[0]}")
    check_alike("k", k, "q", q)


def _scores_shape(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    return k.shape[0], k.shape[2], q.shape[-3], k.shape[1]


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
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise TypeError(f"attn_mask must be bool or floating point, got {attn_mask.dtype}")
        if tuple(attn_mask.shape) not in ((queries, keys), (batch * heads, queries, keys)):
            raise ValueError(
                f"attn_mask must be [Q, L] = [{queries}, {keys}] or [B * heads, Q, L] = "
                f"[{batch * heads}, {queries}, {keys}], got {list(attn_mask.shape)}"
            )
        check_device("attn_mask", attn_mask, "k", like)
    if key_padding_mask is not None:
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be bool, got {key_padding_mask.dtype}")
        if tuple(key_padding_mask.shape) != (batch, keys):
            raise ValueError(
                f"key_padding_mask must be [B, L] = [{batch}, {keys}], "
                f"got {list(key_padding_mask.shape)}"
            )
        check_device("key_padding_mask", key_padding_mask, "k", like)
