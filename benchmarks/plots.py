"""Plots of a result file, drawn from its rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.cases import BASELINES, IMPLEMENTATIONS
from benchmarks.results import Results, Row
from visproj.files import replacing

# Limits that keep a picture readable, and the number of pictures of one kind small.
MOST_BARS = 60
MOST_PICTURES = 4
PANELS_IN_A_ROW = 3


@dataclass(frozen=True)
class Quantity:
    """A quantity that the bars of a picture show.

    Attributes:
        name: Start of the file's name.
        title: Name of the quantity in the picture's title.
        label: Label of the axis, with the unit.
        value: Returns the value of a row, or ``None`` if it has none.
        form: Format of the number beside a bar.
        spread: Returns the 20th and the 80th percentile of a row's value.
        mark: Position of a line and its meaning.
        limited: Whether values beyond the mark mean that the mark is wrong.
    """

    name: str
    title: str
    label: str
    value: Callable[[Row], float | None]
    form: str
    spread: Callable[[Row], tuple[float, float]] | None = None
    mark: tuple[float, str] | None = None
    limited: bool = False


def _speed_up(baseline: str) -> Quantity:
    return Quantity(
        f"speed_up_over_{baseline}",
        f"speed-up over {baseline}",
        f"time of {baseline} / time of the implementation, median of pairs",
        lambda row: getattr(row, f"vs_{baseline}"),
        ".2f",
        spread=lambda row: (
            getattr(row, f"vs_{baseline}_p20"),
            getattr(row, f"vs_{baseline}_p80"),
        ),
        mark=(1.0, f"as fast as {baseline}"),
    )


QUANTITIES = (
    *map(_speed_up, BASELINES),
    Quantity(
        "share_of_floor",
        "share of the floor",
        "floor (model, at this machine's measured ceilings) / measured time, %",
        lambda row: None if (share := row.share_of_model_floor) is None else 100 * share,
        ".0f",
        mark=(100.0, "floor"),
        limited=True,
    ),
    Quantity(
        "memory",
        "peak memory",
        "peak memory of a call above weights and inputs, MiB",
        lambda row: row.peak_mib,
        ".1f",
    ),
)


def draw(results: Results, folder: Path) -> list[Path]:
    """Write every plot for which there is data, and return their paths.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    timed = [row for row in results.rows if row.time_us is not None]
    device = results.notes.get("device", "unknown device")
    colours = _colours(timed)
    drawn: list[Path] = []
    for quantity in QUANTITIES:
        for task in dict.fromkeys(row.task for row in timed):
            rows = [r for r in timed if r.task == task and quantity.value(r) is not None]
            for number, (range_shown, shown) in enumerate(_parts(rows), 1):
                title = f"{task}: {quantity.title}, {range_shown}\n{device}"
                name = f"{quantity.name}_{task}" + (f"_{number}" if number > 1 else "")
                figure = _bars(quantity, shown, colours, title)
                drawn.append(_save(figure, folder / f"{name}.png"))
    if figure := _time_by_batch(timed, colours, device):
        drawn.append(_save(figure, folder / "time_by_batch.png"))
    return drawn


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """Return a colour for every implementation, the same in all pictures."""
    names = [*(entry.name for entry in IMPLEMENTATIONS), *(row.implementation for row in rows)]
    return {name: f"C{index}" for index, name in enumerate(dict.fromkeys(names))}


def _parts(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield the rows of each picture, mode by mode, and a text that says which rows they are."""
    modes = [*dict.fromkeys(row.mode for row in rows)]
    ordered = sorted(rows, key=lambda row: modes.index(row.mode))
    most = MOST_BARS * MOST_PICTURES
    rest = "; the others are only in results.csv" if len(rows) > most else ""
    for start in range(0, min(len(rows), most), MOST_BARS):
        shown = ordered[start : min(start + MOST_BARS, most)]
        last = start + len(shown)
        range_shown = f"rows {start + 1} to {last} of {len(rows)}{rest}"
        yield f"all {len(rows)} rows" if len(shown) == len(rows) else range_shown, shown


def _bars(quantity: Quantity, rows: Sequence[Row], colours: dict[str, str], title: str) -> Any:
    """Draw one panel per mode and one horizontal bar per row."""
    from matplotlib import pyplot as plt

    panels = [(mode, list(group)) for mode, group in groupby(rows, lambda row: row.mode)]
    figure, grid = plt.subplots(
        len(panels),
        1,
        figsize=(10, 1.6 + 0.6 * len(panels) + 0.22 * len(rows)),
        layout="constrained",
        squeeze=False,
        sharex=True,
        height_ratios=[1 + len(group) for _, group in panels],
    )
    for axes, (mode, group) in zip(grid[:, 0], panels, strict=True):
        _panel(axes, quantity, group, colours)
        axes.set_title(mode, fontsize=10, loc="left")
    longest = max(_reach(quantity, row) for row in rows)
    grid[0, 0].set_xlim(0, 1.15 * max(longest, quantity.mark[0] if quantity.mark else 0) or 1)
    grid[-1, 0].set_xlabel(quantity.label)
    figure.suptitle(title, fontsize=11)
    handles, labels = _legend(quantity, rows, colours)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    return figure


def _panel(axes: Any, quantity: Quantity, rows: Sequence[Row], colours: dict[str, str]) -> None:
    for y, row in enumerate(rows):
        value = quantity.value(row) or 0.0
        hatch = "////" if _beyond(quantity, row) else None
        colour = colours[row.implementation]
        axes.barh(y, value, color=colour, hatch=hatch, edgecolor="white" if hatch else colour)
        if quantity.spread:
            axes.plot(quantity.spread(row), (y, y), color="black", linewidth=1)
        text = format(value, quantity.form)
        axes.text(_reach(quantity, row), y, f" {text}", va="center", fontsize=8)
    if quantity.mark:
        axes.axvline(quantity.mark[0], color="black", linewidth=0.8, linestyle="--")
    labels, above = [], None
    for row in rows:
        labels.append(
            row.implementation if row.shape == above else f"{row.shape}   " + row.implementation
        )
        above = row.shape
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _reach(quantity: Quantity, row: Row) -> float:
    """Return where a row's bar, or the line over it, ends."""
    value = quantity.value(row) or 0.0
    return max(value, *quantity.spread(row)) if quantity.spread else value


def _beyond(quantity: Quantity, row: Row) -> bool:
    value = quantity.value(row)
    return bool(quantity.limited and quantity.mark and value and value > quantity.mark[0])


def _legend(
    quantity: Quantity, rows: Sequence[Row], colours: dict[str, str]
) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = [*dict.fromkeys(row.implementation for row in rows)]
    entries: list[tuple[Any, str]] = [(Patch(color=colours[name]), name) for name in names]
    if quantity.spread:
        entries.append((Line2D([], [], color="black", linewidth=1), "20th to 80th percentile"))
    if quantity.mark:
        line = Line2D([], [], color="black", linewidth=0.8, linestyle="--")
        entries.append((line, quantity.mark[1]))
    if any(_beyond(quantity, row) for row in rows):
        patch = Patch(facecolor="grey", edgecolor="white", hatch="////")
        entries.append((patch, "above 100 %: the measured floor is not a lower bound there"))
    handles, labels = zip(*entries, strict=True)
    return list(handles), list(labels)


def _time_by_batch(rows: Sequence[Row], colours: dict[str, str], device: str) -> Any:
    """Draw forward time against batch size per task, at the shape with the most batch sizes."""
    from matplotlib import pyplot as plt

    chosen = _widest(rows)
    if not chosen:
        return None
    columns = min(PANELS_IN_A_ROW, len(chosen))
    lines_of_panels = -(-len(chosen) // columns)
    figure, panels = plt.subplots(
        lines_of_panels,
        columns,
        figsize=(5 * columns, 1 + 3.8 * lines_of_panels),
        layout="constrained",
        squeeze=False,
    )
    for axes in panels.flat[len(chosen) :]:
        axes.set_visible(False)
    for axes, (task, (place, lines)) in zip(panels.flat, chosen.items(), strict=False):
        for name, points in lines.items():
            points = sorted(points, key=lambda row: row.batch)
            times = [(row.time_us or 0.0) / 1e3 for row in points]
            batches = [row.batch for row in points]
            axes.plot(batches, times, marker="o", label=name, color=colours[name])
        axes.set_xticks(sorted({row.batch for points in lines.values() for row in points}))
        axes.set(xlabel="images per call", ylabel="forward, ms")
        axes.set(xlim=(0, 1.05 * axes.get_xlim()[1]), ylim=(0, None))
        axes.set_title(f"{task}\n{place}", fontsize=10)
        axes.legend(fontsize=9)
    figure.suptitle(f"time by batch size\n{device}", fontsize=11)
    return figure


def _widest(rows: Sequence[Row]) -> dict[str, tuple[str, dict[str, list[Row]]]]:
    """Return by task the shape with the most batch sizes, and its rows by implementation."""
    places: dict[str, dict[str, dict[str, list[Row]]]] = {}
    for row in rows:
        if row.mode == "forward":
            place = f"{row.encoder}, D {row.lang_dim}, {row.dtype}"
            lines = places.setdefault(row.task, {}).setdefault(place, {})
            lines.setdefault(row.implementation, []).append(row)
    chosen = {}
    for task, found in places.items():
        place = max(found, key=lambda name: max(map(len, found[name].values())))
        if max(map(len, found[place].values())) > 1:
            others = f" (1 of {len(found)} shapes)" if len(found) > 1 else ""
            chosen[task] = place + others, found[place]
    return chosen


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
    return path
