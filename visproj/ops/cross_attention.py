"""Attention of a set of queries, shared by the batch or not, over the keys of each image."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visproj.backend import runs_triton
from visproj.errors import InputError
from visproj.ops import eager
from visproj.ops.autograd import (
    EMPTY,
    Operation,
    forbid_second_derivative,
    in_order,
    saves_for_backward,
)
from visproj.ops.checks import (
    check_all_floating,
    check_operands,
    check_tensor,
    to_autocast_dtype,
)
from visproj.ops.masks import additive_mask, cast_mask, check_masks

__all__ = [
    "cast_mask",
    "check_masks",
    "cross_attention",
    "cross_attention_maps",
]

MAX_HEAD_WIDTH = 256
# Masks are padded with -inf to a multiple of this, which every key tile divides: so a kernel with a
# mask needs no bounds check of the keys.
_MASK_MULTIPLE = 128


class Inputs(NamedTuple):
    """Arguments of the custom operator; see :func:`cross_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    mask: Tensor | None  # [B or 1, H or 1, Q or 1, padded L], added to the scores
    save: bool


class BackwardInputs(NamedTuple):
    """Arguments of the backward operator."""

    dout: Tensor  # gradient of the output
    q: Tensor
    k: Tensor
    v: Tensor | None
    mask: Tensor | None
    out: Tensor
    statistics: Tensor


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute scaled dot-product attention, with masks as ``nn.MultiheadAttention`` takes them.

    ``out[b, :, h] = softmax(q[b, :, h] k[b, :, h]ᵀ / sqrt(d) + mask) v[b, :, h]``. A query whose
    keys are all masked attends to nothing: its output is zero.

    Args:
        q: ``[Q, H, d]`` shared by the batch, or ``[B, Q, H, d]``.
        k: ``[B, L, H, d]``, or keys and values as one tensor ``[B, L, 2, H, d]``, whose gradient is
            then one tensor too.
        v: ``[B, L, H, d]``, or ``None`` if ``k`` holds keys and values.
        attn_mask: ``[Q, L]`` or ``[B * H, Q, L]`` with index ``b * H + h``; bool, True = masked
            out, or floating, added to the scores. With a mask that requires a gradient, PyTorch
            runs instead of the kernels.
        key_padding_mask: bool ``[B, L]``, True = padding.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; see :func:`visproj.use_backend`.

    Returns:
        ``[B, Q, H, d]`` in the dtype of ``q`` (the autocast dtype under autocast).

    Raises:
        TypeError: If a tensor is not floating point, a mask is neither bool nor floating, or,
            outside autocast, the dtypes differ.
        ValueError: If shapes do not fit or devices differ.
        RuntimeError: If ``"triton"`` was chosen and cannot run here.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1.
    """
    keys, values = (k, v) if v is not None else _unpack(k)
    shape = _check(q, keys, values)
    masked = attn_mask is not None or key_padding_mask is not None
    if masked:
        check_masks(keys, shape, attn_mask, key_padding_mask)
    batch, heads, _, length = shape
    width = q.shape[-1]
    unsupported = None
    if width > MAX_HEAD_WIDTH:
        unsupported = f"head width {width} is above {MAX_HEAD_WIDTH}"
    elif attn_mask is not None and saves_for_backward(attn_mask):
        unsupported = "attn_mask requires a gradient"
    triton = runs_triton(q, backend, unsupported=unsupported)
    if not triton or not math.prod(shape) * width:
        q, keys, values = to_autocast_dtype(q, keys, values)
        return eager.cross_attention(q, keys, values, attn_mask, key_padding_mask)
    q, k, v = to_autocast_dtype(q, k, v)
    mask = additive_mask(attn_mask, key_padding_mask, batch, heads, q.dtype) if masked else None
    if mask is not None:
        mask = F.pad(mask, (0, -length % _MASK_MULTIPLE), value=float("-inf")).contiguous()
    save = saves_for_backward(q, k, v)
    return _cross_attention_fwd(q, k, v, mask, save, differentiable=save)[0]


def cross_attention_maps(
    q: Tensor,
    k: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Return the attention probabilities of :func:`cross_attention`, for inspection.

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
    shape = _check(q, k, None)
    if not q.shape[-1]:
        raise InputError("q and k have a head width of 0, for which scores are not defined")
    check_masks(k, shape, attn_mask, key_padding_mask)
    return eager.cross_attention_maps(q, k, attn_mask, key_padding_mask)


def _check(q: Tensor, k: Tensor, v: Tensor | None) -> tuple[int, int, int, int]:
    """Raise unless queries, keys and values fit each other, and return (B, H, Q, L)."""
    check_all_floating(q=q, k=k)
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
    check_operands("q", q, {"k": (k, k.shape), "v": (v, k.shape)})
    return k.shape[0], k.shape[2], q.shape[-3], k.shape[1]


def _unpack(kv: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys and the values of ``[B, L, 2, H, d]``."""
    check_tensor("k", kv)
    if kv.ndim != 5 or kv.shape[2] != 2:
        raise InputError(f"without v, k must be [B, L, 2, H, d], got shape {list(kv.shape)}")
    keys, values = kv.unbind(2)
    return keys, values


def _run_fwd(*inputs: Any) -> tuple[Tensor, Tensor | None]:
    """Return the result, and with ``save`` the softmax statistics that the backward needs."""
    from visproj.kernels.cross_attention import cross_attention_fwd

    q, k, v, mask, save = Inputs(*inputs)
    keys, values = (k, v) if v is not None else k.unbind(2)
    return cross_attention_fwd(q, keys, values, mask, statistics=save)


_cross_attention_fwd = Operation("cross_attention_fwd", Inputs, "(Tensor, Tensor)", _run_fwd)


@_cross_attention_fwd.custom.register_fake
def _(q: Tensor, k: Tensor, v: Tensor | None, mask: Tensor | None, save: bool) -> tuple[Any, ...]:
    queries, heads, width = q.shape[-3:]
    out = q.new_empty((k.shape[0], queries, heads, width))
    if not save:
        return out, q.new_empty(EMPTY)
    parts = 1 if mask is None else 2
    return out, q.new_empty((parts, k.shape[0], heads, queries), dtype=torch.float32)


def _run_bwd(*inputs: Any) -> list[Tensor]:
    """Return dq, then dk and dv or one tensor with both."""
    from visproj.kernels.cross_attention_backward import cross_attention_bwd

    dout, q, k, v, mask, out, statistics = BackwardInputs(*inputs)
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    if v is not None:
        dv = torch.empty_like(dk)
        dq = cross_attention_bwd(dout, q, k, v, mask, out, statistics, dk, dv)
        return [dq, dk, dv]
    return [
        cross_attention_bwd(dout, q, *k.unbind(2), mask, out, statistics, *dk.unbind(2)),
        dk,
    ]


_cross_attention_bwd = Operation("cross_attention_bwd", BackwardInputs, "Tensor[]", _run_bwd)


@_cross_attention_bwd.custom.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor | None, *_: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (q, k, v) if t is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, _ = inputs
    out, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, mask, out, statistics)


def _differentiate(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return in_order(Inputs)
    again = torch.is_grad_enabled()
    dq, dk, *dv = _cross_attention_bwd(dout, *ctx.saved_tensors, differentiable=again)
    return in_order(Inputs, q=dq, k=dk, v=dv[0] if dv else None)


_cross_attention_fwd.register_autograd(_differentiate, _setup_context)
forbid_second_derivative(_cross_attention_bwd)
