"""One way in which long calls report what they are doing, and how the command line shows it."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


class Progress:
    """Receives what a long call reports; this class ignores it, subclasses show it."""

    def stage(self, name: str, total: int = 0, done: int = 0) -> None:
        """Begin a stage of ``total`` steps, 0 if unknown, of which ``done`` are done already."""

    def advance(self, note: str = "") -> None:
        """Finish one step of the stage; ``note`` is shown beside it."""

    def note(self, text: str) -> None:
        """Say something that stays."""


SILENT = Progress()


class ConsoleProgress(Progress):
    """Show one bar at a time on a terminal, plain lines on any other console.

    A console that is not a terminal gets a line every 10 s. After the first one it gets a line as
    each stage begins, and one as a stage with notes ends.

    Args:
        console: Where it is shown.
        first: Name of the stage that is under way when the block is entered.
        transient: Erase the bars at the end, and print no plain lines.
    """

    SECONDS = 10.0  # between two plain lines

    def __init__(self, console: Console, first: str, *, transient: bool = False) -> None:
        from rich import progress as bars

        self._console = console
        self._bare = not console.is_terminal or console.is_dumb_terminal
        self._prints = self._bare and not transient
        self._printed = time.monotonic()
        self._long = False  # has run long enough for a first line
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
        """Show no more bars, for something else to be printed."""
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
        """Print a line of its own, above the bars."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _print_line(self, at_once: bool = False) -> None:
        """Print the state of the task in a plain line, unless one was printed just now."""
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
