"""Progress reports of long calls, and their display on the console."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


class Progress:
    """Receiver of a long call's progress reports; this class ignores them, subclasses show them."""

    def stage(self, name: str, total: int = 0, done: int = 0) -> None:
        """Begin a stage of ``total`` steps (0 if unknown), of which ``done`` are done already."""

    def advance(self, note: str = "") -> None:
        """Finish one step of the stage; ``note`` is shown beside it."""

    def note(self, text: str) -> None:
        """Show a message that stays on the console when the stage ends."""


SILENT = Progress()


class ConsoleProgress(Progress):
    """Progress shown as one bar at a time on a terminal, and as plain lines on other consoles.

    A console that is not a terminal gets at most one line per 10 s. After the first line it also
    gets one when a stage begins and one when a stage with notes ends.

    Args:
        console: Console to print to.
        first: Name of the stage that is running when the ``with`` block begins.
        transient: Whether to erase the bars at the end and to print no plain lines.
    """

    SECONDS = 10.0  # between two plain lines

    def __init__(self, console: Console, first: str, *, transient: bool = False) -> None:
        from rich import progress as bars

        self._console = console
        self._bare = not console.is_terminal or console.is_dumb_terminal
        self._prints = self._bare and not transient
        self._printed = time.monotonic()
        self._long = False  # whether a plain line has been printed
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("{task.fields[note]}", markup=False),
            console=console,
            transient=transient,
            speed_estimate_period=600,  # seconds: a step may take a minute
        )
        self._task = self._bars.add_task(first, total=None, note="")

    def __enter__(self) -> ConsoleProgress:
        if not self._bare:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._bars.live.transient = True  # the error is reported in a line of its own
        self.stop()

    def stop(self) -> None:
        """Stop showing bars, so that other output can be printed."""
        if not self._bare:
            self._bars.stop()

    def stage(self, name: str, total: int = 0, done: int = 0) -> None:
        """Begin a stage."""
        self._bars.stop_task(self._task)
        self._task = self._bars.add_task(name, total=total or None, completed=done, note="")
        self._print_line(at_once=self._long)

    def advance(self, note: str = "") -> None:
        """Finish one step of the stage."""
        self._bars.update(self._task, advance=1, note=note)
        self._print_line(at_once=bool(note) and self._bars.tasks[-1].finished)

    def note(self, text: str) -> None:
        """Print a message on its own line, above the bars."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _print_line(self, at_once: bool = False) -> None:
        """Print the task's state as a plain line; without ``at_once`` at most one per 10 s."""
        now = time.monotonic()
        if not self._prints or (now - self._printed < self.SECONDS and not at_once):
            return
        self._printed, self._long = now, True
        task = self._bars.tasks[-1]
        line = task.description
        if task.completed and task.total:
            line += f": {task.completed:.0f}/{task.total:.0f}"
        if task.fields["note"]:
            line += f", {task.fields['note']}"
        if task.time_remaining:
            line += f", {timedelta(seconds=round(task.time_remaining))} left"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
