"""The first kernel of attention's backward: the sum of output times gradient for every query."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visproj.kernels.cross_attention import padded_width
from visproj.kernels.launch import Config, Launch
from visproj.kernels.plans import recall_launch
from visproj.kernels.registry import Example, Sizes, register


@triton.jit
def _cross_attention_bwd_delta_kernel(
    out_ptr,  # [batch, queries, heads, width]
    dout_ptr,  # [batch, queries, heads, width]
    delta_ptr,  # [batch, heads, queries]
    queries,
    heads,
    width,
    BLOCK_Q: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: delta, the sum of out * dout over the head width, for one tile of queries.

    Grid: (batch * heads * query tiles).
    """
    query_tiles = tl.cdiv(queries, BLOCK_Q)
    image_head = (tl.program_id(0) // query_tiles).to(tl.int64)
    image, head = image_head // heads, image_head % heads
    rows = (tl.program_id(0) % query_tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    cols = tl.arange(0, WIDTH)
    inside = (rows < queries)[:, None] & (cols < width)[None, :]
    cells = ((image * queries + rows) * heads + head)[:, None] * width + cols[None, :]
    out = tl.load(out_ptr + cells, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_Q, WIDTH]
    dout = tl.load(dout_ptr + cells, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta_ptr + image_head * queries + rows, tl.sum(out * dout, 1), mask=rows < queries)


def cross_attention_bwd_delta(out: Tensor, dout: Tensor) -> Tensor:
    """Return the sums of ``out * dout`` over the head width, fp32 ``[B, H, Q]``."""
    batch, queries, heads, width = out.shape
    delta = out.new_empty(batch, heads, queries, dtype=torch.float32)

    def make() -> Launch:
        block = max(1, min(64, 4096 // padded_width(width)))
        return Launch(
            _cross_attention_bwd_delta_kernel,
            batch * heads * triton.cdiv(queries, block),
            Config((block,), warps=4, stages=1),
            out.device,
            queries=queries,
            heads=heads,
            width=width,
            BLOCK_Q=block,
            WIDTH=padded_width(width),
        )

    launch = recall_launch("cross_attention_bwd_delta", (out, dout), make)
    launch(out_ptr=out, dout_ptr=dout, delta_ptr=delta)
    return delta


def _delta_example(s: Sizes) -> Tensor:
    out, dout = (s.tensor(s.images, s.queries, s.heads, s.width) for _ in range(2))
    return cross_attention_bwd_delta(out, dout)


register(
    _cross_attention_bwd_delta_kernel,
    {"delta": Example(_delta_example, others=tuple({"width": n} for n in (16, 32, 64, 256)))},
)
