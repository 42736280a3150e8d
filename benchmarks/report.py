"""Run a set of cases and report: ``python -m benchmarks.report --set smoke --out results``.

Writes ``results.csv``, ``report.md`` and plots. Report and plots are made from the CSV alone, so
``--from-csv`` can make them again on another machine.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import suite
from benchmarks.cases import SETS, Group, groups
from benchmarks.ceilings import Ceilings
from benchmarks.command import Parser, check_folder, finite, run_command
from benchmarks.results import (
    FAILED,
    LEFT_OUT,
    Change,
    Results,
    Row,
    Writer,
    compare,
    machine_notes,
    read,
)
from visproj.errors import BackendError, InputError
from visproj.files import replacing

ENDED_EARLY = "ended early"
EXPLANATION = """\
Times are medians with the 20th and 80th percentile. "upstream / it" and "fair / it" are the time of
that baseline divided by the time of the implementation. These ratios come from pairs: the
implementations of a group run in turn, so that whatever slows the machine down slows both of a
pair. *upstream* is DeepSpeed-VisualChat's arithmetic, *fair* the same formula with SDPA and queries
prepared once per call; for `baseline`, `linear_layer_norm` and `linear_norm_linear` the two are the
same. Peak memory is that of one call above weights and inputs.

**Columns headed "model" are counted and computed, not measured.** The floor is a lower bound on the
time: the larger of the row's FLOPs at this machine's best matmul rate, and its minimum traffic at
this machine's best memory rate for a working set of that size. Both rates are measured next to
every group. "share of floor (model)" is the floor divided by the measured time.

Every implementation was compared with the fp64 oracle before it was timed, at the shape that was
timed: the outputs and, if it trains, all gradients for a random gradient of the output. The whole
batch ran; if fp64 is slow, only some of its images were compared ("images checked")."""


def run(
    set_name: str,
    path: Path,
    *,
    device: torch.device,
    seconds: float,
    minutes: float | None,
    graphs: bool = False,
) -> bool:
    """Measure a set, write the CSV file, and return whether the whole set was measured.

    Args:
        set_name: One of the registry's sets.
        path: The CSV file.
        device: Device to run on.
        seconds: Time for a group in one mode, s.
        minutes: When to stop starting new groups, min; ``None`` for never.
        graphs: Whether to time forwards from CUDA graphs as well.
    """
    todo = groups(set_name)
    ceilings = Ceilings(device)
    notes = {"set": set_name, **machine_notes(device)}
    done = 0
    with Writer(path, notes) as writer:
        try:
            print("measuring the machine's peak rates", flush=True)
            ceilings.measure(dict.fromkeys(group.shape.dtype for group in todo))
            start = time.monotonic()
            for group in progress(todo):
                if minutes is not None and time.monotonic() - start > 60 * minutes:
                    break
                try:
                    for rows in suite.measured(
                        group, device, ceilings, seconds=seconds, graphs=graphs
                    ):
                        writer.write(rows)
                except Exception as error:  # such as no memory for the oracle: others may fit
                    name = f"{group.task.name} {group.shape} {ENDED_EARLY}"
                    writer.note(name, f"{type(error).__name__}: {error}"[:200])
                else:
                    done += 1
        except KeyboardInterrupt:
            print("\nstopped: what was measured is kept", flush=True)
        for name, text in ceilings.notes().items():
            writer.note(name, text)
        if done < len(todo):
            writer.note("stopped early", f"{done} of {len(todo)} groups")
    return done == len(todo)


def progress(todo: Sequence[Group]) -> Iterator[Group]:
    """Yield the groups, with a progress bar, or a line per group if rich is not installed."""
    try:
        from rich.progress import Progress
    except ModuleNotFoundError:
        for number, group in enumerate(todo, 1):
            print(f"{number}/{len(todo)} {group.task.name} {group.shape}", flush=True)
            yield group
        return
    with Progress() as bar:
        task = bar.add_task("", total=len(todo))
        for group in todo:
            bar.update(task, description=f"{group.task.name} {group.shape}")
            yield group
            bar.advance(task)


def markdown(results: Results, old: Results | None = None, pictures: Sequence[Path] = ()) -> str:
    """Return the report of a result file."""
    parts = ["# Benchmark report", "\n".join(f"- {k}: {v}" for k, v in results.notes.items())]
    if old:
        parts += ["## Changes", *_changes(old, results)]
    parts += ["## How to read this", EXPLANATION]
    failed = [row for row in results.rows if row.status == FAILED]
    if failed:
        listed = [(row.task, row.implementation, row.shape, row.mode, row.reason) for row in failed]
        parts += [
            "## Failed: no time",
            table(("task", "implementation", "shape", "mode", "why"), listed),
        ]
    parts += ["## Measured", *(list(_measured(results.rows)) or ["Nothing was timed."])]
    reasons = sorted({(r.task, r.implementation, r.dtype, r.reason) for r in _left_out(results)})
    if reasons:
        parts += ["## Left out", table(("task", "implementation", "dtype", "why"), reasons)]
    if pictures:
        parts += ["## Plots", *(f"![{path.stem}]({path.name})" for path in pictures)]
    return "\n\n".join(parts) + "\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _left_out(results: Results) -> list[Row]:
    return [row for row in results.rows if row.status == LEFT_OUT]


def _measured(rows: Sequence[Row]) -> Iterator[str]:
    """Yield one table per task and mode."""
    timed = [row for row in rows if row.time_us is not None]
    heads = (
        "shape",
        "implementation",
        "time, ms",
        "upstream / it",
        "fair / it",
        "peak, MiB",
        "launches",
        "kernels, µs",
        "output error",
        "gradient error",
        "images checked",
        "GFLOP (model)",
        "launches (model)",
        "share of floor (model)",
    )
    beyond = sum(row.beats_floor for row in timed)
    if beyond:
        yield (
            f"{beyond} of {len(timed)} rows are faster than their floor (marked *): its rates were "
            "measured while the machine was slower, so for them it is not a lower bound."
        )
    for task, mode in dict.fromkeys((row.task, row.mode) for row in timed):
        yield f"### {task}, {mode}"
        yield table(
            heads,
            [
                (
                    row.shape,
                    row.implementation,
                    _spread(row.time_us, row.time_us_p20, row.time_us_p80, ".3g", 1e-3),
                    _spread(row.vs_upstream, row.vs_upstream_p20, row.vs_upstream_p80, ".2f"),
                    _spread(row.vs_fair, row.vs_fair_p20, row.vs_fair_p80, ".2f"),
                    _number(row.peak_mib, ".1f"),
                    _number(row.launches, "d"),
                    _number(row.kernel_us, ".1f"),
                    _number(row.output_error, ".0e"),
                    _number(row.gradient_error, ".0e"),
                    f"{_number(row.checked_images, 'd')} of {row.batch}",
                    _number(row.model_gflop, ".3g"),
                    _number(row.model_launches, "d"),
                    _number(row.share_of_model_floor, ".0%") + "*" * row.beats_floor,
                )
                for row in timed
                if (row.task, row.mode) == (task, mode)
            ],
        )


def _changes(old: Results, new: Results) -> Iterator[str]:
    changes = compare(old, new)
    yardstick = sorted(c.time for c in changes if c.change is None)
    was, now = (results.notes.get("device", "unknown") for results in (old, new))
    other_device = "" if was == now else f", another device than {now}"
    yield (
        f"Compared with commit {old.notes.get('commit', 'unknown')} on {was}{other_device}: "
        f"{len(changes)} rows were timed in both runs."
    )
    if not changes:
        return
    if yardstick:
        yield (
            "Changes are those of the ratio to the fair baseline, whose code does not change. Its "
            f"own times differ by {statistics.median(yardstick):+.1%} ({yardstick[0]:+.1%} to "
            f"{yardstick[-1]:+.1%}), which is due to the machine."
        )
    beyond = [change for change in changes if change.beyond]
    if not beyond:
        yield "No row changed by more than its spread."
        return
    heads = ("task", "implementation", "shape", "mode", "against fair", "beyond the spread")
    yield table((*heads, "ms before", "ms now"), [_change_row(change) for change in beyond])


def _change_row(change: Change) -> tuple[str, ...]:
    row = change.new
    return (
        row.task,
        row.implementation,
        row.shape,
        row.mode,
        f"{change.change or 0:+.1%}",
        f"{change.beyond:+.1%}",
        *(_number(r.time_us, ".3g", 1e-3) for r in (change.old, row)),
    )


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else format(value * scale, form)


def _spread(
    median: float | None, p20: float | None, p80: float | None, form: str, scale: float = 1
) -> str:
    if median is None:
        return "-"
    middle, low, high = (_number(value, form, scale) for value in (median, p20, p80))
    return f"{middle} ({low} to {high})"


def write_report(path: Path, old: Results | None) -> str:
    """Draw the plots and write the report from the CSV at ``path``; return the report's text."""
    from benchmarks import plots

    results = read(path)
    try:
        pictures = plots.draw(results, path.parent)
    except ModuleNotFoundError as missing:
        print(f"no plots: {missing}", flush=True)
        pictures = []
    text = markdown(results, old, pictures)
    _write(path.parent / "report.md", text)
    return text


def _write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        InputError: If the name is not cpu, cuda or cuda:N.
        BackendError: If this machine has no such device.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise BackendError(f"--device {name}: PyTorch sees {count} CUDA devices here")
    return device


def _parser() -> Parser:
    parser = Parser("visproj bench", __doc__)
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--set", default="quick" if on_gpu else "smoke", choices=SETS, help="set of cases"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("visproj-bench"), help="folder for the results"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="OLD.csv", help="report changes since this result file"
    )
    parser.add_argument(
        "--from-csv", type=Path, help="do not measure: make the report of this result file"
    )
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--seconds", type=finite(0), default=0.3, help="seconds for a group in one mode"
    )
    parser.add_argument(
        "--minutes",
        type=finite(0, above=True),
        help="minutes after which no new group is started",
    )
    parser.add_argument(
        "--graphs", action="store_true", help="also time the forward from CUDA graphs"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if an implementation failed its check or a group raised, else 0.

    Raises:
        VisprojError: If an option or a file cannot be used, before anything is written.
        OSError: If a file cannot be read or the folder cannot be written to.
    """
    options = _parser().parse_args(arguments)
    device = _device(options.device)
    if options.graphs and device.type != "cuda":
        raise InputError(f"--graphs needs a CUDA device, got --device {options.device}")
    old, done = (path and read(path) for path in (options.compare, options.from_csv))
    check_folder(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.csv"
    if done:
        if options.from_csv.resolve() != path.resolve():
            _write(path, options.from_csv.read_text(encoding="utf-8"))
    else:
        run(
            options.set,
            path,
            device=device,
            seconds=options.seconds,
            minutes=options.minutes,
            graphs=options.graphs,
        )
    write_report(path, old)
    results = read(path)
    failed = sum(row.status == FAILED for row in results.rows)
    failed += sum(note.endswith(ENDED_EARLY) for note in results.notes)
    print(f"{len(results.rows)} rows, {failed} failed: {path}, {options.out / 'report.md'}")
    if old:
        print(*_changes(old, results), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    run_command(main)
