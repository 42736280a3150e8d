"""The gradient of attention's queries, probabilities recomputed, images summed in a fixed order."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from visproj.kernels import configs
from visproj.kernels.cross_attention import (
    MASKED,
    NO_CONSTANTS,
    describe_head,
    example_operands,
    example_packed,
    images_of,
    load_rows,
    load_tile,
    packed_keys,
    probabilities,
    product_flops,
    shared_arguments,
    softmax_scores,
    table_row,
)
from visproj.kernels.device import dot_precision, multiprocessors
from visproj.kernels.launch import Config, Launch
from visproj.kernels.makespan import Tiles
from visproj.kernels.plans import key_of, recall
from visproj.kernels.registry import Example, Sizes, register
from visproj.kernels.tuning import choose


@triton.jit
def _rows_by_rows(a, b, PRECISION: tl.constexpr):
    """Return a @ b.T; in fp32 as the transpose of b @ a.T, which avoids many register spills."""
    if a.dtype == tl.float32:
        return tl.trans(tl.dot(b, a.T, input_precision=PRECISION))
    else:
        return tl.dot(a, b.T, input_precision=PRECISION)


@triton.jit(do_not_specialize=NO_CONSTANTS)
def _cross_attention_bwd_dq_kernel(
    q_ptr,  # [batch, queries, heads, width]; if shared [queries, heads, width], batch stride 0
    k_ptr,  # [batch, keys, heads, width]
    v_ptr,  # [batch, keys, heads, width]
    mask_ptr,  # [batch, heads, queries, keys padded], stride 0 where it broadcasts, or None
    cu_seqlens_ptr,  # [batch + 1], first rows of packed keys [1, all keys, heads, width], or None
    dout_ptr,  # [batch, queries, heads, width]
    lse_ptr,  # [batch, heads, queries], log-sum-exp in base 2; with a mask the largest score
    log_sum_ptr,  # [batch, heads, queries], with a mask log2 of the sum of exponentials, or None
    delta_ptr,  # [batch, heads, queries], sum of out * dout over the head width
    dq_ptr,  # [parts, queries, heads, width], one part per run of images
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
    """One program: dq of one tile of queries, summed over a run of consecutive images.

    Grid: (runs * heads * query tiles). If the images do not share queries, each is a run.
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
    # One descriptor for all images, because making one synchronises all threads.
    TOGETHER: tl.constexpr = DESCRIPTORS and cu_seqlens_ptr is None
    if TOGETHER:
        k_tiles = tl.make_tensor_descriptor(
            k_ptr, [batch, keys, width], [stride_k_batch, stride_k_row, 1], [1, BLOCK_L, WIDTH]
        )
        v_tiles = tl.make_tensor_descriptor(
            v_ptr, [batch, keys, width], [stride_v_batch, stride_v_row, 1], [1, BLOCK_L, WIDTH]
        )
    if DESCRIPTORS:
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
        image_keys = keys
        k_head = k_ptr + image * stride_k_batch
        v_head = v_ptr + image * stride_v_batch
        if cu_seqlens_ptr is not None:
            start, image_keys = packed_keys(cu_seqlens_ptr, image)
            k_head += start * stride_k_row
            v_head += start * stride_v_row
            k_tiles = describe_head(
                k_head, stride_k_row, image_keys, width, BLOCK_L, WIDTH, DESCRIPTORS
            )
            v_tiles = describe_head(
                v_head, stride_v_row, image_keys, width, BLOCK_L, WIDTH, DESCRIPTORS
            )
        for key in range(0, image_keys, BLOCK_L):
            cols = key + tl.arange(0, BLOCK_L)
            if TOGETHER:
                k = k_tiles.load([image.to(tl.int32), key, 0]).reshape(BLOCK_L, WIDTH)
            elif DESCRIPTORS:
                k = k_tiles.load([key, 0])
            else:
                k = load_rows(k_head, key, stride_k_row, image_keys, width, BLOCK_L, WIDTH)
            dots = _rows_by_rows(q, k, PRECISION)  # [BLOCK_Q, BLOCK_L]
            cells = (cell + mask_rows)[:, None] + cols[None, :]
            scores = softmax_scores(dots, mask_ptr, cells, scale)
            if TAIL:
                scores = tl.where((cols < image_keys)[None, :], scores, float("-inf"))
            p = probabilities(scores, lse[:, None], log_sum[:, None], MASKED)
            if TOGETHER:
                v = v_tiles.load([image.to(tl.int32), key, 0]).reshape(BLOCK_L, WIDTH)
            elif DESCRIPTORS:
                v = v_tiles.load([key, 0])
            else:
                v = load_rows(v_head, key, stride_v_row, image_keys, width, BLOCK_L, WIDTH)
            dp = _rows_by_rows(dout, v, PRECISION)  # [BLOCK_Q, BLOCK_L]
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)  # [BLOCK_Q, WIDTH]

    cols = tl.arange(0, WIDTH)
    cells = ((part * queries + rows) * heads + head)[:, None] * width + cols[None, :]
    inside = (rows < queries)[:, None] & (cols < width)[None, :]
    tl.store(dq_ptr + cells, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)


class Given(NamedTuple):
    """The tensors that both backward kernels read."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    dout: Tensor
    lse: Tensor
    log_sum: Tensor | None
    delta: Tensor
    cu_seqlens: Tensor | None = None

    def pointers(self) -> dict[str, Tensor | None]:
        """Return the tensors by the names of the kernels' arguments."""
        return {f"{name}_ptr": tensor for name, tensor in self._asdict().items()}


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
    """The launch for the gradient of the queries, with its configuration."""

    launch: Launch
    parts: int  # of the batch, summed afterwards
    dtype: torch.dtype  # of the parts

    def __call__(self, given: Given) -> Tensor:
        """Allocate ``[parts, Q, H, d]``, launch the kernel and return it."""
        dq = given.q.new_empty(self.parts, *given.q.shape[-3:], dtype=self.dtype)
        self.launch(**given.pointers(), dq_ptr=dq)
        return dq


def split_of_the_batch(batch: int, tiles: int, processors: int) -> int:
    """Return the number of parts to split a batch into; each has its own programs for every tile.

    The time of a split is estimated as the rounds of programs on the processors times the images
    per program. Of the splits within 5 % of the shortest time, the one with the fewest parts is
    returned, because every part is written and read once more.
    """
    # No part may be empty: 5 images cannot be split into 4 parts of 2 images each.
    possible = {triton.cdiv(batch, triton.cdiv(batch, parts)) for parts in range(1, batch + 1)}
    times = {
        parts: triton.cdiv(tiles * parts, processors) * triton.cdiv(batch, parts)
        for parts in possible
    }
    return min(parts for parts, time in times.items() if time <= 1.05 * min(times.values()))


def _plan_dq(given: Given, precision: str) -> tuple[_QueryPlan, bool]:
    """Choose a configuration; return the plan and whether the choice is final."""
    q, k, v, mask, dout, *_ = given
    packed = given.cu_seqlens is not None
    batch, heads, width = images_of(k, given.cu_seqlens), *k.shape[2:]
    keys = triton.cdiv(k.shape[0] * k.shape[1], batch)  # per image; the mean of packed images
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
            **shared_arguments(q, k, v, mask, config, precision, packed=packed),
            batch=batch,
            images_per_part=triton.cdiv(batch, parts),
            TAIL=packed or (mask is None and keys % block_l != 0),
        )
        dtype = q.dtype if parts == 1 or not shared else torch.float32
        return _QueryPlan(launch, parts, dtype)

    def tiles(config: Config) -> Tiles:
        block_q, block_l = config.blocks
        launch = plan(config).launch
        images = launch.rest["images_per_part"]
        work = images * block_q * block_l * triton.cdiv(keys, block_l)
        return Tiles([work] * launch.programs)

    row = table_row("cross_attention_bwd_dq", q, mask, packed)
    choices = configs.candidates(row, (q, k, v, dout), precision)
    key = (batch * queries, triton.next_power_of_2(keys), heads, width, mask is not None, shared)
    name = "packed_cross_attention_bwd_dq" if packed else "cross_attention_bwd_dq"
    config, settled = choose(name, key, choices, lambda c: partial(plan(c), given), q, tiles)
    return plan(config), settled


def packed_given(s: Sizes) -> Given:
    """Return what the backward reads of packed keys, for an example."""
    q, k, v, starts = example_packed(s)
    dout = s.tensor(s.images, s.queries, s.heads, s.width)
    lse, delta = (s.statistics(s.images, s.heads, s.queries) for _ in range(2))
    return Given(q, k, v, None, dout, lse, None, delta, starts)


def given_example(s: Sizes, masked: bool) -> Given:
    """Return what the backward reads, for an example."""
    q, k, v, mask = example_operands(s, masked)
    dout = s.tensor(s.images, s.queries, s.heads, s.width)
    lse, log_sum, delta = (s.statistics(s.images, s.heads, s.queries) for _ in range(3))
    return Given(q, k, v, mask, dout, lse, log_sum if masked else None, delta)


def _dq_example(s: Sizes, masked: bool) -> Tensor:
    return cross_attention_bwd_dq(given_example(s, masked))


def _packed_example(s: Sizes) -> Tensor:
    return cross_attention_bwd_dq(packed_given(s))


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
    }
    | {
        "packed_cross_attention_bwd_dq": Example(
            _packed_example,
            table="packed_cross_attention_bwd_dq",
            tile="ql",
            products=("qld", "qld", "qdl"),
            descriptors=4,
        )
    },
)
