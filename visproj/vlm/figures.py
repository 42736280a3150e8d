"""The demo's pictures. Every function draws one figure and leaves matplotlib's state alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from visproj.positions import resize_position_table, sincos_position_table

Cell = tuple[int, int]


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG whose bytes depend on the figure alone, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path


def pca_colours(features: torch.Tensor) -> np.ndarray:
    """First three principal components as colours, fp64 ``[N, S, 3]`` between 0 and 1.

    The components are those of all ``N * S`` patches together, so one colour means the same thing
    in every photograph. Each is stretched between its 2nd and 98th percentile.

    Args:
        features: Patch features without CLS, ``[N, S, C]``.
    """
    flat = features.flatten(0, 1).double()
    centred = flat - flat.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:3]
    # A principal axis has no sign of its own: let its largest entry be positive.
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    scores = centred @ (axes * largest.sign()).T  # [N * S, 3]
    low, high = torch.quantile(scores, torch.tensor([0.02, 0.98], dtype=scores.dtype), dim=0)
    span = (high - low).clamp(min=torch.finfo(scores.dtype).tiny)
    colours = ((scores - low) / span).clamp(0, 1)
    return colours.unflatten(0, features.shape[:2]).numpy()


def features_figure(photo: Image.Image, colours: np.ndarray, grid: Cell, encoder: str) -> Figure:
    """A photograph beside the principal components of its patch features.

    Args:
        photo: The crop that the encoder saw.
        colours: ``[S, 3]``, one row of :func:`pca_colours`.
        grid: Rows and columns of patches, ``h * w = S``.
        encoder: Its name, for the title.
    """
    figure = Figure(figsize=(9, 5.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(f"What {encoder} tells apart in the photograph")
    left.imshow(photo)
    left.set_title(f"photograph, {photo.width} x {photo.height} pixels")
    left.set_xlabel("x (pixels)")
    left.set_ylabel("y (pixels)")
    right.imshow(colours.reshape(*grid, 3), interpolation="nearest")
    right.set_title(f"patch features, {grid[0]} x {grid[1]} patches")
    right.set_xlabel("patch column")
    right.set_ylabel("patch row")
    figure.supxlabel(
        "Red, green and blue are the first three principal components over all photographs:\n"
        "like colours are like features.",
        fontsize="small",
    )
    return figure


def positions_figure(
    width: int,
    *,
    source: Cell = (16, 16),
    target: Cell = (24, 24),
    cells: Sequence[Cell] = ((2, 2), (8, 8), (11, 3)),
) -> Figure:
    """How alike the Perceiver's positions are to those of a few cells, before and after resizing.

    Args:
        width: Width ``D`` of the table.
        source: Grid of the table.
        target: Grid it is resized to.
        cells: Row and column of each cell on the source grid.
    """
    table = sincos_position_table(width, source)
    figure = Figure(figsize=(10, 7.2), layout="constrained")
    axes = figure.subplots(2, len(cells), squeeze=False)
    figure.suptitle(f"Position table of width {width}: cosine similarity to the marked cell")
    for grid, row in zip((source, target), axes, strict=True):
        resized = table if grid == source else resize_position_table(table, source, grid)
        unit = torch.nn.functional.normalize(resized.double(), dim=-1)  # [h * w, D]
        for axis, cell in zip(row, cells, strict=True):
            y, x = (index * new // old for index, old, new in zip(cell, source, grid, strict=True))
            similarity = (unit @ unit[y * grid[1] + x]).reshape(grid).numpy()
            image = axis.imshow(similarity, cmap="viridis", vmin=0.5, vmax=1)
            axis.plot(x, y, "x", color="red", markersize=9, markeredgewidth=2)
            axis.set_title(f"{grid[0]} x {grid[1]}, row {y}, column {x}")
            axis.set_xlabel("grid column")
            axis.set_ylabel("grid row")
    figure.colorbar(
        image, ax=axes, label="cosine similarity (1 = same position)", shrink=0.8, extend="min"
    )
    figure.supxlabel(
        f"Top: the sine-cosine table. Bottom: the same table resized bicubically to "
        f"{target[0]} x {target[1]} for finer features.",
        fontsize="small",
    )
    return figure


def attention_figure(
    photo: Image.Image,
    maps: torch.Tensor,
    grid: Cell,
    *,
    query_grid: Cell = (16, 16),
    cells: Sequence[Cell] = ((4, 4), (4, 11), (11, 4), (11, 11)),
) -> Figure:
    """Where four queries of an untrained Perceiver look in a photograph.

    Args:
        photo: The crop that the encoder saw.
        maps: Attention of every head, ``[heads, Q, L]``; each row adds up to 1.
        grid: Rows and columns of patches, ``h * w = L``.
        query_grid: Rows and columns of queries.
        cells: Row and column of each query to draw.
    """
    rows = [y * query_grid[1] + x for y, x in cells]
    # In units of an even spread over all patches, which a softmax over L keys makes 1 / L.
    weights = (maps.double().mean(0)[rows] * maps.shape[-1]).reshape(len(cells), *grid).numpy()
    scale = Normalize(float(weights.min()), float(weights.max()))
    extent = (0, photo.width, photo.height, 0)
    figure = Figure(figsize=(14, 3.7), layout="constrained")
    axes = figure.subplots(1, len(cells) + 1)
    figure.suptitle("Attention of an untrained Perceiver (random initialisation), mean over heads")
    axes[0].imshow(photo, extent=extent)
    axes[0].set_title("photograph")
    for axis, (y, x), weight in zip(axes[1:], cells, weights, strict=True):
        axis.imshow(photo.convert("L"), cmap="gray", extent=extent)
        overlay = axis.imshow(
            weight, cmap="inferno", norm=scale, alpha=0.65, extent=extent, interpolation="bicubic"
        )
        centre = (
            (x + 0.5) / query_grid[1] * photo.width,
            (y + 0.5) / query_grid[0] * photo.height,
        )
        axis.plot(*centre, "o", color="cyan", markerfacecolor="none", markeredgewidth=2)
        axis.set_title(f"query ({y}, {x})")
    for axis in axes:
        axis.set_xlabel("x (pixels)")
    axes[0].set_ylabel("y (pixels)")
    figure.colorbar(overlay, ax=axes, label="attention weight\n(1 = even spread)", shrink=0.8)
    figure.supxlabel(
        f"Queries by row and column of their {query_grid[0]} x {query_grid[1]} grid, a circle at "
        "each one's own place. What stands out comes from positions and features alone: nothing "
        "has been learned yet.",
        fontsize="small",
    )
    return figure
