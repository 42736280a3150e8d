"""2-D sine-cosine position tables: building, bicubic resizing, and a cache of resized ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visproj.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self

Grid = tuple[int, int]


def sincos_position_table(dim: int, grid: Grid = (16, 16)) -> Tensor:
    """Compute the fixed 2-D sine-cosine embedding of every cell of a grid, column (width) first.

    With ``ω_k = 10000^(-4k / dim)``, ``k = 0 .. dim/4 - 1``, the row of the cell in row ``i`` and
    column ``j`` is ``[sin(j ω), cos(j ω), sin(i ω), cos(i ω)]``. Computed in fp64.

    Args:
        dim: Width of the table, a multiple of 4.
        grid: Rows and columns.

    Returns:
        ``[rows * columns, dim]`` in the default dtype, cells in row-major order.

    Raises:
        ValueError: If ``dim`` is not a positive multiple of 4, or ``grid`` not two positive
            integers.

    Source: DeepSpeed-VisualChat ``utils/model/vis_proj.py``, after MAE ``util/pos_embed.py``.
    """
    if not isinstance(dim, int) or dim <= 0 or dim % 4:
        raise InputError(f"a 2-D sine-cosine table needs a width divisible by 4, got {dim!r}")
    rows, columns = check_grid(grid)
    # From integers: DeepSpeed's zero.Init casts what a floating-point arange returns.
    omega = 10000.0 ** (-torch.arange(dim // 4).double() * 4 / dim)

    def axis(length: int) -> Tensor:
        angles = torch.arange(length).double()[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # [length, dim / 2]

    by_column = axis(columns)[None].expand(rows, -1, -1)
    by_row = axis(rows)[:, None].expand(-1, columns, -1)
    table = torch.cat([by_column, by_row], dim=2).reshape(rows * columns, dim)
    return table.to(torch.get_default_dtype())


def resize_position_table(table: Tensor, source: Grid, target: Grid) -> Tensor:
    """Resize a position table from one grid to another, as upstream does.

    Bicubic interpolation (``align_corners=False``) over the grid, in fp32, cast back to the table's
    dtype. The same grid returns the table itself.

    Args:
        table: ``[source rows * source columns, D]``, floating, ``D`` at least 1.
        source: Rows and columns of ``table``.
        target: Rows and columns wanted.

    Returns:
        ``[target rows * target columns, D]``, dtype and device of ``table``.

    Raises:
        TypeError: If ``table`` is not a floating-point tensor.
        ValueError: If its shape does not match ``source``, or a grid is not two positive integers.
    """
    if not isinstance(table, Tensor) or not table.is_floating_point():
        got = table.dtype if isinstance(table, Tensor) else type(table).__name__
        raise TypeError(f"table must be a floating-point tensor, got {got}")
    if table.ndim != 2 or not table.shape[1]:
        raise InputError(f"table must be [rows * columns, D], got shape {list(table.shape)}")
    source, target = check_grid(source), check_grid(target)
    if table.shape[0] != math.prod(source):
        raise InputError(
            f"table has {table.shape[0]} rows, but a {source[0]}x{source[1]} grid has "
            f"{math.prod(source)}"
        )
    if source == target:
        return table
    rows, columns = target
    planes = table.float().reshape(1, *source, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(planes, size=(rows, columns), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).reshape(rows * columns, -1).to(table.dtype)


def sincos_axis(dim: int, positions: Sequence[int] | range) -> Tensor:
    """Compute the sine-cosine embedding of positions on one axis, with MiniCPM-V's rounding.

    ``[sin(p ω), cos(p ω)]`` with ``ω_k = 10000^(-2k / dim)``. Every step is in fp32: at large
    positions the result differs from :func:`sincos_position_table` by a rounding of the angle.

    Args:
        dim: Width of the embedding, even.
        positions: The positions ``p``, integers.

    Returns:
        fp32 ``[len(positions), dim]`` on the CPU.

    Source: MiniCPM-V ``resampler.py``.
    """
    omega = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float32) / np.float32(dim / 2))
    angles = np.array(positions, np.float32)[:, None] * omega
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], 1))


def position_axes(table: Tensor, grid: Grid) -> tuple[Tensor, Tensor] | None:
    """Split a separable position table into one vector per row and one per column of its grid.

    Args:
        table: ``[rows * columns, D]``.
        grid: Its rows and columns.

    Returns:
        ``[rows, D / 2]``, the second half of every cell, and ``[columns, D / 2]``, the first half.
        ``None`` if the table is not separable: the second half of a cell depends on its column, or
        the first on its row.
    """
    half = table.shape[-1] // 2
    cells = table.unflatten(0, grid)
    rows, columns = cells[:, 0, half:], cells[0, :, :half]
    return (rows, columns) if torch.equal(by_cell(rows, columns), cells) else None


def by_cell(rows: Tensor, columns: Tensor) -> Tensor:
    """Combine ``[h, D / 2]`` and ``[w, D / 2]`` to one table ``[h, w, D]``, columns' half first."""
    sides = (len(rows), len(columns), -1)
    return torch.cat([columns.expand(sides), rows[:, None].expand(sides)], -1)


def check_grid(grid: Grid) -> Grid:
    """Return ``grid`` as two positive ints, or raise ``ValueError`` with the value given."""
    try:
        rows, columns = (int(n) for n in grid)
    except (TypeError, ValueError, OverflowError):  # None, NaN, infinity, or not two of anything
        rows = columns = 0
    # In this order: a grid that could not be unpacked cannot be compared either.
    if min(rows, columns) < 1 or (rows, columns) != tuple(grid) or bool in map(type, grid):
        raise InputError(f"grid must be two positive integers (rows, columns), got {grid!r}")
    return rows, columns


def grid_of(tokens: int, grid: Grid | None) -> Grid:
    """Return the grid of ``tokens`` visual tokens (CLS removed): ``grid``, or a square.

    Raises:
        ValueError: If ``grid`` holds another number of cells, if it is ``None`` and ``tokens`` is
            not a square number, or if there are no tokens.
    """
    if not tokens:
        raise InputError("0 visual tokens (CLS removed): an image needs at least one")
    if grid is None:
        side = int(math.sqrt(tokens))  # exact for squares, and what torch.compile can trace
        if side * side != tokens:
            raise InputError(
                f"{tokens} visual tokens (CLS removed) form no square grid: pass grid=(rows, "
                "columns), and check has_cls"
            )
        return side, side
    rows, columns = check_grid(grid)
    if rows * columns != tokens:
        raise InputError(
            f"grid {rows}x{columns} has {rows * columns} cells, but there are {tokens} visual "
            "tokens (CLS removed)"
        )
    return rows, columns


class PositionCache:
    """Resized copies of one frozen position table, rebuilt whenever the table may have changed.

    An entry is used only while the table is the same tensor at the same version and address.
    Nothing is cached while compiling, exporting or capturing a CUDA graph, nor for a table that
    requires a gradient, is sharded by a training engine or is wrapped by functorch. Copies and
    pickles of the cache are empty.
    """

    _CAPACITY = 16

    def __init__(self) -> None:
        self._entries: dict[tuple[int, Grid, Grid], tuple[Tensor, tuple[int, int], Tensor]] = {}
        self._separable: tuple[Tensor, tuple[int, int], bool] | None = None

    def clear(self) -> None:
        """Forget every table."""
        self._entries.clear()
        self._separable = None

    def resize(self, table: Tensor, source: Grid, target: Grid) -> Tensor:
        """Call :func:`resize_position_table`, and cache the result if that is safe."""
        if source == target or not _cacheable(table):
            return resize_position_table(table, source, target)
        key, state = (id(table), source, target), (table._version, table.data_ptr())
        entry = self._entries.get(key)
        if entry is not None and entry[0] is table and entry[1] == state:
            return entry[2]
        # A tensor made under inference_mode could not be saved for a later backward.
        with torch.inference_mode(False), torch.no_grad():
            resized = resize_position_table(table, source, target)
        if len(self._entries) >= self._CAPACITY:
            self.clear()
        self._entries[key] = (table, state, resized)
        return resized

    def is_separable(self, table: Tensor, grid: Grid) -> bool:
        """Return whether a table, of one row per cell, is known to be separable.

        See :func:`position_axes`. The answer is kept; to find it, a GPU is waited for.
        """
        if not _cacheable(table):
            return False
        state, known = (table._version, table.data_ptr()), self._separable
        if known is None or known[0] is not table or known[1] != state:
            axes = position_axes(table.flatten(0, -2), grid)
            known = self._separable = table, state, axes is not None
        return known[2]

    def __reduce__(self) -> tuple[type[PositionCache], tuple[()]]:
        return PositionCache, ()


class PositionedModule(nn.Module):
    """A module with a cache of resized position tables, cleared whenever tables may change.

    Attributes:
        _positions: The cache; cleared by a cast, by a move to a device and by loading weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self._positions = PositionCache()

    def _resized(self, table: Tensor, source: Grid, target: Grid) -> Tensor:
        """Return ``table`` resized to another grid, cached in eval mode only.

        In training, weights are also written through ``.data``, which the cache cannot detect.
        """
        if source == target:
            return table
        resize = resize_position_table if self.training else self._positions.resize
        return resize(table, source, target)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self._positions.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._positions.clear()
        super()._load_from_state_dict(*args, **kwargs)


def _cacheable(table: Tensor) -> bool:
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        or table.requires_grad
        or table.is_inference()
        or table.is_meta
        or torch._C._functorch.is_functorch_wrapped_tensor(table)
        or type(table) not in (Tensor, nn.Parameter)
        or hasattr(table, "ds_id")
        or (table.is_cuda and torch.cuda.is_current_stream_capturing())
    )
