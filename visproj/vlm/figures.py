"""Figures of the demo, of chat and of training, drawn without matplotlib's global state."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image

from visproj.files import replacing
from visproj.positions import resize_position_table, sincos_position_table

Cell = tuple[int, int]
NAME = 40  # characters of a name that a title shows: the last ones
WORDS = 12  # panels of `answer_attention_figure` beside the photograph


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as a PNG whose bytes depend on the figure alone, and return its path.

    If writing fails, a picture that already exists at ``path`` stays as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), replacing(path) as partial:
        # Models write in any script: characters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(partial, format="png", dpi=120, metadata={"Software": None})
    return path


def _title(figure: Figure, text: str, *names: str) -> None:
    """Set the title: ``text`` with names of files and models, shortened and made printable."""
    drawn = ("".join(c if c.isprintable() else "?" for c in name) for name in names)
    shown = (name if len(name) <= NAME else f"…{name[1 - NAME :]}" for name in drawn)
    figure.suptitle(text.format(*shown), parse_math=False)


def pca_colours(features: torch.Tensor) -> np.ndarray:
    """Turn the first three principal components of patch features into RGB colours.

    The components are those of all ``N * S`` patches together, so one colour means the same thing
    in every photograph. Each component is scaled to put its 2nd percentile at 0 and its 98th at 1.

    Args:
        features: Patch features without CLS, ``[N, S, C]``.

    Returns:
        fp64 ``[N, S, 3]`` between 0 and 1.
    """
    flat = features.flatten(0, 1).double()
    centred = flat - flat.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:3]
    # The sign of a principal axis is arbitrary: make its largest entry positive.
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    scores = centred @ (axes * largest.sign()).T  # [N * S, 3]
    low, high = torch.quantile(scores, torch.tensor([0.02, 0.98], dtype=scores.dtype), dim=0)
    span = (high - low).clamp(min=torch.finfo(scores.dtype).tiny)
    colours = ((scores - low) / span).clamp(0, 1)
    return colours.unflatten(0, features.shape[:2]).numpy()


def features_figure(
    photo: Image.Image, colours: np.ndarray, grid: Cell, encoder: str, name: str
) -> Figure:
    """Draw a photograph beside the principal components of its patch features.

    Args:
        photo: Crop that the encoder saw.
        colours: Colours of its patches from :func:`pca_colours`, ``[S, 3]``.
        grid: Rows and columns of patches, ``h * w = S``.
        encoder: Name of the encoder, for the title.
        name: File name of the photograph, for the title.
    """
    figure = Figure(figsize=(9, 5.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    _title(figure, "Patch features of {} for {}", encoder, name)
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
        "similar colours mean similar features.",
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
    """Draw the cosine similarity of all positions to a few, before and after resizing the table.

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
    name: str,
    *,
    query_grid: Cell = (16, 16),
    cells: Sequence[Cell] = ((4, 4), (4, 11), (11, 4), (11, 11)),
) -> Figure:
    """Draw the attention of a few queries of an untrained Perceiver over a photograph.

    Args:
        photo: Crop that the encoder saw.
        maps: Attention of every head, ``[heads, Q, L]``; each row adds up to 1.
        grid: Rows and columns of patches, ``h * w = L``.
        name: File name of the photograph, for the title.
        query_grid: Rows and columns of queries.
        cells: Row and column of each query to draw.
    """
    rows = [y * query_grid[1] + x for y, x in cells]
    # In units of uniform attention, which gives each of the L keys 1 / L.
    weights = (maps.double().mean(0)[rows] * maps.shape[-1]).reshape(len(cells), *grid).numpy()
    scale = Normalize(float(weights.min()), float(weights.max()))
    extent = (0, photo.width, photo.height, 0)
    figure = Figure(figsize=(14, 3.7), layout="constrained")
    axes = figure.subplots(1, len(cells) + 1)
    _title(
        figure,
        "{}: attention of an untrained Perceiver (random initialisation), mean over heads",
        name,
    )
    axes[0].imshow(photo, extent=extent)
    axes[0].set_title("photograph")
    for axis, (y, x), weight in zip(axes[1:], cells, weights, strict=True):
        overlay = _overlay(axis, photo, weight, scale)
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
        f"Queries by row and column of their {query_grid[0]} x {query_grid[1]} grid; the circle "
        "marks the query's position. The projector is untrained: the pattern comes only from "
        "positions and features.",
        fontsize="small",
    )
    return figure


def answer_attention_figure(
    photo: Image.Image,
    words: Sequence[str],
    weights: torch.Tensor,
    grid: Cell,
    kind: str,
    name: str,
) -> Figure:
    """Draw a language model's attention over a photograph for the first words of an answer.

    Args:
        photo: Crop that the encoder saw.
        words: Words of the answer, at least one; the first 12 are drawn.
        weights: Attention of each word, ``[words, L]``; each row adds up to 1.
        grid: Rows and columns of patches, ``h * w = L``.
        kind: Kind of projector, for the caption.
        name: File name of the photograph, for the title.
    """
    shown = words[:WORDS]
    # In units of uniform attention, as above.
    maps = (weights[: len(shown)].double() * weights.shape[-1]).reshape(-1, *grid).numpy()
    # A few patches get most of the attention whatever the word: clip them to the top of the scale.
    scale = Normalize(float(maps.min()), float(np.quantile(maps, 0.98)), clip=True)
    columns = min(5, len(shown) + 1)
    rows = -(-(len(shown) + 1) // columns)
    figure = Figure(figsize=(max(8, 2.8 * columns), 2.7 * rows + 1), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    first, *others = axes.flat
    _title(figure, "Where the language model looked in {} as it wrote each word", name)
    first.imshow(photo, extent=(0, photo.width, photo.height, 0))
    first.set_title("photograph")
    for axis, word, weight in zip(others, shown, maps, strict=False):
        overlay = _overlay(axis, photo, weight, scale)
        axis.set_title(word if len(word) <= 20 else f"{word[:19]}…", parse_math=False)
    for axis in others[len(shown) :]:
        axis.set_axis_off()
    for axis in axes.flat[max(0, len(shown) + 1 - columns) : len(shown) + 1]:
        axis.set_xlabel("x (pixels)")
    for axis in axes[:, 0]:
        axis.set_ylabel("y (pixels)")
    label = "attention weight\n(1 = even spread)"
    figure.colorbar(overlay, ax=axes, label=label, shrink=0.8, extend="max")
    figure.supxlabel(_answer_caption(kind, len(shown), len(words)), fontsize="small")
    return figure


def _answer_caption(kind: str, shown: int, words: int) -> str:
    carried = (
        "mapped to the patches by the Perceiver's own attention"
        if kind == "perceiver"
        else f"of which the {kind} projector makes one per patch"
    )
    left_out = f"\nThe first {shown} of {words} words." if shown < words else ""
    return (
        "Attention to the visual tokens, mean over layers, heads and a word's tokens,\n"
        f"{carried}.{left_out}"
    )


def _overlay(axis: Axes, photo: Image.Image, weight: np.ndarray, scale: Normalize) -> AxesImage:
    """Draw a map over a grey photograph, both in the photograph's pixels."""
    extent = (0, photo.width, photo.height, 0)
    axis.imshow(photo.convert("L"), cmap="gray", extent=extent)
    return axis.imshow(
        weight, cmap="inferno", norm=scale, alpha=0.65, extent=extent, interpolation="bicubic"
    )


def loss_figure(
    training: Sequence[tuple[float, float]], held_out: Sequence[tuple[float, float]], kind: str
) -> Figure:
    """Draw the loss over a training run.

    Args:
        training: Optimiser step and loss in nats per token of the training views.
        held_out: Optimiser step and loss in nats per token of the held-out views.
        kind: Kind of projector, for the title.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        *zip(*training, strict=True), linewidth=1, alpha=0.6, label="training views, per step"
    )
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", label="held-out views")
        half = held_out[0][1] / 2
        axes.axhline(
            half, color="gray", linestyle=":", label="half of the untrained projector's loss"
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("loss (nats per caption token)")
    axes.set_title(f"Training a {kind} projector between two frozen models")
    axes.legend()
    return figure
