"""Cross-attention backward: probabilities recomputed, every sum in a fixed order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from visproj.kernels import configs
from visproj.kernels.cross_attention import (
    MASKED,
    NO_CONSTANTS,
    describe_head,
    images_of,
    load_tile,
    packed_keys,
    probabilities,
    product_flops,
    shared_arguments,
    softmax_scores,
    table_row,
)
from visproj.kernels.cross_attention_delta import cross_attention_bwd_delta
from visproj.kernels.cross_attention_queries import (
    Given,
    cross_attention_bwd_dq,
    given_example,
    packed_given,
)
from visproj.kernels.device import dot_precision
from visproj.kernels.launch import Config, Launch
from visproj.kernels.layout import unit_columns
from visproj.kernels.makespan import Tiles
from visproj.kernels.plans import key_of, recall
from visproj.kernels.registry import Example, Sizes, register
from visproj.kernels.tuning import choose


@triton.jit(do_not_specialize=NO_CONSTANTS)
def _cross_attention_bwd_dkv_kernel(
    q_ptr,  # [batch, queries, heads, width]; if shared [queries, heads, width], batch stride 0
    k_ptr,  # [batch, keys, heads, width]
    v_ptr,  # [batch, keys, heads, width]
    mask_ptr,  # [batch, heads, queries, keys padded], stride 0 where it broadcasts, or None
    cu_seqlens_ptr,  # [batch + 1], first rows of packed keys [1, all keys, heads, width], or None
    dout_ptr,  # [batch, queries, heads, width]
    lse_ptr,  # [batch, heads, queries], log-sum-exp in base 2; with a mask the largest score
    log_sum_ptr,  # [batch, heads, queries], with a mask log2 of the sum of exponentials, or None
    delta_ptr,  # [batch, heads, queries], sum of out * dout over the head width
    dk_ptr,  # [batch, keys, heads, width], heads and their widths contiguous
    dv_ptr,  # [batch, keys, heads, width] with the strides of dk
    queries,
    keys,  # per image; of packed images the largest number
    heads,
    width,
    scale,
    stride_q_batch,
    stride_q_row,
    stride_q_head,
    stride_k_batch,
    stride_k_row,
    stride_k_head,
    stride_v_batch,
    stride_v_row,
    stride_v_head,
    stride_mask_batch,
    stride_mask_head,
    stride_mask_row,
    stride_dk_batch,
    stride_dk_row,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_L: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One program: dk and dv of one tile of keys, over all queries; probabilities are recomputed.

    Grid: (batch * heads * key tiles).
    """
    key_tiles = tl.cdiv(keys, BLOCK_L)
    image_head = (tl.program_id(0) // key_tiles).to(tl.int64)
    image, head = image_head // heads, image_head % heads
    key = (tl.program_id(0) % key_tiles) * BLOCK_L
    key_rows = key + tl.arange(0, BLOCK_L)

    q_ptr += image * stride_q_batch + head * stride_q_head
    k_ptr += image * stride_k_batch + head * stride_k_head
    v_ptr += image * stride_v_batch + head * stride_v_head
    first_row = image * stride_dk_batch
    last_query = queries
    if cu_seqlens_ptr is not None:
        start, keys = packed_keys(cu_seqlens_ptr, image)
        k_ptr += start * stride_k_row
        v_ptr += start * stride_v_row
        first_row = start * stride_dk_row
        last_query = tl.where(key < keys, queries, 0)  # no work for a tile after the last key
    stride_dout_row = heads * width
    dout_ptr += image * queries * stride_dout_row + head * width
    q_tiles = describe_head(q_ptr, stride_q_row, queries, width, BLOCK_Q, WIDTH, DESCRIPTORS)
    k_tiles = describe_head(k_ptr, stride_k_row, keys, width, BLOCK_L, WIDTH, DESCRIPTORS)
    v_tiles = describe_head(v_ptr, stride_v_row, keys, width, BLOCK_L, WIDTH, DESCRIPTORS)
    dout_tiles = describe_head(
        dout_ptr, stride_dout_row, queries, width, BLOCK_Q, WIDTH, DESCRIPTORS
    )
    lse_ptr += image_head * queries
    delta_ptr += image_head * queries
    MASKED: tl.constexpr = mask_ptr is not None
    if MASKED:
        mask_ptr += image * stride_mask_batch + head * stride_mask_head
        log_sum_ptr += image_head * queries

    k = load_tile(k_ptr, k_tiles, key, stride_k_row, keys, width, BLOCK_L, WIDTH, DESCRIPTORS)
    v = load_tile(v_ptr, v_tiles, key, stride_v_row, keys, width, BLOCK_L, WIDTH, DESCRIPTORS)
    dk = tl.zeros((BLOCK_L, WIDTH), tl.float32)
    dv = tl.zeros((BLOCK_L, WIDTH), tl.float32)
    for first in range(0, last_query, BLOCK_Q):
        rows = first + tl.arange(0, BLOCK_Q)
        q = load_tile(
            q_ptr, q_tiles, first, stride_q_row, queries, width, BLOCK_Q, WIDTH, DESCRIPTORS
        )
        in_rows = rows < queries
        # Rows beyond the last query have an infinite lse, so that their probabilities are 0.
        lse = tl.load(lse_ptr + rows, mask=in_rows, other=float("inf"))
        log_sum = lse
        if MASKED:
            log_sum = tl.load(log_sum_ptr + rows, mask=in_rows, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=in_rows, other=0.0)
        dots = tl.dot(k, q.T, input_precision=PRECISION)  # [BLOCK_L, BLOCK_Q]
        mask_rows = tl.minimum(rows, queries - 1).to(tl.int64) * stride_mask_row
        cells = mask_rows[None, :] + key_rows[:, None]
        scores = softmax_scores(dots, mask_ptr, cells, scale)
        p = probabilities(scores, lse[None, :], log_sum[None, :], MASKED)
        dout = load_tile(
            dout_ptr,
            dout_tiles,
            first,
            stride_dout_row,
            queries,
            width,
            BLOCK_Q,
            WIDTH,
            DESCRIPTORS,
        )
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)  # [BLOCK_L, WIDTH]
        dp = tl.dot(v, dout.T, input_precision=PRECISION)  # [BLOCK_L, BLOCK_Q]
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)  # [BLOCK_L, WIDTH]

    cols = tl.arange(0, WIDTH)
    cells = first_row + key_rows.to(tl.int64)[:, None] * stride_dk_row
    cells = cells + (head * width + cols)[None, :]
    inside = (key_rows < keys)[:, None] & (cols < width)[None, :]
    tl.store(dk_ptr + cells, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + cells, dv.to(dv_ptr.dtype.element_ty), mask=inside)


def cross_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    stats: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
) -> Tensor:
    """Compute the gradients of :func:`visproj.kernels.cross_attention.cross_attention_fwd`.

    Args:
        dout: Gradient of the output, ``[B, Q, H, d]``.
        q: As in the forward.
        k: As in the forward.
        v: As in the forward.
        mask: As in the forward.
        out: Output of the forward, ``[B, Q, H, d]``.
        stats: Softmax statistics of the forward.
        dk: Written with the gradient of ``k``, ``[B, L, H, d]``; the last two dimensions are
            contiguous.
        dv: Written with the gradient of ``v``; the strides are those of ``dk``.
        cu_seqlens: As in the forward; ``dk`` and ``dv`` are then ``[1, all keys, H, d]``.
        longest: With ``cu_seqlens``, the largest number of keys of an image.

    Returns:
        ``dq`` in the shape of ``q``, for shared queries summed over the batch in a fixed order.
    """
    q, k, v = unit_columns(q, k, v)
    dout = dout.contiguous()
    log_sum = None if mask is None else stats[1]
    delta = cross_attention_bwd_delta(out, dout)
    given = Given(q, k, v, mask, dout, stats[0], log_sum, delta, cu_seqlens)
    cross_attention_bwd_dkv(given, dk, dv, longest)
    return cross_attention_bwd_dq(given)


def cross_attention_bwd_dkv(
    given: Given, dk: Tensor, dv: Tensor, longest: int | None = None
) -> None:
    """Write the gradients of keys and values to ``dk`` and ``dv``."""
    precision = dot_precision(given.q.dtype)
    launch = recall(
        key_of("cross_attention_bwd_dkv", (*given, dk, dv), precision, longest),
        lambda: _plan_dkv(given, dk, dv, longest, precision),
    )
    launch(**given.pointers(), dk_ptr=dk, dv_ptr=dv)


def _plan_dkv(
    given: Given, dk: Tensor, dv: Tensor, longest: int | None, precision: str
) -> tuple[Launch, bool]:
    """Choose a configuration; return the launch and whether the choice is final."""
    q, k, v, mask, dout, *_ = given
    packed = given.cu_seqlens is not None
    batch, heads, width = images_of(k, given.cu_seqlens), *k.shape[2:]
    keys = k.shape[1] if longest is None else longest

    def plan(config: Config) -> Launch:
        return Launch(
            _cross_attention_bwd_dkv_kernel,
            batch * heads * triton.cdiv(keys, config.blocks[1]),
            config,
            q.device,
            **{**shared_arguments(q, k, v, mask, config, precision, packed=packed), "keys": keys},
            stride_dk_batch=dk.stride(0),
            stride_dk_row=dk.stride(1),
        )

    def prepare(config: Config) -> Callable[[], object]:
        return partial(plan(config), **given.pointers(), dk_ptr=dk, dv_ptr=dv)

    def tiles(config: Config) -> Tiles:
        block_q, block_l = config.blocks
        work = block_q * block_l * triton.cdiv(q.shape[-3], block_q)
        return Tiles([work] * plan(config).programs)

    row = table_row("cross_attention_bwd_dkv", q, mask, packed)
    choices = configs.candidates(row, (q, k, v, dout), precision)
    queries = triton.next_power_of_2(q.shape[-3])
    key = (batch * keys, queries, heads, width, mask is not None)
    name = "packed_cross_attention_bwd_dkv" if packed else "cross_attention_bwd_dkv"
    config, settled = choose(name, key, choices, prepare, q, tiles)
    return plan(config), settled


def _dkv_example(s: Sizes, masked: bool) -> None:
    dk, dv = s.tensor(s.images, s.length, 2, s.heads, s.width).unbind(2)
    cross_attention_bwd_dkv(given_example(s, masked), dk, dv)


def _packed_example(s: Sizes) -> None:
    dk, dv = s.tensor(1, s.images * s.length, 2, s.heads, s.width).unbind(2)
    cross_attention_bwd_dkv(packed_given(s), dk, dv, s.length)


register(
    _cross_attention_bwd_dkv_kernel,
    flops=product_flops(4),
    examples={
        f"cross_attention_bwd_dkv{name}": Example(
            partial(_dkv_example, masked=masked),
            table=f"cross_attention_bwd_dkv{name}",
            tile="ql",
            products=("lqd", "ldq", "lqd", "ldq"),
            descriptors=4,
        )
        for name, masked in MASKED.items()
    }
    | {
        "packed_cross_attention_bwd_dkv": Example(
            _packed_example,
            table="packed_cross_attention_bwd_dkv",
            tile="ql",
            products=("lqd", "ldq", "lqd", "ldq"),
            descriptors=4,
        )
    },
)
