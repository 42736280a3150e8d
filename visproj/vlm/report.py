"""What ``visproj train`` prints at its end."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.table import Table

from visproj.vlm.training import TrainingReport


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
