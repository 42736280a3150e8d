"""The operations in plain PyTorch, as a CPU runs them. Arguments are those of the operations."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from visproj.ops.autograd import has_autocast
from visproj.ops.masks import merge_masks


def linear_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    shift: Tensor | None,
    eps: float,
) -> Tensor:
    """Compute ``LayerNorm(x Wᵀ + b)``."""
    # Features without their CLS row are copied: else PyTorch copies a frozen weight per image.
    return F.layer_norm(F.linear(x.contiguous(), weight, bias), gain.shape, gain, shift, eps)


def linear_norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    shift: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    positions: Tensor | None,
    queries: Tensor | None,
    places: Tensor | None,
    positioned: int,
    queried: int,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``LayerNorm(x Wᵀ + b) Vᵀ + d``, and the projection of the queries."""
    first, (out_weight, out_bias) = queried_and_others(out_weight, out_bias, queried)
    projected = None if queries is None else F.linear(queries, *first)
    normal = F.layer_norm(F.linear(x.contiguous(), weight, bias), gain.shape, gain, shift, eps)
    if positions is None:
        return F.linear(normal, out_weight, out_bias), projected
    split = (positioned, out_weight.shape[0] - positioned)
    weights = out_weight.split(split)
    biases = (None, None) if out_bias is None else out_bias.split(split)
    rows = (normal + placed(positions, places), normal)
    outs = [F.linear(*parts) for parts in zip(rows, weights, biases, strict=True)]
    return torch.cat(outs, -1), projected


def placed(rows: Tensor, places: Tensor | None) -> Tensor:
    """Return for each column of ``places [K, L]`` the sum of the ``rows`` that it names."""
    if places is None:
        return rows
    first, *others = (rows[index] for index in places)
    for other in others:
        first += other
    return first


def queried_and_others(
    weight: Tensor, bias: Tensor | None, queried: int
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """Split weight and bias into those of the queries' outputs and those of the others."""
    first, others = weight.tensor_split([queried])
    first_bias, other_bias = (None, None) if bias is None else bias.tensor_split([queried])
    return (first, first_bias), (others, other_bias)


def folded_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stats_weight: Tensor,
    stats_bias: Tensor,
    shift: Tensor | None,
    table: Tensor | None,
    eps: float,
) -> Tensor:
    """Compute ``rstd (x Wᵀ + bias) + shift + table``."""
    # Features without their CLS row are copied: else PyTorch copies the weights per image.
    x = x.contiguous()
    return scale_rows(F.linear(x, weight, bias), x, stats_weight, stats_bias, shift, table, eps)


def scale_rows(
    out: Tensor,
    x: Tensor,
    factor: Tensor,
    factor_bias: Tensor,
    shift: Tensor | None,
    table: Tensor | None,
    eps: float,
) -> Tensor:
    """Compute ``rstd out + shift + table`` in place.

    ``rstd = (‖x factorᵀ + factor_bias‖² + eps)^(-1/2)`` is up to ``eps^(-1/2)`` = 1e6, more than
    fp16 can hold: it stays in fp32.
    """
    rstd = row_scale(x, factor, factor_bias, eps)
    shift = out.new_zeros(out.shape[-1]) if shift is None else shift.to(out.dtype)
    if table is None:
        return _scale(out, rstd, shift)
    columns = table.shape[-1]
    if _is_traced():  # a trace cannot write to a part of a tensor
        return _scale(out, rstd, F.pad(table, (0, out.shape[-1] - columns)).to(out.dtype) + shift)
    first, rest = out.tensor_split([columns], -1)  # avoids a padded copy of the table
    _scale(first, rstd, table.to(out.dtype) + shift[:columns])
    if columns < out.shape[-1]:
        _scale(rest, rstd, shift[columns:])
    return out


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def row_scale(x: Tensor, factor: Tensor, factor_bias: Tensor, eps: float) -> Tensor:
    """Compute ``rstd [..., 1]`` of :func:`scale_rows`, at least in fp32."""
    return (_row_squares(x, factor, factor_bias) + eps).rsqrt()


def _scale(out: Tensor, rstd: Tensor, added: Tensor) -> Tensor:
    """Compute ``rstd out + added`` in place, in the dtype of ``rstd``."""
    if out.dtype == rstd.dtype or out.device.type != "cpu" or _is_traced() or not out.numel():
        return torch.addcmul(added, out, rstd, out=out)
    # On a CPU addcmul copies to the wider dtype: a few rows at a time, the copy stays in the cache.
    length = out.shape[-2]
    step = max(1, _WIDENED * length // out.numel())
    for first in range(0, length, step):
        part = slice(first, first + step)
        rows, shift = out[..., part, :], added if added.ndim == 1 else added[part]
        torch.addcmul(shift, rows, rstd[..., part, :], out=rows)
    return out


_WIDENED = 2**19  # elements, 2 MiB of fp32


def _row_squares(x: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
    """Compute ``‖x factorᵀ + bias‖² [..., 1]`` for a triangular ``factor``, at least in fp32.

    The upper triangular ``factor`` is split into blocks of rows. The matmul with a block starts at
    its first nonzero column: with eight blocks 7/16 of the multiply-adds are skipped.
    """
    rows = x.flatten(0, -2)
    count = len(factor)
    step = max(_LEAST_ROWS, math.ceil(count / 8))
    norms = []
    for first in range(0, max(1, count), step):
        part = slice(first, first + step)
        product = F.linear(rows[:, first:], factor[part, first:], bias[part])
        wide = torch.promote_types(product.dtype, torch.float32)
        norms.append(torch.linalg.vector_norm(product, dim=-1, dtype=wide))
    return torch.stack(norms).square().sum(0).view(*x.shape[:-1], 1)


_LEAST_ROWS = 256  # of a block: fewer rows use a CPU badly


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Tensor:
    """Compute SDPA with merged masks; shared queries are not copied."""
    batch, _, heads, _ = k.shape
    mask = dead = None
    if attn_mask is not None or key_padding_mask is not None:
        mask, dead = merge_masks(attn_mask, key_padding_mask, batch, heads, q.dtype)
    on_gpu = k.is_cuda and not torch.compiler.is_compiling()
    if on_gpu:
        q, k, v = map(_in_sixteens, (q, k, v))
    queries, keys, values = (t.transpose(-3, -2).expand(batch, -1, -1, -1) for t in (q, k, v))
    if heads == 0:  # SDPA's backward on a GPU fails for it
        return (queries @ keys.transpose(-1, -2) @ values).transpose(1, 2)
    if on_gpu and mask is not None and mask.requires_grad and not queries.requires_grad:
        queries = queries.detach().requires_grad_()  # else SDPA keeps no statistics for backward
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    if on_gpu and out.requires_grad:
        out.register_hook(_in_sixteens)
    if dead is not None:
        out = out.masked_fill(dead, 0.0)
    return out.transpose(1, 2)


def _in_sixteens(tensor: Tensor) -> Tensor:
    """Return the tensor, copied unless all its rows are aligned to 16 bytes.

    FlashAttention on a GPU reads 16 bytes at a time, and SDPA does not check the alignment.
    """
    steps = tensor.storage_offset(), *tensor.stride()[:-1]
    aligned = all(step * tensor.element_size() % 16 == 0 for step in steps)
    return tensor if aligned else tensor.clone(memory_format=torch.contiguous_format)


def cross_attention_maps(
    q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
) -> Tensor:
    """Return the probabilities ``[B, H, Q, L]`` in fp32, or fp64 for fp64 inputs."""
    batch, _, heads, width = k.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries, keys = (t.transpose(-3, -2).to(dtype) for t in (q, k))
    kind = q.device.type
    with torch.autocast(kind, enabled=False) if has_autocast(kind) else nullcontext():
        scores = queries.expand(batch, -1, -1, -1) @ keys.transpose(-1, -2) / math.sqrt(width)
    if attn_mask is None and key_padding_mask is None:
        return scores.softmax(-1)
    mask, dead = merge_masks(attn_mask, key_padding_mask, batch, heads, dtype)
    closed = mask.dtype == torch.bool
    scores = scores.masked_fill(~mask, float("-inf")) if closed else scores + mask
    return scores.softmax(-1).masked_fill(dead, 0.0)
