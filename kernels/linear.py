"""A matmul whose epilogue scales rows and adds a table, or stores only the rows' squared norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from visproj.kernels import configs
from visproj.kernels.device import dot_precision
from visproj.kernels.launch import Config, Launch
from visproj.kernels.layout import contiguous, unit_columns
from visproj.kernels.makespan import Tiles, product_tiles
from visproj.kernels.plans import key_of, recall
from visproj.kernels.registry import Example, Sizes, register
from visproj.kernels.tuning import LIBRARY, Library, choose


@triton.jit
def _grouped(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Return row and column tile, in an order in which close tiles share data in the L2 cache."""
    group = tile // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first_m + within % group_m, within // group_m


@triton.jit
def _column_vector(ptr, cols, N):
    return tl.load(ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _linear_fwd_kernel(
    x_ptr,  # [images, length, K]
    weight_ptr,  # [N, K]
    out_ptr,  # [images * length, N]
    bias_ptr,  # [N]
    scale_ptr,  # [parts, M], parts of the sums of squares that give each row's scale
    shift_ptr,  # [N]
    table_ptr,  # [length, table_columns]
    squares_ptr,  # [tiles_n, M], sum of squares of each row in every column tile
    parts,
    eps,
    M,
    images,
    length,
    N,
    K,
    table_columns,
    stride_x_image,
    stride_x_row,
    stride_weight_row,
    stride_table_row,
    TRIANGULAR: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """One program: a tile of rstd * (x @ weight.T + bias) + shift + table, or its squares.

    rstd = 1 / sqrt(sum of squares + eps). Grid: (row tiles of every image * column tiles). A tile
    never crosses from one image to the next.
    """
    row_tiles = tl.cdiv(length, BLOCK_M)
    tile_m, tile_n = _grouped(tl.program_id(0), images * row_tiles, tl.cdiv(N, BLOCK_N), GROUP_M)
    image = (tile_m // row_tiles).to(tl.int64)
    first_row = (tile_m % row_tiles) * BLOCK_M
    first_col = tile_n * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_N)
    flat_rows = image * length + rows
    in_rows = rows < length
    in_cols = cols < N

    x_ptr += image * stride_x_image
    # The triangular factor of a QR decomposition has weight[n, k] = 0 for k < n.
    first_k = first_col // BLOCK_K * BLOCK_K if TRIANGULAR else 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DESCRIPTORS:
        x_tiles = tl.make_tensor_descriptor(
            x_ptr, [length, K], [stride_x_row, 1], [BLOCK_M, BLOCK_K]
        )
        weight_tiles = tl.make_tensor_descriptor(
            weight_ptr, [N, K], [stride_weight_row, 1], [BLOCK_N, BLOCK_K]
        )
        # Made before the loop, because making a descriptor synchronises all threads.
        if table_ptr is not None:
            table_tiles = tl.make_tensor_descriptor(
                table_ptr, [length, table_columns], [stride_table_row, 1], [BLOCK_M, BLOCK_N]
            )
        if out_ptr is not None:
            out_tiles = tl.make_tensor_descriptor(
                out_ptr + image * length * N, [length, N], [N, 1], [BLOCK_M, BLOCK_N]
            )
        for k in range(first_k, K, BLOCK_K):
            x = x_tiles.load([first_row, k])  # [BLOCK_M, BLOCK_K]
            weight = weight_tiles.load([first_col, k])  # [BLOCK_N, BLOCK_K]
            acc = tl.dot(x, weight.T, acc, input_precision=PRECISION)
    else:
        ks = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_x_row + ks[None, :]
        weight_ptrs = weight_ptr + cols.to(tl.int64)[None, :] * stride_weight_row + ks[:, None]
        for k in range(first_k, K, BLOCK_K):
            in_x, in_weight = in_rows[:, None], in_cols[None, :]
            if not EVEN_K:
                in_x = in_x & (ks < K - k)[None, :]
                in_weight = in_weight & (ks < K - k)[:, None]
            x = tl.load(x_ptrs + k, mask=in_x, other=0.0)  # [BLOCK_M, BLOCK_K]
            weight = tl.load(weight_ptrs + k, mask=in_weight, other=0.0)  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(x, weight, acc, input_precision=PRECISION)

    if bias_ptr is not None:
        acc += _column_vector(bias_ptr, cols, N)
    if scale_ptr is not None:
        square = tl.zeros((BLOCK_M,), tl.float32)
        square_ptrs = scale_ptr + flat_rows
        for _ in range(parts):
            square += tl.load(square_ptrs, mask=in_rows, other=0.0)
            square_ptrs += M
        acc *= (1.0 / tl.sqrt(square + eps))[:, None]
    if shift_ptr is not None:
        acc += _column_vector(shift_ptr, cols, N)
    if table_ptr is not None:
        if DESCRIPTORS:
            acc += table_tiles.load([first_row, first_col]).to(tl.float32)
        else:
            in_table = in_rows[:, None] & (cols < table_columns)[None, :]
            cells = rows.to(tl.int64)[:, None] * stride_table_row + cols[None, :]
            acc += tl.load(table_ptr + cells, mask=in_table, other=0.0).to(tl.float32)

    if out_ptr is not None:
        result = acc.to(out_ptr.dtype.element_ty)
        if DESCRIPTORS:
            out_tiles.store([first_row, first_col], result)
        else:
            in_out = in_rows[:, None] & in_cols[None, :]
            tl.store(out_ptr + flat_rows[:, None] * N + cols[None, :], result, mask=in_out)
    if squares_ptr is not None:
        acc = tl.where(in_cols[None, :], acc, 0.0)
        cells = tile_n.to(tl.int64) * M + flat_rows
        tl.store(squares_ptr + cells, tl.sum(acc * acc, 1), mask=in_rows)


class Epilogue(NamedTuple):
    """The epilogue of a matmul: ``rstd (x Wᵀ + bias) + shift + table``.

    With ``squares``, ``rstd = 1 / sqrt(their sum over the parts + eps)``; without, it is 1.
    """

    bias: Tensor | None = None  # [N]
    squares: Tensor | None = None  # fp32 [parts, B * L]
    shift: Tensor | None = None  # [N]
    table: Tensor | None = None  # [L, columns], added to the first columns of every image
    eps: float = 0.0


class _Operands(NamedTuple):
    """Tensors as the kernel reads them."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    squares: Tensor | None = None
    shift: Tensor | None = None
    table: Tensor | None = None


class _Product(NamedTuple):
    """The settings of a matmul."""

    precision: str
    parts: int | None = None  # number of parts of the squares
    eps: float = 0.0  # added to the sum of the squares
    store: bool = True
    triangular: bool = False


class _Plan(NamedTuple):
    """The launch of a matmul, with its configuration and the shape of its result."""

    launch: Launch
    out: tuple[int, ...]  # the shape of the result, or of the squares where it is not stored
    store: bool

    def __call__(self, operands: _Operands) -> Tensor:
        """Allocate the result and launch the kernel."""
        x = operands.x
        out = x.new_empty(self.out, dtype=x.dtype if self.store else torch.float32)
        self.launch(
            x_ptr=x,
            weight_ptr=operands.weight,
            out_ptr=out if self.store else None,
            bias_ptr=operands.bias,
            scale_ptr=operands.squares,
            shift_ptr=operands.shift,
            table_ptr=operands.table,
            squares_ptr=None if self.store else out,
        )
        return out


_PRODUCT_ALONE = Epilogue()
_GROUP = 8  # row tiles that start before the next column tile


def _launch_linear(x: Tensor, weight: Tensor, epilogue: Epilogue, **options: bool) -> Tensor:
    """Launch a matmul with its epilogue; ``options`` are those of :class:`_Product`."""
    bias, squares, shift, table, eps = epilogue
    x, weight, table = unit_columns(x, weight, table)
    operands = _Operands(x, weight, *contiguous(bias, squares, shift), table)
    parts = None if squares is None else squares.shape[0]
    product = _Product(dot_precision(x.dtype), parts, eps, **options)
    plan = recall(key_of("linear", operands, *product), lambda: _plan(operands, product))
    return plan(operands)


def _in_pytorch(operands: _Operands) -> Tensor:
    """Compute a matmul without row scale, and its epilogue, in PyTorch."""
    x, weight, bias, _, shift, table = operands
    out = library_product(x.contiguous(), weight, bias)
    if shift is not None:
        out += shift
    if table is not None:
        out[..., : table.shape[1]] += table
    return out


def library_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``F.linear`` of contiguous ``[B, L, K]``, not as a view: FSDP2 warns about views."""
    out = x.new_empty(*x.shape[:2], weight.shape[0])
    rows, target = x.flatten(0, 1), out.flatten(0, 1)
    if bias is None:
        torch.mm(rows, weight.T, out=target)
    else:
        torch.addmm(bias, rows, weight.T, out=target)
    return out


def _plan(operands: _Operands, product: _Product) -> tuple[Any, bool]:
    """Choose a :class:`_Plan` or PyTorch; return it and whether the choice is final."""
    x, weight, table = operands.x, operands.weight, operands.table
    precision, parts, eps, store, triangular = product
    images, length, K = x.shape
    N = weight.shape[0]
    shape = images, length, N
    if table is None and (images == 1 or x.stride(0) == length * x.stride(1)):
        images, length = 1, images * length  # tiles may cross from one image to the next
    M = images * length

    def plan(config: Config | Library) -> Callable[[_Operands], Tensor]:
        if isinstance(config, Library):
            return _in_pytorch
        block_m, block_n, block_k = config.blocks
        column_tiles = triton.cdiv(N, block_n)
        launch = Launch(
            _linear_fwd_kernel,
            images * triton.cdiv(length, block_m) * column_tiles,
            config,
            x.device,
            parts=parts,
            eps=eps,
            M=M,
            images=images,
            length=length,
            N=N,
            K=K,
            table_columns=0 if table is None else table.shape[1],
            stride_x_image=x.stride(0),
            stride_x_row=x.stride(1),
            stride_weight_row=weight.stride(0),
            stride_table_row=0 if table is None else table.stride(0),
            TRIANGULAR=triangular,
            EVEN_K=K % block_k == 0,
            PRECISION=precision,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            GROUP_M=_GROUP,
            DESCRIPTORS=config.descriptors,
        )
        return _Plan(launch, shape if store else (column_tiles, M), store)

    def tiles(config: Config) -> Tiles:
        sizes = images, length, N, K, config.blocks
        return product_tiles(*sizes, triangular=triangular, group=_GROUP)

    kernel = "linear_table" if table is not None else "linear"
    out = x.new_empty(shape) if store else None
    choices: tuple[Any, ...] = configs.candidates(kernel, (x, weight, out, table), precision)
    if store and parts is None:
        choices = *choices, LIBRARY
    key = (M, N, K, store, triangular, parts is not None, precision)
    config, settled = choose(kernel, key, choices, lambda c: partial(plan(c), operands), x, tiles)
    return plan(config), settled


def linear_fwd(x: Tensor, weight: Tensor, epilogue: Epilogue = _PRODUCT_ALONE) -> Tensor:
    """Compute ``x Wᵀ`` and its epilogue.

    Args:
        x: ``[B, L, K]``; any strides, copied only if its last dimension is not contiguous.
        weight: ``[N, K]``.
        epilogue: The epilogue of the matmul.

    Returns:
        ``[B, L, N]`` in the dtype of ``x``.
    """
    return _launch_linear(x, weight, epilogue)


def row_squares_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the sums of squares of the rows of ``x Wᵀ + b``, ``W`` upper triangular.

    ``x Wᵀ + b`` itself is not stored.

    Args:
        x: ``[B, L, K]``.
        weight: ``[<= K, K]``; tiles below its diagonal are skipped.
        bias: ``[N]`` or ``None``.

    Returns:
        fp32 ``[parts, B * L]``, to be summed over the parts.
    """
    return _launch_linear(x, weight, Epilogue(bias=bias), store=False, triangular=True)


def folded_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stats_weight: Tensor,
    stats_bias: Tensor,
    shift: Tensor | None,
    table: Tensor | None,
    eps: float,
    library: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Compute ``rstd * (x Wᵀ + bias) + shift + table``, ``rstd = (‖x Rᵀ + r‖² + eps)^(-1/2)``.

    Args:
        x: ``[B, L, K]``.
        weight: ``[N, K]``.
        bias: ``[N]``.
        stats_weight: ``R``, upper triangular ``[<= K, K]``.
        stats_bias: ``r``, ``[rows of R]``.
        shift: ``[N]`` or ``None``.
        table: ``[L, columns]`` or ``None``.
        eps: Added to the squared norm.
        library: The same function in PyTorch, which takes the arguments before this one. If given,
            it is timed as well.

    Returns:
        ``[B, L, N]`` in the dtype of ``x``.
    """
    x, weight, stats_weight, table = unit_columns(x, weight, stats_weight, table)
    bias, stats_bias, shift = contiguous(bias, stats_bias, shift)
    operands = x, weight, bias, stats_weight, stats_bias, shift, table
    precision = dot_precision(x.dtype)
    key = key_of("folded_linear", operands, eps, precision, library)
    return recall(key, lambda: _plan_folded(operands, eps, precision, library))(*operands, eps)


class _FoldedPlan(NamedTuple):
    """The two launches of a folded product."""

    squares: _Plan
    product: _Plan

    def __call__(self, *arguments: Any) -> Tensor:
        """Launch for arguments of :func:`folded_linear_fwd`; the plan already contains eps."""
        x, weight, bias, stats_weight, stats_bias, shift, table, _ = arguments
        squares = self.squares(_Operands(x, stats_weight, stats_bias))
        return self.product(_Operands(x, weight, bias, squares, shift, table))


def _plan_folded(
    operands: tuple[Any, ...], eps: float, precision: str, library: Callable[..., Tensor] | None
) -> tuple[Callable[..., Tensor], bool]:
    """Choose the kernels or PyTorch; return the plan and whether the choice is final."""
    x, weight, bias, stats_weight, stats_bias, shift, table = operands
    norm = _Operands(x, stats_weight, stats_bias)
    squares_plan, settled = _plan(norm, _Product(precision, store=False, triangular=True))
    squares = x.new_empty(squares_plan.out, dtype=torch.float32)
    scaled = _Operands(x, weight, bias, squares, shift, table)
    plan, also = _plan(scaled, _Product(precision, len(squares), eps))
    ours = _FoldedPlan(squares_plan, plan)
    # Before scaling, the matmul may overflow fp16. The kernels keep it in fp32.
    if library is None or x.dtype == torch.float16 or not (settled and also):
        return ours, settled and also
    ways: dict[Any, Callable[..., Tensor]] = {"kernels": ours, LIBRARY: library}
    shape = x.shape[0] * x.shape[1], *weight.shape, table is not None, precision
    way, settled = choose(
        "folded_linear", shape, tuple(ways), lambda way: partial(ways[way], *operands, eps), x
    )
    return ways[way], settled


def _flops(arguments: Mapping[str, Any]) -> int:
    """Return the FLOPs of a matmul, without the skipped zero tiles of a triangular weight."""
    M, N, K = (arguments[name] for name in "MNK")
    if not arguments["TRIANGULAR"]:
        return 2 * M * N * K
    columns, depth = arguments["BLOCK_N"], arguments["BLOCK_K"]
    return 2 * M * sum((K - n // depth * depth) * min(columns, N - n) for n in range(0, N, columns))


def _table_example(s: Sizes) -> Tensor:
    table = s.tensor(s.length, (s.outputs + 1) // 2)
    epilogue = Epilogue(shift=s.tensor(s.outputs), table=table)
    return linear_fwd(s.features(), s.tensor(s.outputs, s.inputs), epilogue)


def _folded_example(s: Sizes, table: bool) -> Tensor:
    squares = s.statistics(triton.cdiv(s.inputs, 128), s.images * s.length)
    added = s.tensor(s.length, s.outputs) if table else None
    epilogue = Epilogue(bias=s.tensor(s.outputs), squares=squares, eps=1e-12, table=added)
    return linear_fwd(s.features(), s.tensor(s.outputs, s.inputs), epilogue)


_PRODUCT: dict[str, Any] = {"tile": "mnk", "products": ("mnk",), "descriptors": 2}
_PRODUCT_AND_TABLE = _PRODUCT | {"table": "linear_table", "descriptors": 3}
register(
    _linear_fwd_kernel,
    flops=_flops,
    examples={
        "linear": Example(
            lambda s: linear_fwd(
                s.features(), s.tensor(s.outputs, s.inputs), Epilogue(bias=s.tensor(s.outputs))
            ),
            "linear",
            **_PRODUCT,
        ),
        "linear_squares": Example(
            lambda s: row_squares_fwd(
                s.features(), s.tensor(s.inputs, s.inputs), s.tensor(s.inputs)
            ),
            "linear",
            **_PRODUCT,
        ),
        "linear_folded": Example(lambda s: _folded_example(s, False), "linear", **_PRODUCT),
        "linear_table": Example(_table_example, **_PRODUCT_AND_TABLE),
        "linear_table_folded": Example(lambda s: _folded_example(s, True), **_PRODUCT_AND_TABLE),
    },
)
