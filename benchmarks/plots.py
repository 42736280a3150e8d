"""Pictures of a result file, from its rows and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import BASELINES, MODES
from benchmarks.results import Results, Row

# A taller picture would not be read.
MOST_BARS = 40


def draw(results: Results, folder: Path) -> list[Path]:
    """Write every plot for which there is data, and return their paths.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    timed = [row for row in results.rows if row.time_us is not None]
    device = results.notes.get("device", "")
    drawn = [
        *(_speed_ups(timed, baseline, device, folder) for baseline in BASELINES),
        _time_by_batch(timed, device, folder),
        _bars(
            timed,
            lambda row: row.share_of_model_floor,
            "share of the floor (floor: model, at this machine's measured ceilings)",
            device,
            folder / "share_of_floor.png",
        ),
        _bars(
            timed,
            lambda row: row.peak_mib,
            "peak memory of a call above weights and inputs, MiB",
            device,
            folder / "memory.png",
        ),
    ]
    return [path for path in drawn if path]


def _label(row: Row) -> str:
    return f"{row.task} {row.implementation}, {row.shape}, {row.mode}"


def _speed_ups(rows: Sequence[Row], baseline: str, device: str, folder: Path) -> Path | None:
    return _bars(
        rows,
        lambda row: getattr(row, f"vs_{baseline}"),
        f"times faster than {baseline}",
        device,
        folder / f"speed_up_over_{baseline}.png",
        spread=lambda row: (
            getattr(row, f"vs_{baseline}_p20"),
            getattr(row, f"vs_{baseline}_p80"),
        ),
        mark=1.0,
    )


def _bars(
    rows: Sequence[Row],
    value: Callable[[Row], float | None],
    label: str,
    device: str,
    path: Path,
    *,
    spread: Callable[[Row], tuple[float, float]] | None = None,
    mark: float | None = None,
) -> Path | None:
    """One horizontal bar a row, in the order of the file."""
    from matplotlib import pyplot as plt

    shown = [(row, v) for row in rows if (v := value(row)) is not None][:MOST_BARS]
    if not shown:
        return None
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.24 * len(shown)), layout="constrained")
    colours = [f"C{MODES.index(row.mode) if row.mode in MODES else 3}" for row, _ in shown]
    lengths = [v for _, v in shown]
    axes.barh([_label(row) for row, _ in shown], lengths, color=colours)
    if spread:
        for y, (row, _) in enumerate(shown):
            axes.plot(spread(row), (y, y), color="black", linewidth=1)
    if mark is not None:
        axes.axvline(mark, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.set_xlabel(label)
    axes.set_title(device, fontsize=9)
    return _save(figure, path)


def _time_by_batch(rows: Sequence[Row], device: str, folder: Path) -> Path | None:
    """Forward time against batch size, one panel a task, for its widest range of batches."""
    from matplotlib import pyplot as plt

    series: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if row.mode == "forward":
            place = f"{row.encoder}, D {row.lang_dim}, {row.dtype}"
            series.setdefault((row.task, place), {}).setdefault(row.implementation, []).append(row)
    chosen: dict[str, tuple[str, dict[str, list[Row]]]] = {}
    for (task, place), lines in series.items():
        most = max(map(len, lines.values()))
        if most > 1 and (task not in chosen or most > max(map(len, chosen[task][1].values()))):
            chosen[task] = place, lines
    if not chosen:
        return None
    figure, panels = plt.subplots(
        1, len(chosen), figsize=(4 * len(chosen), 3.6), layout="constrained", squeeze=False
    )
    for axes, (task, (place, lines)) in zip(panels[0], chosen.items(), strict=True):
        for implementation, points in lines.items():
            points = sorted(points, key=lambda row: row.batch)
            times = [(row.time_us or 0.0) / 1e3 for row in points]
            axes.plot([row.batch for row in points], times, marker="o", label=implementation)
        axes.set(xlabel="images a call", ylabel="forward, ms", xlim=(0, None), ylim=(0, None))
        axes.set_title(f"{task}: {place}", fontsize=8)
        axes.legend(fontsize=7)
    figure.suptitle(device, fontsize=9)
    return _save(figure, folder / "time_by_batch.png")


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
