"""Cross-attention backward: probabilities recomputed, every sum in a fixed order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from visproj.kernels import configs
from visproj.kernels.cross_attention import (
    LOG2E,
    MASKED,
    NO_CONSTANTS,
    describe_head,
    example_operands,
    load_rows,
    load_tile,
    product_flops,
    shared_arguments,
    softmax_scores,
    table_row,
)
from visproj.kernels.cross_attention_delta import cross_attention_bwd_delta
from visproj.kernels.device import dot_precision, multiprocessors
from visproj.kernels.launch import Config, Launch
from visproj.kernels.layout import unit_columns
from visproj.kernels.makespan import Tiles
from visproj.kernels.plans import key_of, recall
from visproj.kernels.registry import Example, Sizes, register
from visproj.kernels.tuning import choose


@triton.jit
def _rows_by_rows(a, b, PRECISION: tl.constexpr):
    """a @ b.T; in fp32 as the transpose of b @ a.T, which spills by the hundred the other way."""
    if a.dtype == tl.float32:
        return tl.trans(tl.dot(b, a.T, input_precision=PRECISION))
    else:
        return tl.dot(a, b.T, input_precision=PRECISION)


@triton.jit
def _probabilities(scores, lse, log_sum, MASKED: tl.constexpr):
    """Probabilities from scores and the forward's statistics, shaped to broadcast; see there."""
    if MASKED:
        return tl.math.exp2((scores - lse) * LOG2E - log_sum)
    else:
        return tl.math.exp2(scores - lse)


@triton.jit(do_not_specialize=NO_CONSTANTS)
def _cross_attention_bwd_dkv_kernel(
    q_ptr,  # [batch, queries, heads, width], or without the batch: stride 0
    k_ptr,  # [batch, keys, heads, width]
    v_ptr,  # [batch, keys, heads, width]
    mask_ptr,  # [batch, heads, queries, keys padded], any of the first three with stride 0
    dout_ptr,  # [batch, queries, heads, width]
    lse_ptr,  # [batch, heads, queries]: with a mask the largest score only
    log_sum_ptr,  # [batch, heads, queries]: with a mask log2 of the sum of exponentials, or None
    delta_ptr,  # [batch, heads, queries]
    dk_ptr,  # [batch, keys, heads, width], heads and their widths contiguous
    dv_ptr,  # [batch, keys, heads, width] with the strides of dk
    queries,
    keys,
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
    """dk and dv of one tile of keys, over all queries. Grid: (batch * heads * key tiles)."""
    key_tiles = tl.cdiv(keys, BLOCK_L)
    image_head = (tl.program_id(0) // key_tiles).to(tl.int64)
    image, head = image_head // heads, image_head % heads
    key = (tl.program_id(0) % key_tiles) * BLOCK_L
    key_rows = key + tl.arange(0, BLOCK_L)

    q_ptr += image * stride_q_batch + head * stride_q_head
    k_ptr += image * stride_k_batch + head * stride_k_head
    v_ptr += image * stride_v_batch + head * stride_v_head
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
    for first in range(0, queries, BLOCK_Q):
        rows = first + tl.arange(0, BLOCK_Q)
        q = load_tile(
            q_ptr, q_tiles, first, stride_q_row, queries, width, BLOCK_Q, WIDTH, DESCRIPTORS
        )
        in_rows = rows < queries
        # A query beyond the last has no probability: its lse is infinite.
        lse = tl.load(lse_ptr + rows, mask=in_rows, other=float("inf"))
        log_sum = lse
        if MASKED:
            log_sum = tl.load(log_sum_ptr + rows, mask=in_rows, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=in_rows, other=0.0)
        dots = tl.dot(k, q.T, input_precision=PRECISION)
        mask_rows = tl.minimum(rows, queries - 1).to(tl.int64) * stride_mask_row
        cells = mask_rows[None, :] + key_rows[:, None]
        scores = softmax_scores(dots, mask_ptr, cells, scale)
        p = _probabilities(scores, lse[None, :], log_sum[None, :], MASKED)
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
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp = tl.dot(v, dout.T, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    cols = tl.arange(0, WIDTH)
    cells = image * stride_dk_batch + key_rows.to(tl.int64)[:, None] * stride_dk_row
    cells = cells + (head * width + cols)[None, :]
    inside = (key_rows < keys)[:, None] & (cols < width)[None, :]
    tl.store(dk_ptr + cells, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + cells, dv.to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NO_CONSTANTS)
def _cross_attention_bwd_dq_kernel(
    q_ptr,  # [batch, queries, heads, width], or without the batch: stride 0
    k_ptr,  # [batch, keys, heads, width]
    v_ptr,  # [batch, keys, heads, width]
    mask_ptr,  # [batch, heads, queries, keys padded], any of the first three with stride 0
    dout_ptr,  # [batch, queries, heads, width]
    lse_ptr,  # [batch, heads, queries]: with a mask the largest score only
    log_sum_ptr,  # [batch, heads, queries]: with a mask log2 of the sum of exponentials, or None
    delta_ptr,  # [batch, heads, queries]
    dq_ptr,  # [parts, queries, heads, width]
    batch,
    queries,
    keys,
    heads,
    width,
    images_per_part,
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
    PRECISION: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_L: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """dq of one tile of queries, summed over a run of images. Grid: (runs * heads * query tiles).

    Queries of their own for every image are runs of one image.
    """
    query_tiles = tl.cdiv(queries, BLOCK_Q)
    part_head = (tl.program_id(0) // query_tiles).to(tl.int64)
    part, head = part_head // heads, part_head % heads
    first = (tl.program_id(0) % query_tiles) * BLOCK_Q
    rows = first + tl.arange(0, BLOCK_Q)
    in_rows = rows < queries
    mask_rows = tl.minimum(rows, queries - 1).to(tl.int64) * stride_mask_row
    MASKED: tl.constexpr = mask_ptr is not None

    first_image = part * images_per_part
    q_ptr += first_image * stride_q_batch + head * stride_q_head
    q_tiles = describe_head(q_ptr, stride_q_row, queries, width, BLOCK_Q, WIDTH, DESCRIPTORS)
    q = load_tile(q_ptr, q_tiles, first, stride_q_row, queries, width, BLOCK_Q, WIDTH, DESCRIPTORS)
    stride_dout_row = heads * width
    stride_dout_batch = tl.cast(queries, tl.int64) * stride_dout_row
    k_ptr += head * stride_k_head
    v_ptr += head * stride_v_head
    dout_ptr += head * width
    if DESCRIPTORS:  # of all images: each waits for all threads when it is made
        k_tiles = tl.make_tensor_descriptor(
            k_ptr, [batch, keys, width], [stride_k_batch, stride_k_row, 1], [1, BLOCK_L, WIDTH]
        )
        v_tiles = tl.make_tensor_descriptor(
            v_ptr, [batch, keys, width], [stride_v_batch, stride_v_row, 1], [1, BLOCK_L, WIDTH]
        )
        dout_tiles = tl.make_tensor_descriptor(
            dout_ptr,
            [batch, queries, width],
            [stride_dout_batch, stride_dout_row, 1],
            [1, BLOCK_Q, WIDTH],
        )
    dq = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
    for step in range(0, min(images_per_part, batch - first_image)):
        image = first_image + step  # int64, as every offset below must be
        if DESCRIPTORS:
            dout = dout_tiles.load([image.to(tl.int32), first, 0]).reshape(BLOCK_Q, WIDTH)
        else:
            dout_head = dout_ptr + image * stride_dout_batch
            dout = load_rows(dout_head, first, stride_dout_row, queries, width, BLOCK_Q, WIDTH)
        flat = (image * heads + head) * queries + rows
        lse = tl.load(lse_ptr + flat, mask=in_rows, other=float("inf"))
        log_sum = lse
        if MASKED:
            log_sum = tl.load(log_sum_ptr + flat, mask=in_rows, other=0.0)
        delta = tl.load(delta_ptr + flat, mask=in_rows, other=0.0)
        cell = image * stride_mask_batch + head * stride_mask_head
        for key in range(0, keys, BLOCK_L):
            cols = key + tl.arange(0, BLOCK_L)
            if DESCRIPTORS:
                k = k_tiles.load([image.to(tl.int32), key, 0]).reshape(BLOCK_L, WIDTH)
            else:
                k_head = k_ptr + image * stride_k_batch
                k = load_rows(k_head, key, stride_k_row, keys, width, BLOCK_L, WIDTH)
            dots = _rows_by_rows(q, k, PRECISION)
            cells = (cell + mask_rows)[:, None] + cols[None, :]
            scores = softmax_scores(dots, mask_ptr, cells, scale)
            if TAIL:
                scores = tl.where((cols < keys)[None, :], scores, float("-inf"))
            p = _probabilities(scores, lse[:, None], log_sum[:, None], MASKED)
            if DESCRIPTORS:
                v = v_tiles.load([image.to(tl.int32), key, 0]).reshape(BLOCK_L, WIDTH)
            else:
                v_head = v_ptr + image * stride_v_batch
                v = load_rows(v_head, key, stride_v_row, keys, width, BLOCK_L, WIDTH)
            dp = _rows_by_rows(dout, v, PRECISION)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    cols = tl.arange(0, WIDTH)
    cells = ((part * queries + rows) * heads + head)[:, None] * width + cols[None, :]
    inside = (rows < queries)[:, None] & (cols < width)[None, :]
    tl.store(dq_ptr + cells, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)


class Given(NamedTuple):
    """What both halves of the backward read."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    dout: Tensor
    lse: Tensor
    log_sum: Tensor | None
    delta: Tensor

    def pointers(self) -> dict[str, Tensor | None]:
        """By the names of the kernels' arguments."""
        return {f"{name}_ptr": tensor for name, tensor in self._asdict().items()}


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
) -> Tensor:
    """Gradients of :func:`visproj.kernels.cross_attention.cross_attention_fwd`.

    Args:
        dout: ``[B, Q, H, d]``.
        q: As the forward got it; so are ``k``, ``v`` and ``mask``.
        k: See ``q``.
        v: See ``q``.
        mask: See ``q``.
        out: What the forward returned.
        stats: Its statistics.
        dk: ``[B, L, H, d]``, filled; heads and their widths contiguous.
        dv: Filled alike, with the strides of ``dk``.

    Returns:
        ``dq`` in the shape of ``q``, for shared queries summed over the batch in a fixed order.
    """
    q, k, v = unit_columns(q, k, v)
    dout = dout.contiguous()
    log_sum = None if mask is None else stats[1]
    given = Given(q, k, v, mask, dout, stats[0], log_sum, cross_attention_bwd_delta(out, dout))
    cross_attention_bwd_dkv(given, dk, dv)
    return cross_attention_bwd_dq(given)


def cross_attention_bwd_dkv(given: Given, dk: Tensor, dv: Tensor) -> None:
    """Fill ``dk`` and ``dv``."""
    precision = dot_precision(given.q.dtype)
    launch = recall(
        key_of("cross_attention_bwd_dkv", (*given, dk, dv), precision),
        lambda: _plan_dkv(given, dk, dv, precision),
    )
    launch(**given.pointers(), dk_ptr=dk, dv_ptr=dv)


def _plan_dkv(given: Given, dk: Tensor, dv: Tensor, precision: str) -> tuple[Launch, bool]:
    """Choose a configuration; returns whether it is settled as well."""
    q, k, v, mask, dout, *_ = given
    batch, keys, heads, width = k.shape

    def plan(config: Config) -> Launch:
        return Launch(
            _cross_attention_bwd_dkv_kernel,
            batch * heads * triton.cdiv(keys, config.blocks[1]),
            config,
            q.device,
            **shared_arguments(q, k, v, mask, config, precision),
            stride_dk_batch=dk.stride(0),
            stride_dk_row=dk.stride(1),
        )

    def prepare(config: Config) -> Callable[[], object]:
        return partial(plan(config), **given.pointers(), dk_ptr=dk, dv_ptr=dv)

    def tiles(config: Config) -> Tiles:
        block_q, block_l = config.blocks
        work = block_q * block_l * triton.cdiv(q.shape[-3], block_q)
        return Tiles([work] * plan(config).programs)

    row = table_row("cross_attention_bwd_dkv", q, mask)
    choices = configs.candidates(row, (q, k, v, dout), precision)
    queries = triton.next_power_of_2(q.shape[-3])
    key = (batch * keys, queries, heads, width, mask is not None)
    config, settled = choose("cross_attention_bwd_dkv", key, choices, prepare, q, tiles)
    return plan(config), settled


def cross_attention_bwd_dq(given: Given) -> Tensor:
    """Return ``dq`` in the shape of ``q``."""
    q = given.q
    precision = dot_precision(q.dtype)
    plan = recall(
        key_of("cross_attention_bwd_dq", given, precision), lambda: _plan_dq(given, precision)
    )
    dq = plan(given)
    if q.ndim == 4:
        return dq
    return dq[0] if dq.shape[0] == 1 else dq.sum(0).to(q.dtype)


class _QueryPlan(NamedTuple):
    """The gradient of the queries, whose configuration is settled."""

    launch: Launch
    parts: int  # of the batch, summed afterwards
    dtype: torch.dtype  # of the parts

    def __call__(self, given: Given) -> Tensor:
        """Allocate and launch: ``[parts, Q, H, d]``."""
        dq = given.q.new_empty(self.parts, *given.q.shape[-3:], dtype=self.dtype)
        self.launch(**given.pointers(), dq_ptr=dq)
        return dq


def split_of_the_batch(batch: int, tiles: int, processors: int) -> int:
    """Return into how many parts to split a batch, each with programs of its own for every tile.

    Time is counted in images: rounds of programs on the processors, times the images that each
    program goes through. The fewest parts within 5 % of the shortest are taken, because every part
    is written and read once more.
    """
    # No part may be empty: with 5 images there are no 4 parts, of 2 images each.
    possible = {triton.cdiv(batch, triton.cdiv(batch, parts)) for parts in range(1, batch + 1)}
    times = {
        parts: triton.cdiv(tiles * parts, processors) * triton.cdiv(batch, parts)
        for parts in possible
    }
    return min(parts for parts, time in times.items() if time <= 1.05 * min(times.values()))


def _plan_dq(given: Given, precision: str) -> tuple[_QueryPlan, bool]:
    """Choose a configuration; returns whether it is settled as well."""
    q, k, v, mask, dout, *_ = given
    batch, keys, heads, width = k.shape
    queries = q.shape[-3]
    shared = q.ndim == 3

    def plan(config: Config) -> _QueryPlan:
        block_q, block_l = config.blocks
        tiles = heads * triton.cdiv(queries, block_q)
        parts = split_of_the_batch(batch, tiles, multiprocessors(q.device)) if shared else batch
        launch = Launch(
            _cross_attention_bwd_dq_kernel,
            parts * tiles,
            config,
            q.device,
            **shared_arguments(q, k, v, mask, config, precision),
            batch=batch,
            images_per_part=triton.cdiv(batch, parts),
            TAIL=mask is None and keys % block_l != 0,
        )
        dtype = q.dtype if parts == 1 or not shared else torch.float32
        return _QueryPlan(launch, parts, dtype)

    def tiles(config: Config) -> Tiles:
        block_q, block_l = config.blocks
        launch = plan(config).launch
        images = launch.rest["images_per_part"]
        work = images * block_q * block_l * triton.cdiv(keys, block_l)
        return Tiles([work] * launch.programs)

    row = table_row("cross_attention_bwd_dq", q, mask)
    choices = configs.candidates(row, (q, k, v, dout), precision)
    key = (batch * queries, triton.next_power_of_2(keys), heads, width, mask is not None, shared)
    config, settled = choose(
        "cross_attention_bwd_dq", key, choices, lambda c: partial(plan(c), given), q, tiles
    )
    return plan(config), settled


def _given_example(s: Sizes, masked: bool) -> Given:
    q, k, v, mask = example_operands(s, masked)
    dout = s.tensor(s.images, s.queries, s.heads, s.width)
    lse, log_sum, delta = (s.statistics(s.images, s.heads, s.queries) for _ in range(3))
    return Given(q, k, v, mask, dout, lse, log_sum if masked else None, delta)


def _dkv_example(s: Sizes, masked: bool) -> None:
    dk, dv = s.tensor(s.images, s.length, 2, s.heads, s.width).unbind(2)
    cross_attention_bwd_dkv(_given_example(s, masked), dk, dv)


def _dq_example(s: Sizes, masked: bool) -> Tensor:
    return cross_attention_bwd_dq(_given_example(s, masked))


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
    },
)
register(
    _cross_attention_bwd_dq_kernel,
    flops=product_flops(3),
    examples={
        f"cross_attention_bwd_dq{name}": Example(
            partial(_dq_example, masked=masked),
            table=f"cross_attention_bwd_dq{name}",
            tile="ql",
            products=("qld", "qld", "qdl"),
            descriptors=4,
        )
        for name, masked in MASKED.items()
    },
)
