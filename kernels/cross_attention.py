"""Cross-attention forward: running softmax over tiles of keys, probabilities never stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from visproj.kernels import configs
from visproj.kernels.device import dot_precision
from visproj.kernels.launch import Config, Launch
from visproj.kernels.layout import unit_columns
from visproj.kernels.makespan import Tiles
from visproj.kernels.plans import key_of, recall
from visproj.kernels.registry import Example, Sizes, register
from visproj.kernels.tuning import LIBRARY, Library, choose

# Start of the running maximum, below every score with a finite mask. Not -inf, because -inf - -inf
# is NaN.
_LOWEST = tl.constexpr(-3.4028234663852886e38)
LOG2E = tl.constexpr(1.4426950408889634)

# Triton specialises an integer argument of 1 as a constant. Then a loop over one key is not a loop,
# and the compiler fails to pipeline its descriptor loads (triton 3.7.1, sm_90).
NO_CONSTANTS = ["keys"]


@triton.jit
def load_tile(
    ptr,  # one head of one image, [length, width]
    tiles,  # its descriptor, from describe_head
    row,
    stride_row,
    length,
    width,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Load rows ``row .. row + ROWS`` of one head, [ROWS, WIDTH]; zero beyond length and width."""
    if DESCRIPTORS:
        tile = tiles.load([row, 0])
    else:
        tile = load_rows(ptr, row, stride_row, length, width, ROWS, WIDTH)
    return tile


@triton.jit
def load_rows(ptr, row, stride_row, length, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Load the same tile through pointers, [ROWS, WIDTH]."""
    rows = row + tl.arange(0, ROWS)
    cols = tl.arange(0, WIDTH)
    return tl.load(
        ptr + rows.to(tl.int64)[:, None] * stride_row + cols[None, :],
        mask=(rows < length)[:, None] & (cols < width)[None, :],
        other=0.0,
    )


@triton.jit
def describe_head(
    ptr,
    stride_row,
    length,
    width,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Return a descriptor of one head of one image, so that no tile reads the next; or ``ptr``."""
    if DESCRIPTORS:
        return tl.make_tensor_descriptor(ptr, [length, width], [stride_row, 1], [ROWS, WIDTH])
    else:
        return ptr


@triton.jit
def softmax_scores(dots, mask_ptr, cells, scale):
    """Scale q kᵀ to scores; without a mask also by log2 e, for exponentials in base 2.

    A mask is added to the scores before log2 e is applied, as in SDPA, so that large finite masks
    absorb scores in the same way. Its padding of -inf masks the keys after the last one.
    """
    if mask_ptr is None:
        return dots * (scale * LOG2E)
    else:
        return dots * scale + tl.load(mask_ptr + cells).to(tl.float32)


@triton.jit
def power(x, MASKED: tl.constexpr):
    """Compute the exponential of a difference of scores from :func:`softmax_scores`."""
    if MASKED:
        x = x * LOG2E
    return tl.math.exp2(x)


@triton.jit
def probabilities(scores, lse, log_sum, MASKED: tl.constexpr):
    """Compute probabilities from scores and the forward's softmax statistics, which broadcast."""
    if MASKED:
        return tl.math.exp2((scores - lse) * LOG2E - log_sum)
    else:
        return tl.math.exp2(scores - lse)


@triton.jit
def packed_keys(cu_seqlens_ptr, image):
    """Return the first row of an image among packed keys, and its number of keys."""
    start = tl.load(cu_seqlens_ptr + image)
    return start.to(tl.int64), tl.load(cu_seqlens_ptr + image + 1) - start


@triton.jit(do_not_specialize=NO_CONSTANTS)
def _cross_attention_fwd_kernel(
    q_ptr,  # [batch, queries, heads, width]; if shared [queries, heads, width], batch stride 0
    k_ptr,  # [batch, keys, heads, width]
    v_ptr,  # [batch, keys, heads, width]
    mask_ptr,  # [batch, heads, queries, keys padded], stride 0 where it broadcasts, or None
    cu_seqlens_ptr,  # [batch + 1], first rows of packed keys [1, all keys, heads, width], or None
    out_ptr,  # [batch, queries, heads, width]
    lse_ptr,  # [batch, heads, queries], log-sum-exp in base 2; with a mask the largest score
    log_sum_ptr,  # [batch, heads, queries], with a mask log2 of the sum of exponentials, or None
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
    PRECISION: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_L: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One program: softmax(q kᵀ scale + mask) v for one tile of queries, over all keys.

    Grid: (batch * heads * query tiles).
    """
    query_tiles = tl.cdiv(queries, BLOCK_Q)
    image_head = (tl.program_id(0) // query_tiles).to(tl.int64)
    image, head = image_head // heads, image_head % heads
    first = (tl.program_id(0) % query_tiles) * BLOCK_Q
    rows = first + tl.arange(0, BLOCK_Q)

    q_ptr += image * stride_q_batch + head * stride_q_head
    k_ptr += image * stride_k_batch + head * stride_k_head
    v_ptr += image * stride_v_batch + head * stride_v_head
    if cu_seqlens_ptr is not None:
        start, keys = packed_keys(cu_seqlens_ptr, image)
        k_ptr += start * stride_k_row
        v_ptr += start * stride_v_row
    q_tiles = describe_head(q_ptr, stride_q_row, queries, width, BLOCK_Q, WIDTH, DESCRIPTORS)
    k_tiles = describe_head(k_ptr, stride_k_row, keys, width, BLOCK_L, WIDTH, DESCRIPTORS)
    v_tiles = describe_head(v_ptr, stride_v_row, keys, width, BLOCK_L, WIDTH, DESCRIPTORS)
    if mask_ptr is not None:
        mask_ptr += image * stride_mask_batch + head * stride_mask_head
    mask_rows = tl.minimum(rows, queries - 1).to(tl.int64) * stride_mask_row

    q = load_tile(q_ptr, q_tiles, first, stride_q_row, queries, width, BLOCK_Q, WIDTH, DESCRIPTORS)
    maximum = tl.full((BLOCK_Q,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
    MASKED: tl.constexpr = mask_ptr is not None
    for key in range(0, keys, BLOCK_L):
        k = load_tile(k_ptr, k_tiles, key, stride_k_row, keys, width, BLOCK_L, WIDTH, DESCRIPTORS)
        dots = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_Q, BLOCK_L]
        cols = key + tl.arange(0, BLOCK_L)
        scores = softmax_scores(dots, mask_ptr, mask_rows[:, None] + cols[None, :], scale)
        if TAIL:
            scores = tl.where((cols < keys)[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        p = power(scores - new_maximum[:, None], MASKED)  # [BLOCK_Q, BLOCK_L]
        rescale = power(maximum - new_maximum, MASKED)  # [BLOCK_Q]
        total = total * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        v = load_tile(v_ptr, v_tiles, key, stride_v_row, keys, width, BLOCK_L, WIDTH, DESCRIPTORS)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        maximum = new_maximum

    # A fully masked query has the sum 0: its output and its probabilities in the backward are 0.
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out = acc / total[:, None]
    out_rows = (image * queries + rows) * heads + head
    cols = tl.arange(0, WIDTH)
    in_rows = rows < queries
    tl.store(
        out_ptr + out_rows[:, None] * width + cols[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=in_rows[:, None] & (cols < width)[None, :],
    )
    if lse_ptr is not None:
        flat = image_head * queries + rows
        log_sum = tl.math.log2(total)
        if MASKED:
            tl.store(log_sum_ptr + flat, log_sum, mask=in_rows)
            # Infinity gives the probability 0 in the backward. No unmasked query has it as maximum.
            lse = tl.where(empty, float("inf"), maximum)
        else:
            lse = maximum + log_sum
        tl.store(lse_ptr + flat, lse, mask=in_rows)


def cross_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
    *,
    statistics: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention, and the softmax statistics that the backward needs.

    Args:
        q: ``[Q, H, d]`` shared by the batch, or ``[B, Q, H, d]``; ``d`` at most 256.
        k: ``[B, L, H, d]``.
        v: ``[B, L, H, d]``.
        mask: Additive, ``[B or 1, H or 1, Q or 1, padded L]`` with a contiguous last dimension,
            padded by -inf to a multiple of 128, which every tile of keys divides.
        cu_seqlens: int32 ``[B + 1]``: the first key of each image, then the number of all keys.
            ``k`` and ``v`` are then ``[1, all keys, H, d]``, ``q`` is shared and ``mask`` is None.
        statistics: Whether to return the softmax statistics.

    Returns:
        ``[B, Q, H, d]`` in the dtype of ``q``, and the statistics in fp32 or ``None``. Without a
        mask they are ``[1, B, H, Q]``, the log-sum-exp of the scores in base 2. With a mask they
        are ``[2, B, H, Q]``: the largest score, and log2 of the sum of exponentials. The sum of
        these two would lose the second if a mask makes the largest score ``finfo.min``.
    """
    q, k, v = unit_columns(q, k, v)
    precision = dot_precision(q.dtype)
    plan = recall(
        key_of("cross_attention_fwd", (q, k, v, mask, cu_seqlens), statistics, precision),
        lambda: _plan(q, k, v, mask, cu_seqlens, statistics, precision),
    )
    return plan(q, k, v, mask, cu_seqlens, statistics)


_Result = tuple[Tensor, Tensor | None]


def _start(
    launch: Launch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    statistics: bool,
) -> _Result:
    """Allocate the results and launch the kernel."""
    batch, (queries, heads, width) = images_of(k, cu_seqlens), q.shape[-3:]
    out = q.new_empty(batch, queries, heads, width)
    stats = lse = log_sum = None
    if statistics:
        parts = 1 if mask is None else 2
        stats = q.new_empty(parts, batch, heads, queries, dtype=torch.float32)
        lse, *others = stats.unbind()
        log_sum = others[0] if others else None
    launch(
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        mask_ptr=mask,
        cu_seqlens_ptr=cu_seqlens,
        out_ptr=out,
        lse_ptr=lse,
        log_sum_ptr=log_sum,
    )
    return out, stats


def images_of(k: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return the number of images that the keys belong to."""
    return k.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1


def _in_pytorch(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, _: None, statistics: bool
) -> _Result:
    """Compute the same in PyTorch; statistics come from FlashAttention and exclude a mask."""
    q, k, v = (t.transpose(-3, -2).expand(len(k), -1, -1, -1) for t in (q, k, v))
    if statistics:
        # On a CPU, where tests run this, the operator has another name.
        aten = torch.ops.aten
        gpu = aten._scaled_dot_product_flash_attention
        flash = gpu if q.is_cuda else aten._scaled_dot_product_flash_attention_for_cpu
        out, lse, *_ = flash(q, k, v)
        if lse.shape != q.shape[:3]:
            raise RuntimeError(f"FlashAttention's log-sum-exp has the shape {list(lse.shape)}")
        return out.transpose(1, 2).contiguous(), (lse.contiguous() * math.log2(math.e))[None]
    if mask is not None:
        mask = mask[..., : k.shape[2]]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if mask is not None:  # zeros for fully masked queries, as from the kernel
        out = out.masked_fill(mask.isneginf().all(-1, keepdim=True), 0.0)
    return out.transpose(1, 2).contiguous(), None


def _library_has(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, statistics: bool) -> bool:
    """Return whether PyTorch can compute this attention and its statistics.

    FlashAttention reads 16 bytes at a time and does not check whether they are aligned.
    """
    flash = mask is None and q.element_size() == 2 and q.shape[-1] % 8 == 0
    return (flash or not statistics) and configs.describable(q, k, v)


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    statistics: bool,
    precision: str,
) -> tuple[Callable[..., _Result], bool]:
    """Choose a configuration or PyTorch; return the plan and whether the choice is final."""
    queries, heads, width = q.shape[-3:]
    packed = cu_seqlens is not None
    batch = images_of(k, cu_seqlens)
    keys = triton.cdiv(k.shape[0] * k.shape[1], batch)  # per image; the mean of packed images

    def plan(config: Config) -> Launch:
        block_q, block_l = config.blocks
        return Launch(
            _cross_attention_fwd_kernel,
            batch * heads * triton.cdiv(queries, block_q),
            config,
            q.device,
            **shared_arguments(q, k, v, mask, config, precision, packed=packed),
            TAIL=packed or (mask is None and keys % block_l != 0),
        )

    def way(choice: Config | Library) -> Callable[..., _Result]:
        return _in_pytorch if isinstance(choice, Library) else partial(_start, plan(choice))

    def prepare(choice: Config | Library) -> Callable[[], object]:
        return partial(way(choice), q, k, v, mask, cu_seqlens, statistics)

    def tiles(config: Config) -> Tiles:
        block_q, block_l = config.blocks
        work = block_q * block_l * triton.cdiv(keys, block_l)
        return Tiles([work] * plan(config).programs)

    row = table_row("cross_attention_fwd", q, mask, packed)
    choices: tuple[Any, ...] = configs.candidates(row, (q, k, v), precision)
    if not packed and _library_has(q, k, v, mask, statistics):
        choices = *choices, LIBRARY
    keys_class = triton.next_power_of_2(keys)
    key = batch * queries, keys_class, heads, width, mask is not None, statistics, precision
    name = "packed_cross_attention_fwd" if packed else "cross_attention_fwd"
    choice, settled = choose(name, key, choices, prepare, q, tiles)
    return way(choice), settled


def shared_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    config: Config,
    precision: str,
    *,
    packed: bool,
) -> dict[str, Any]:
    """Return the arguments other than tensors that forward and backward have in common."""
    _, keys, heads, width = k.shape
    stride_mask_batch, stride_mask_head, stride_mask_row = (
        0 if mask is None or mask.shape[i] == 1 else mask.stride(i) for i in range(3)
    )
    return {
        "queries": q.shape[-3],
        "keys": keys,
        "heads": heads,
        "width": width,
        "scale": 1 / math.sqrt(width),
        "stride_q_batch": 0 if q.ndim == 3 else q.stride(0),
        "stride_q_row": q.stride(-3),
        "stride_q_head": q.stride(-2),
        "stride_k_batch": 0 if packed else k.stride(0),
        "stride_k_row": k.stride(1),
        "stride_k_head": k.stride(2),
        "stride_v_batch": 0 if packed else v.stride(0),
        "stride_v_row": v.stride(1),
        "stride_v_head": v.stride(2),
        "stride_mask_batch": stride_mask_batch,
        "stride_mask_head": stride_mask_head,
        "stride_mask_row": stride_mask_row,
        "PRECISION": precision,
        "BLOCK_Q": config.blocks[0],
        "BLOCK_L": config.blocks[1],
        "WIDTH": padded_width(width),
        "DESCRIPTORS": config.descriptors,
    }


def table_row(kernel: str, q: Tensor, mask: Tensor | None, packed: bool) -> str:
    """Return the row of the configuration table for this head width, mask and packing."""
    wide = "_wide" if q.shape[-1] > 128 else ""
    return ("packed_" if packed else "") + kernel + ("" if mask is None else "_masked") + wide


def padded_width(width: int) -> int:
    """Return the columns of a tile that holds one head."""
    return max(16, triton.next_power_of_2(width))


def product_flops(count: int) -> Callable[[Mapping[str, Any]], int]:
    """Return a function for the FLOPs of ``count`` matmuls of queries, keys and head width."""

    def flops(arguments: Mapping[str, Any]) -> int:
        batch, keys, heads, width = arguments["k_ptr"].shape
        return 2 * count * batch * heads * arguments["queries"] * keys * width

    return flops


MASKED = {"": False, "_masked": True}


def example_operands(s: Sizes, masked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return queries, keys, values and a mask for an example."""
    q = s.tensor(*([] if s.shared else [s.images]), s.queries, s.heads, s.width)
    k, v = s.tensor(s.images, s.length, 2, s.heads, s.width).unbind(2)
    padded = triton.cdiv(s.length, 128) * 128
    return q, k, v, s.tensor(s.images, 1, s.queries, padded) if masked else None


def example_packed(s: Sizes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return shared queries, packed keys and values, and where each image begins."""
    q = s.tensor(s.queries, s.heads, s.width)
    k, v = s.tensor(1, s.images * s.length, 2, s.heads, s.width).unbind(2)
    starts = torch.arange(s.images + 1, dtype=torch.int32, device=q.device) * s.length
    return q, k, v, starts


def _packed_example(s: Sizes, statistics: bool) -> object:
    q, k, v, starts = example_packed(s)
    return cross_attention_fwd(q, k, v, None, starts, statistics=statistics)


def _example(s: Sizes, masked: bool, statistics: bool) -> object:
    return cross_attention_fwd(*example_operands(s, masked), statistics=statistics)


register(
    _cross_attention_fwd_kernel,
    flops=product_flops(2),
    examples={
        f"cross_attention_fwd{name}": Example(
            partial(_example, masked=masked, statistics=True),
            table=f"cross_attention_fwd{name}",
            tile="ql",
            products=("qld", "qdl"),
            descriptors=3,
        )
        for name, masked in MASKED.items()
    }
    | {
        "packed_cross_attention_fwd": Example(
            partial(_packed_example, statistics=True),
            table="packed_cross_attention_fwd",
            tile="ql",
            products=("qld", "qdl"),
            descriptors=3,
        ),
        "packed_cross_attention_fwd_alone": Example(
            partial(_packed_example, statistics=False), compiled=False
        ),
    }
    | {
        f"cross_attention_fwd{name}_alone": Example(
            partial(_example, masked=masked, statistics=False), compiled=False
        )
        for name, masked in MASKED.items()
    },
)
