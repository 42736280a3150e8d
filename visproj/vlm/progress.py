"""What ``visproj train`` shows while it runs and at its end."""

from __future__ import annotations

import statistics
import time
from datetime import timedelta
from types import TracebackType

from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from visproj.vlm.loop import Step, TrainingRun
from visproj.vlm.training import TrainingReport


class TrainingProgress:
    """One bar at a time, for ``run_training``'s callbacks; training shows loss and images/s.

    Where the console is not a terminal, it gets a plain line every 10 s instead, from then on one
    as each stage begins, and one when the training is complete.
    """

    SECONDS = 10.0  # between two plain lines

    def __init__(self, console: Console) -> None:
        self._console = console
        self._plain = not console.is_terminal or console.is_dumb_terminal
        self._printed = time.monotonic()
        self._long = False  # enough for a first line
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            speed_estimate_period=600,  # seconds: a step may take a minute
        )
        self._task = self._bars.add_task("reading the data", total=None, note="")

    def __enter__(self) -> TrainingProgress:
        if not self._plain:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._plain:
            return
        if kind is None:
            self._bars.stop()
        else:
            self._bars.live.transient = True  # what went wrong is told in a line of its own
            self._bars.live.stop()

    def stage(self, name: str, total: int) -> None:
        """Begin a stage; ``total`` 0 means unknown."""
        self._bars.stop_task(self._task)
        self._task = self._bars.add_task(name, total=total or None, note="")
        self._print_line(at_once=self._long)

    def advance(self) -> None:
        """One part of the stage is done."""
        self._bars.advance(self._task)
        self._print_line()

    def on_step(self, step: Step, run: TrainingRun) -> None:
        """One optimiser step is done."""
        loss, speed = (
            statistics.mean(values)
            for values in zip(
                *((row.loss, row.images_per_second) for row in run.steps[-10:]), strict=True
            )
        )
        note = f"loss {loss:.3f}, {speed:.2f} images/s"
        if run.held_out:
            note += f", held-out {run.held_out[-1][1]:.3f}"
        self._bars.update(self._task, completed=step.step, total=run.total, note=note)
        self._print_line(at_once=step.step == run.total)

    def _print_line(self, at_once: bool = False) -> None:
        """Where there are no bars, print the task's state unless there was a line just now."""
        now = time.monotonic()
        if not self._plain or (now - self._printed < self.SECONDS and not at_once):
            return
        self._printed, self._long = now, True
        (task,) = (task for task in self._bars.tasks if task.id == self._task)
        line = task.description
        if task.completed and task.total:
            line += f": {task.completed:.0f}/{task.total:.0f}"
        if task.fields["note"]:
            line += f", {task.fields['note']}"
        if task.time_remaining:
            line += f", {timedelta(seconds=round(task.time_remaining))} left"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def render_report(report: TrainingReport, kind: str) -> Group:
    """The table at the end of a run."""
    found = report.retrieval
    change = report.trained_loss / report.untrained_loss - 1
    low, high = (f"{100 * bound:.1f}" for bound in found.interval)
    table = Table(title=f"{kind} projector", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("measured on held-out views")
    table.add_column("", justify="right")
    rows = {
        "photographs, training views, held-out views": (
            f"{report.photographs}, {report.training_views}, {found.views}"
        ),
        "trained parameters": f"{report.parameters:,}",
        "loss of the captions, untrained": f"{report.untrained_loss:.3f}",
        "loss of the captions, trained": f"{report.trained_loss:.3f} ({100 * change:+.1f} %)",
        f"best of {found.captions} captions is the photograph's own": f"{100 * found.rate:.1f} %",
        "the same with photographs permuted": f"{100 * found.control:.1f} %",
        "95 % of such controls by chance": f"{low} to {high} %",
    }
    if report.peak_mib is not None:
        rows["peak memory"] = f"{report.peak_mib:.0f} MiB"
    for name, value in rows.items():
        table.add_row(name, value)
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report.seconds.items())
    total = sum(report.seconds.values())
    return Group(table, f"{total / 60:.1f} minutes: {stages}")
