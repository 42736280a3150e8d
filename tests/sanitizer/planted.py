"""Kernels with one mistake each, switched on by ``BUG``; without it they are right."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from sanitizer.unwritten import guarded
from triton import cdiv

BLOCK = 16


@triton.jit
def _linear_kernel(
    x_ptr, w_ptr, pos_ptr, out_ptr, stride_x_row, stride_out_row, first_row, M, N, K, L,
    BLOCK: tl.constexpr, BUG: tl.constexpr,
):  # fmt: skip
    """One tile of ``x @ w.T + pos[m mod L]``, rows counted from ``first_row`` of a long batch."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x_rows = rows - 1 if BUG == "row before the first" else rows
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK):
        inner = start + tl.arange(0, BLOCK)
        w_mask = (cols < N)[:, None] & (inner < K)[None, :]
        if BUG == "no mask on the last k":
            w_mask = (cols < N)[:, None]
        x_mask = (rows < M)[:, None] & (inner < K)[None, :]
        if BUG == "column beyond a view":
            x_mask = (rows < M)[:, None] & (inner <= K)[None, :]
        x = tl.load(x_ptr + x_rows[:, None] * stride_x_row + inner[None, :], mask=x_mask, other=0.0)
        w = tl.load(w_ptr + cols[:, None] * K + inner[None, :], mask=w_mask, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")

    mask = (rows < M)[:, None] & (cols < N)[None, :]
    pos_at = ((first_row + rows) % L)[:, None] * N + cols[None, :]
    if BUG == "offset beyond 2**31":
        pos_at = ((first_row + rows)[:, None] * N + cols[None, :]) % (L * N)
    if BUG == "rows of another table":
        pos_at = rows[:, None] * N + cols[None, :]
    acc += tl.load(pos_ptr + pos_at, mask=mask, other=0.0)
    if BUG == "mask transposed":
        mask = (rows < N)[:, None] & (cols < M)[None, :]
    if BUG == "no mask on the last rows":
        mask = (cols < N)[None, :]
    tl.store(out_ptr + rows[:, None] * stride_out_row + cols[None, :], acc, mask=mask)


def linear(bug):
    M, N, K, L = 37, 50, 40, 7
    first_row = 2**31 // N + 3
    x, w, pos = (torch.randn(size, device="cuda") for size in ((M, K), (N, K), (L, N)))
    x = guarded(x)
    out = torch.empty(M, N, device="cuda")
    if bug == "output expanded over its rows":
        out = out[:1].clone().expand(M, N)
    _linear_kernel[(cdiv(M, BLOCK), cdiv(N, BLOCK))](
        x, w, pos, out, x.stride(0), out.stride(0), first_row, M, N, K, L, BLOCK, bug
    )
    expected = x.double() @ w.double().T + pos[(first_row + torch.arange(M)) % L]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)


@triton.jit
def _column_sums_kernel(
    dout_ptr, partial_ptr, M, N, ROWS: tl.constexpr, BLOCK: tl.constexpr, BUG: tl.constexpr
):
    """The sum of ROWS rows of ``dout``, as one row of partial sums."""
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(pid * ROWS, (pid + 1) * ROWS):
        mask = (cols < N) & (row < M)
        if BUG == "one row too many":
            mask = (cols < N) & (row <= M)
        total += tl.load(dout_ptr + row * N + cols, mask=mask, other=0.0)
    if BUG == "partial sums in one row":
        pid = 0
    if BUG == "sum without an atomic":
        total += tl.load(partial_ptr + cols, mask=cols < N, other=0.0)
        pid = 0
    tl.store(partial_ptr + pid * N + cols, total, mask=cols < N)


def column_sums(bug):
    M, N, ROWS = 31, 29, 8
    dout = torch.randn(M, N, device="cuda")
    partial = torch.zeros(cdiv(M, ROWS), N, device="cuda")
    _column_sums_kernel[(len(partial),)](dout, partial, M, N, ROWS, 32, bug)
    torch.testing.assert_close(partial.sum(0), dout.sum(0), rtol=1e-5, atol=1e-5)


@triton.jit
def _tile_sums_kernel(x_ptr, sums_ptr, N, TILES, BLOCK: tl.constexpr, BUG: tl.constexpr):
    """The sum of one tile of one row."""
    row, tile = tl.program_id(0), tl.program_id(1)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * N + cols, mask=cols < N, other=0.0)
    if BUG != "last tile not summed" or (tile + 1) * BLOCK <= N:
        tl.store(sums_ptr + row * TILES + tile, tl.sum(x, 0))


@triton.jit
def _centre_kernel(
    x_ptr, sums_ptr, out_ptr, N, TILES, BLOCK: tl.constexpr, TILES_PADDED: tl.constexpr,
    BUG: tl.constexpr,
):  # fmt: skip
    """One tile of a row minus the mean of the row, from the sums of its tiles."""
    row, tile = tl.program_id(0), tl.program_id(1)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * N + cols, mask=cols < N, other=0.0)
    if BUG == "sums of the same launch":
        tl.store(sums_ptr + row * TILES + tile, tl.sum(x, 0))
    tiles = tl.arange(0, TILES_PADDED)
    sums = tl.load(sums_ptr + row * TILES + tiles, mask=tiles < TILES, other=0.0)
    tl.store(out_ptr + row * N + cols, x - tl.sum(sums, 0) / N, mask=cols < N)


def centre(bug):
    M, N = 3, 75
    tiles = cdiv(N, BLOCK)
    x = torch.randn(M, N, device="cuda")
    sums, out = torch.empty(M, tiles, device="cuda"), torch.empty_like(x)
    if bug == "sums of the same launch":
        sums.zero_()
    else:
        _tile_sums_kernel[(M, tiles)](x, sums, N, tiles, BLOCK, bug)
    _centre_kernel[(M, tiles)](x, sums, out, N, tiles, BLOCK, triton.next_power_of_2(tiles), bug)
    torch.testing.assert_close(out, x - x.mean(1, keepdim=True), rtol=1e-5, atol=1e-5)


@triton.jit
def _tokens_kernel(
    x_ptr, out_ptr, images, S, C: tl.constexpr, BLOCK: tl.constexpr, BUG: tl.constexpr
):
    """One tile of an image's tokens, without the first of them, minus their means."""
    image, start = tl.program_id(0), tl.program_id(1) * BLOCK
    read, written = S - 1, S - 1
    if BUG == "descriptor longer than its input":
        read = S
    if BUG == "descriptor rounded up to the tile":
        written = tl.cdiv(S - 1, BLOCK) * BLOCK
    source = tl.make_tensor_descriptor(
        x_ptr + C, [images, read, C], [S * C, C, 1], block_shape=[1, BLOCK, C]
    )
    target = tl.make_tensor_descriptor(
        out_ptr, [images, written, C], [(S - 1) * C, C, 1], block_shape=[1, BLOCK, C]
    )
    x = source.load([image, start, 0]).reshape(BLOCK, C)
    x -= tl.sum(x, 1, keep_dims=True) / C
    target.store([image, start, 0], x.reshape(1, BLOCK, C))


def tokens(bug):
    x = torch.randn(2, 38, 32, device="cuda")
    out = torch.empty(2, 37, 32, device="cuda")
    _tokens_kernel[(2, cdiv(37, BLOCK))](x, out, 2, 38, 32, BLOCK, bug)
    expected = x[:, 1:] - x[:, 1:].mean(2, keepdim=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@triton.jit
def _packed_kernel(x_ptr, starts_ptr, out_ptr, longest, C, BLOCK: tl.constexpr, BUG: tl.constexpr):
    """One tile of an image's rows, doubled; the rows of all images are one after another."""
    image = tl.program_id(0)
    start = tl.load(starts_ptr + image)
    length = tl.load(starts_ptr + image + 1) - start
    if BUG == "length of the longest image":
        length = longest
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK)
    inside = (rows < length)[:, None] & (cols < C)[None, :]
    x = tl.load(x_ptr + (start + rows)[:, None] * C + cols[None, :], mask=inside, other=0.0)
    first = start
    if BUG == "every image written to the first":
        first = 0
    tl.store(out_ptr + (first + rows)[:, None] * C + cols[None, :], 2 * x, mask=inside)


def packed(bug):
    lengths, C = [21, 37, 5], 13
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    x = torch.randn(sum(lengths), C, device="cuda")
    out = torch.empty_like(x)
    images = len(lengths) + (bug == "one image more than there are")
    grid = (images, cdiv(max(lengths), BLOCK))
    _packed_kernel[grid](x, starts, out, max(lengths), C, BLOCK, bug)
    torch.testing.assert_close(out, 2 * x)


@dataclass(frozen=True)
class Planted:
    """A mistake, and what has to be reported of it."""

    bug: str
    run: Callable[[str], None]
    kind: str
    kernel: str
    buffer: str | None


READ, WRITE = "out-of-bounds read", "out-of-bounds write"
PLANTED = [
    Planted("no mask on the last k", linear, READ, "_linear_kernel", "w_ptr"),
    Planted("rows of another table", linear, READ, "_linear_kernel", "pos_ptr"),
    Planted("row before the first", linear, READ, "_linear_kernel", None),
    Planted("column beyond a view", linear, "unwritten read", "_linear_kernel", None),
    Planted("no mask on the last rows", linear, WRITE, "_linear_kernel", "out_ptr"),
    Planted("mask transposed", linear, WRITE, "_linear_kernel", "out_ptr"),
    Planted("offset beyond 2**31", linear, "int32 overflow", "_linear_kernel", None),
    Planted("output expanded over its rows", linear, "poison", "_linear_kernel", None),
    Planted("one row too many", column_sums, READ, "_column_sums_kernel", "dout_ptr"),
    Planted(
        "partial sums in one row",
        column_sums,
        "write-write race",
        "_column_sums_kernel",
        "partial_ptr",
    ),
    Planted(
        "sum without an atomic",
        column_sums,
        "write-write race",
        "_column_sums_kernel",
        "partial_ptr",
    ),
    Planted("sums of the same launch", centre, "read-write race", "_centre_kernel", "sums_ptr"),
    Planted("last tile not summed", centre, "unwritten read", "_centre_kernel", None),
    Planted("length of the longest image", packed, READ, "_packed_kernel", "x_ptr"),
    Planted("one image more than there are", packed, READ, "_packed_kernel", "starts_ptr"),
    Planted(
        "every image written to the first", packed, "write-write race", "_packed_kernel", "out_ptr"
    ),
    Planted("descriptor longer than its input", tokens, READ, "_tokens_kernel", "x_ptr"),
    Planted("descriptor rounded up to the tile", tokens, WRITE, "_tokens_kernel", "out_ptr"),
]
