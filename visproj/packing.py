"""Packed batches: the tokens of images of different sizes, one after another without padding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visproj.checks import check_features
from visproj.errors import InputError
from visproj.ops.checks import check_device, check_tensor
from visproj.ops.eager import placed
from visproj.positions import Grid, check_grid, grid_of


class Packed(NamedTuple):
    """The tokens of several images.

    Attributes:
        rows: ``[T, C]``, image after image.
        lengths: Number of rows of each image; their sum is ``T``.
        grids: The grid of each image; empty if the keys have no positions.
    """

    rows: Tensor
    lengths: list[int]
    grids: list[Grid]

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Cut ``[T, ...]`` into images."""
        return rows.split(self.lengths)


class Placed(NamedTuple):
    """Positions of tokens, each the sum of a few vectors that many tokens share.

    Attributes:
        vectors: ``[R, D]``.
        places: int64 ``[K, T]``, the ``K`` vectors of each token.
    """

    vectors: Tensor
    places: Tensor

    def plus(self, vectors: Tensor, places: Tensor) -> Placed:
        """Add to each token one of ``vectors [R', D]``, that at ``places [T]``."""
        further = places[None] + len(self.vectors)
        return Placed(torch.cat([self.vectors, vectors]), torch.cat([self.places, further]))


Positions = Tensor | Placed


def whole(positions: Positions) -> Tensor:
    """Return the positions of all tokens, ``[T, D]``."""
    return positions if isinstance(positions, Tensor) else placed(*positions)


def place(tables: Mapping[Grid, Tensor], grids: Sequence[Grid]) -> Placed:
    """Return the positions of several images as one vector per row and column of each grid.

    Args:
        tables: Of each grid its table ``[h * w, D]``, which is separable; see
            :func:`visproj.positions.position_axes`.
        grids: The grid of each image.
    """
    vectors, places, count = [], {}, 0
    for (h, w), table in tables.items():
        half = table.shape[1] // 2
        cells = table.unflatten(0, (h, w))
        vectors += [F.pad(cells[:, 0, half:], (half, 0)), F.pad(cells[0, :, :half], (0, half))]
        places[h, w] = _cells(h, w, table.device) + count
        count += h + w
    return Placed(torch.cat(vectors), torch.cat([places[grid] for grid in grids], 1))


@lru_cache(maxsize=256)
def _cells(h: int, w: int, device: torch.device) -> Tensor:
    """Return the numbers ``[2, h * w]`` of each cell's row, and of its column after all rows."""
    with torch.inference_mode(False):
        rows, columns = torch.arange(h + w, device=device).split([h, w])
        return torch.stack([rows.repeat_interleave(w), columns.repeat(h)])


def pack(
    features: Tensor | Sequence[Tensor],
    cu_seqlens: Tensor | None,
    grids: Sequence[Grid | None] | None,
    *,
    width: int,
    has_cls: bool,
    positioned: bool,
) -> Packed:
    """Check a batch of images and concatenate their tokens, without CLS.

    Args:
        features: A list of ``[L_i, C]``, or ``[T, C]`` with ``cu_seqlens``.
        cu_seqlens: int32 ``[B + 1]``: the first row of each image, then ``T``. While
            ``torch.compile`` traces it is not read, and the lengths are those of the grids.
        grids: Rows and columns of each image. ``None``, for all images or for one, means a square.
        width: Width ``C`` of the features.
        has_cls: Whether each image starts with a CLS token, which is dropped.
        positioned: Whether the keys have positions, so that every image needs a grid.

    Raises:
        TypeError: If features are not floating point, or ``cu_seqlens`` is not int32.
        ValueError: If shapes, devices, lengths and grids do not fit one another.
    """
    if cu_seqlens is None:
        images = list(features)
    elif torch.compiler.is_compiling():
        images = _cut_unread(features, grids, has_cls)
    else:
        images = _cut(features, cu_seqlens)
    for index, image in enumerate(images):
        check_features(image, width)
        if image.ndim != 2:
            raise InputError(f"image {index} must be [L, {width}], got shape {list(image.shape)}")
        if image.device != images[0].device or image.dtype != images[0].dtype:
            raise InputError(
                f"image {index} is {image.dtype} on {image.device}, image 0 is "
                f"{images[0].dtype} on {images[0].device}"
            )
    wanted: list[Grid | None] = [None] * len(images) if grids is None else list(grids)
    if len(wanted) != len(images):
        raise InputError(f"there are {len(images)} images, but {len(wanted)} grids")
    if not images:
        raise InputError("there are no images: a packed batch needs at least one")
    images = [image[1:] for image in images] if has_cls else images
    lengths = [image.shape[0] for image in images]
    found = []
    for index, (length, grid) in enumerate(zip(lengths, wanted, strict=True)):
        if positioned or grid is not None or not length:
            try:
                found.append(grid_of(length, grid))
            except InputError as error:
                raise InputError(f"image {index}: {error}") from error
    rows = torch.cat(images) if has_cls or cu_seqlens is None else features
    assert isinstance(rows, Tensor)
    return Packed(rows, lengths, found if positioned else [])


def _cut_unread(
    features: Tensor | Sequence[Tensor], grids: Sequence[Grid | None] | None, has_cls: bool
) -> list[Tensor]:
    """Cut ``[T, C]`` into images by their grids, while a compiler traces and reads no values."""
    check_tensor("features", features)
    assert isinstance(features, Tensor)
    if grids is None or None in grids:
        raise InputError("cu_seqlens is not read while compiling: pass the grid of every image")
    return list(features.split([math.prod(grid) + has_cls for grid in grids if grid is not None]))


def _cut(features: Tensor | Sequence[Tensor], cu_seqlens: Tensor) -> list[Tensor]:
    """Cut ``[T, C]`` into images, which start at the rows in ``cu_seqlens``."""
    check_tensor("features", features)
    check_tensor("cu_seqlens", cu_seqlens)
    assert isinstance(features, Tensor)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or not len(cu_seqlens):
        raise InputError(f"cu_seqlens must be [B + 1], got shape {list(cu_seqlens.shape)}")
    if features.ndim != 2:
        raise InputError(
            f"with cu_seqlens, features must be [T, C], got shape {list(features.shape)}"
        )
    if cu_seqlens.device.type != "cpu":
        check_device("cu_seqlens", cu_seqlens, "features", features)
    starts = cu_seqlens.tolist()  # waits for the device once
    lengths = [end - start for start, end in pairwise(starts)]
    if starts[0] or starts[-1] != len(features) or any(length < 0 for length in lengths):
        raise InputError(
            f"cu_seqlens must rise from 0 to the {len(features)} rows of the features, got "
            f"{starts if len(starts) < 20 else [*starts[:10], '...', *starts[-5:]]}"
        )
    return list(features.split(lengths))


def read_grids(sizes: Tensor | Sequence[Grid], batch: int, length: int) -> list[Grid]:
    """Return grids, given as ``[B, 2]`` rows and columns, of images padded to ``length`` tokens.

    Raises:
        ValueError: If there are not ``batch`` of them, or one is not two positive integers or has
            more than ``length`` cells.
    """
    if isinstance(sizes, Tensor):
        if sizes.ndim != 2 or sizes.shape[1] != 2:
            raise InputError(f"sizes must be [B, 2], got shape {list(sizes.shape)}")
        sizes = sizes.tolist()  # waits for the device once
    if len(sizes) != batch:
        raise InputError(f"there are {batch} images, but {len(sizes)} sizes")
    grids = []
    for index, size in enumerate(sizes):
        try:
            grids.append(check_grid(size))
        except InputError as error:
            raise InputError(f"image {index}: {error}") from error
        if math.prod(grids[-1]) > length:
            raise InputError(
                f"image {index} cannot have a {size[0]}x{size[1]} grid: there are {length} tokens"
            )
    return grids
