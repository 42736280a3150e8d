"""Attention of a set of queries, shared by the batch or not, over the keys of each image."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visproj.backend import runs_triton
from visproj.errors import InputError
from visproj.ops.autograd import EMPTY, forbid_second_derivative, saves_for_backward
from visproj.ops.checks import (
    check_alike,
    check_device,
    check_floating,
    check_shape,
    check_tensor,
    to_autocast_dtype,
)
from visproj.reference import cross_attention_maps_ref, cross_attention_ref, formulas
from visproj.reference.cross_attention import additive_mask, cast_mask

__all__ = ["cast_mask", "check_masks", "cross_attention", "cross_attention_maps"]

MAX_HEAD_WIDTH = 256
_MASK_MULTIPLE = 128  # every tile of keys divides it, so that no kernel masks what is masked


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scaled dot-product attention with masks as ``nn.MultiheadAttention`` takes them.

    ``out[b, :, h] = softmax(q[b, :, h] k[b, :, h]ᵀ / sqrt(d) + mask) v[b, :, h]``. A query whose
    keys are all masked attends to nothing: its output is zero.

    Args:
        q: ``[Q, H, d]`` shared by the batch, or ``[B, Q, H, d]``.
        k: ``[B, L, H, d]``, or keys and values packed as ``[B, L, 2, H, d]``, whose gradient is
            then packed as well.
        v: ``[B, L, H, d]``, ``None`` beside packed keys and values.
        attn_mask: ``[Q, L]`` or ``[B * H, Q, L]`` with index ``b * H + h``; bool, True = masked
            out, or floating, added to the scores. One that requires a gradient goes to PyTorch.
        key_padding_mask: bool ``[B, L]``, True = padding.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; see :func:`visproj.use_backend`.

    Returns:
        ``[B, Q, H, d]`` in the dtype of ``q`` (the autocast dtype under autocast).

    Raises:
        TypeError: If a tensor is not floating point, a mask is neither bool nor floating, or,
            outside autocast, the dtypes differ.
        ValueError: If shapes do not fit or devices differ.
        RuntimeError: If ``"triton"`` was asked for and cannot run here.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1.
    """
    keys, values = _unpack(k, v)
    _check_qk(q, keys)
    check_shape("v", values, tuple(keys.shape))
    check_alike("v", values, "q", q)
    shape = _scores_shape(q, keys)
    check_masks(keys, shape, attn_mask, key_padding_mask)
    width = q.shape[-1]
    unsupported = None
    if width > MAX_HEAD_WIDTH:
        unsupported = f"head width {width} is above {MAX_HEAD_WIDTH}"
    elif saves_for_backward(attn_mask):
        unsupported = "attn_mask requires a gradient"
    triton = runs_triton(q, backend, unsupported=unsupported)
    if not triton or not math.prod(shape) * width:
        q, keys, values = to_autocast_dtype(q, keys, values)
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        return cross_attention_ref(q, keys, values, **masks)
    q, k, v = to_autocast_dtype(q, k, v)
    mask = additive_mask(attn_mask, key_padding_mask, shape[0], shape[1], q.dtype)
    if mask is not None:
        mask = F.pad(mask, (0, -shape[3] % _MASK_MULTIPLE), value=float("-inf")).contiguous()
    return _forward(q, k, v, mask, saves_for_backward(q, k, v), True)[0]


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
        ValueError: As :func:`cross_attention`, and if the head width is 0.
    """
    _check_qk(q, k)
    if not q.shape[-1]:
        raise InputError("q and k have a head width of 0, which gives no scores to be shown")
    check_masks(k, _scores_shape(q, k), attn_mask, key_padding_mask)
    return cross_attention_maps_ref(q, k, attn_mask=attn_mask, key_padding_mask=key_padding_mask)


def _check_qk(q: Tensor, k: Tensor) -> None:
    """Raise unless queries and keys fit each other."""
    check_floating("q", q)
    check_floating("k", k)
    if q.ndim not in (3, 4):
        raise InputError(f"q must be [Q, H, d] or [B, Q, H, d], got shape {list(q.shape)}")
    if k.ndim != 4:
        raise InputError(f"k must be [B, L, H, d], got shape {list(k.shape)}")
    if q.shape[-2:] != k.shape[-2:]:
        raise InputError(
            f"q and k must have the same heads and head width, got {list(q.shape[-2:])} and "
            f"{list(k.shape[-2:])}"
        )
    if q.ndim == 4 and q.shape[0] != k.shape[0]:
        raise InputError(f"q has batch {q.shape[0]}, but k has batch {k.shape[0]}")
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


def _unpack(k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values, packed or not."""
    if v is not None:
        return k, v
    check_tensor("k", k)
    if k.ndim != 5 or k.shape[2] != 2:
        raise InputError(f"without v, k must be [B, L, 2, H, d], got shape {list(k.shape)}")
    keys, values = k.unbind(2)
    return keys, values


def _cut(mask: Tensor | None, k: Tensor) -> Tensor | None:
    """The mask without its padding."""
    return None if mask is None else mask[..., : k.shape[1]]


@torch.library.custom_op("visproj::cross_attention_fwd", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor | None, mask: Tensor | None, save: bool, triton: bool
) -> tuple[Tensor, Tensor]:
    """The result, and the statistics of its softmax that the kernels' backward needs."""
    keys, values = _unpack(k, v)
    if not triton:
        return formulas.attention_forward(q, keys, values, _cut(mask, keys)), q.new_empty(EMPTY)
    from visproj.kernels.cross_attention import cross_attention_fwd

    out, statistics = cross_attention_fwd(q, keys, values, mask, statistics=save)
    return out, q.new_empty(EMPTY) if statistics is None else statistics


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor | None, mask: Tensor | None, save: bool, triton: bool
) -> tuple[Tensor, Tensor]:
    queries, heads, width = q.shape[-3:]
    out = q.new_empty((k.shape[0], queries, heads, width))
    if not (save and triton):
        return out, q.new_empty(EMPTY)
    parts = 1 if mask is None else 2
    return out, q.new_empty((parts, k.shape[0], heads, queries), dtype=torch.float32)


@torch.library.custom_op("visproj::cross_attention_bwd", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    triton: bool,
) -> list[Tensor]:
    """dq, and dk and dv or both packed."""
    keys, values = _unpack(k, v)
    dkv = torch.empty_like(k, memory_format=torch.contiguous_format)
    dk, dv = _unpack(dkv, None if v is None else torch.empty_like(dkv))
    if triton:
        from visproj.kernels.cross_attention_backward import cross_attention_bwd

        dq = cross_attention_bwd(dout, q, keys, values, mask, out, statistics, dk, dv)
    else:
        dq, *gradients = formulas.attention_backward(dout, q, keys, values, _cut(mask, keys), out)
        dq = dq.contiguous()
        for target, gradient in zip((dk, dv), gradients, strict=True):
            target.copy_(gradient)
    return [dq, dkv] if v is None else [dq, dk, dv]


@_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    triton: bool,
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (q, k, v) if t is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, _, ctx.triton = inputs
    out, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, mask, out, statistics)


def _differentiate(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    dq, dk, *dv = _backward(dout, *ctx.saved_tensors, ctx.triton)
    return dq, dk, dv[0] if dv else None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
forbid_second_derivative(_backward)
