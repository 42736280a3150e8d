"""The report that ``visproj train`` prints at its end, and the time and memory in it."""

from __future__ import annotations

import sys
import time

from rich import box
from rich.console import Group
from rich.table import Table

from visproj.vlm.options import TrainingReport
from visproj.vlm.scoring import Retrieval


def render_report(report: TrainingReport) -> Group:
    """Return the table that is printed at the end of a run."""
    table = Table(title=f"{report.kind} projector", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("measured on held-out samples")
    table.add_column("", justify="right")
    samples = "a stream" if report.samples is None else f"{report.samples:,}"
    rows = {
        "training samples, optimiser steps": f"{samples}, {report.steps:,}",
        "trained parameters, dtype": f"{report.parameters:,}, {report.dtype}",
        **_losses(report),
        **({} if report.retrieval is None else _retrieval(report.retrieval)),
    }
    if report.peak_mib is not None:
        rows["peak memory"] = f"{report.peak_mib:.0f} MiB"
    for name, value in rows.items():
        table.add_row(name, value)
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report.seconds.items())
    total = sum(report.seconds.values())
    return Group(table, f"{total / 60:.1f} minutes: {stages}")


def _losses(report: TrainingReport) -> dict[str, str]:
    before, after = report.untrained_loss, report.trained_loss
    if before is None or after is None:
        return {"loss per token of the answers": "no samples are held out"}
    change = 100 * (after / before - 1)
    return {
        "loss per token of the answers, untrained": f"{before:.3f}",
        "loss per token of the answers, trained": f"{after:.3f} ({change:+.1f} %)",
    }


def _retrieval(found: Retrieval) -> dict[str, str]:
    low, high = (f"{100 * bound:.1f}" for bound in found.interval)
    return {
        f"views whose best of {found.captions} captions is their own": f"{100 * found.rate:.1f} %",
        "control: the same with photographs permuted": f"{100 * found.control:.1f} %",
        "control by chance, 95 % interval": f"{low} to {high} %",
    }


class Clock:
    """Seconds of each stage of a run.

    Attributes:
        laps: Seconds by stage.
    """

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End the stage ``name``, which began when the one before it ended."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def peak_mib() -> float | None:
    """Return the peak resident memory of this process in MiB, ``None`` on Windows."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
