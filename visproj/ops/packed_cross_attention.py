"""Attention of shared queries over images of different sizes, with packed keys."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
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
from visproj.ops.checks import check_all_floating, check_operands, to_autocast_dtype
from visproj.ops.cross_attention import MAX_HEAD_WIDTH


class Inputs(NamedTuple):
    """Arguments of the custom operator; see :func:`packed_cross_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    cu_seqlens: Tensor  # int32 [B + 1]
    longest: int
    save: bool


class BackwardInputs(NamedTuple):
    """Arguments of the backward operator."""

    dout: Tensor  # gradient of the output
    q: Tensor
    k: Tensor
    v: Tensor | None
    cu_seqlens: Tensor
    out: Tensor
    statistics: Tensor
    longest: int


def packed_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    *,
    lengths: Sequence[int],
    backend: str | None = None,
) -> Tensor:
    """Compute :func:`visproj.ops.cross_attention` of shared queries over packed images.

    PyTorch computes one image after another. The kernels take all images at once, and read where
    the keys of each begin.

    Args:
        q: ``[Q, H, d]``.
        k: ``[T, H, d]``, image after image, or keys and values packed as ``[T, 2, H, d]``.
        v: ``[T, H, d]``, or ``None`` if ``k`` holds keys and values.
        lengths: Number of keys of each image, at least 1; their sum is ``T``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; see :func:`visproj.use_backend`.

    Returns:
        ``[B, Q, H, d]`` in the dtype of ``q`` (the autocast dtype under autocast).

    Raises:
        TypeError: If a tensor is not floating point or, outside autocast, the dtypes differ.
        ValueError: If shapes or lengths do not fit or devices differ.
        RuntimeError: If ``"triton"`` was chosen and cannot run here.

    Source: the layout is FlashAttention's, Dao 2023, "FlashAttention-2".
    """
    keys, values = _check(q, k, v, lengths)
    width = q.shape[-1]
    wide = f"head width {width} is above {MAX_HEAD_WIDTH}" if width > MAX_HEAD_WIDTH else None
    if not runs_triton(q, backend, unsupported=wide) or not q.numel():
        q, keys, values = to_autocast_dtype(q, keys, values)
        images = zip(*(t.split(list(lengths)) for t in (keys, values)), strict=True)
        outs = [eager.cross_attention(q, k[None], v[None], None, None) for k, v in images]
        return torch.cat(outs)
    q, k, v = to_autocast_dtype(q, k, v)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    starts = starts.to(q.device, non_blocking=True)
    save = saves_for_backward(q, k, v)
    return _packed_cross_attention_fwd(q, k, v, starts, max(lengths), save, differentiable=save)[0]


def _check(q: Tensor, k: Tensor, v: Tensor | None, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return keys and values separately, or raise as :func:`packed_cross_attention` says."""
    check_all_floating(q=q, k=k)
    if q.ndim != 3 or k.ndim != (3 if v is not None else 4) or (v is None and k.shape[1] != 2):
        raise InputError(
            "q must be [Q, H, d], k [T, H, d], and without v [T, 2, H, d], got shapes "
            f"{list(q.shape)} and {list(k.shape)}"
        )
    keys, values = (k, v) if v is not None else k.unbind(1)
    if q.shape[1:] != keys.shape[1:]:
        raise InputError(
            f"q and k must have the same heads and head width, got {list(q.shape[1:])} and "
            f"{list(keys.shape[1:])}"
        )
    if not lengths or min(lengths) < 1 or sum(lengths) != len(keys):
        raise InputError(
            f"lengths must be positive and add up to the {len(keys)} keys, got {list(lengths)}"
        )
    check_operands("q", q, {"k": (keys, keys.shape), "v": (values, keys.shape)})
    return keys, values


def _apart(k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return keys and values as a batch of one, ``[1, T, H, d]``."""
    keys, values = (k, v) if v is not None else k.unbind(1)
    return keys[None], values[None]


def _run_fwd(*inputs: Any) -> tuple[Tensor, Tensor | None]:
    from visproj.kernels.cross_attention import cross_attention_fwd

    given = Inputs(*inputs)
    keys_values = _apart(given.k, given.v)
    return cross_attention_fwd(given.q, *keys_values, None, given.cu_seqlens, statistics=given.save)


_packed_cross_attention_fwd = Operation(
    "packed_cross_attention_fwd", Inputs, "(Tensor, Tensor)", _run_fwd
)


@_packed_cross_attention_fwd.custom.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    given = Inputs(*inputs)
    q, batch = given.q, given.cu_seqlens.shape[0] - 1
    out = q.new_empty((batch, *q.shape))
    if not given.save:
        return out, q.new_empty(EMPTY)
    return out, q.new_empty((1, batch, q.shape[1], q.shape[0]), dtype=torch.float32)


def _run_bwd(*inputs: Any) -> list[Tensor]:
    """Return dq, then dk and dv or one tensor with both."""
    from visproj.kernels.cross_attention_backward import cross_attention_bwd

    given = BackwardInputs(*inputs)
    dk = torch.empty_like(given.k, memory_format=torch.contiguous_format)
    dv = None if given.v is None else torch.empty_like(dk)
    dq = cross_attention_bwd(
        given.dout,
        given.q,
        *_apart(given.k, given.v),
        None,
        given.out,
        given.statistics,
        *_apart(dk, dv),
        given.cu_seqlens,
        given.longest,
    )
    return [dq, dk] if dv is None else [dq, dk, dv]


_packed_cross_attention_bwd = Operation(
    "packed_cross_attention_bwd", BackwardInputs, "Tensor[]", _run_bwd
)


@_packed_cross_attention_bwd.custom.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor | None, *_: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (q, k, v) if t is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    given = Inputs(*inputs)
    ctx.longest = given.longest
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(given.q, given.k, given.v, given.cu_seqlens, *output)


def _differentiate(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return in_order(Inputs)
    again = torch.is_grad_enabled()
    found = _packed_cross_attention_bwd(dout, *ctx.saved_tensors, ctx.longest, differentiable=again)
    return in_order(Inputs, q=found[0], k=found[1], v=found[2] if len(found) == 3 else None)


_packed_cross_attention_fwd.register_autograd(_differentiate, _setup_context)
forbid_second_derivative(_packed_cross_attention_bwd)
