import re
import sys
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console
from vlm.training_models import REPORT

from visproj.vlm import progress as progress_module
from visproj.vlm.loop import Step, TrainingRun
from visproj.vlm.progress import TrainingProgress, render_report
from visproj.vlm.training import peak_mib


def rendered(report):
    console = Console(file=StringIO(), width=100)
    console.print(render_report(report, "perceiver"))
    return " ".join(console.file.getvalue().split())


def test_the_printed_report():
    text = rendered(REPORT)
    for part in (
        "perceiver projector",
        "held-out views 3, 48, 18 ",
        "trained parameters 2,240 ",
        "untrained 4.000 ",
        "trained 1.000 (-75.0 %) ",
        "best of 6 captions is the photograph's own 75.0 % ",
        "permuted 25.0 % ",
        "by chance 12.5 to 50.0 % ",
        "peak memory 1234 MiB",
        "2.0 minutes: loading 1 s, encoding 20 s, training 90 s, scoring 9 s",
    ):
        assert part in text
    assert "trained 5.000 (+25.0 %) " in rendered(replace(REPORT, trained_loss=5.0))


def test_the_progress_shows_the_mean_of_the_last_steps():
    console = Console(file=StringIO(), width=120, force_terminal=True)
    steps = [Step(n, 1, float(n), 1e-3, 1.0, 2.0 * n) for n in range(1, 13)]
    with TrainingProgress(console) as progress:
        progress.stage("encoding", 2)
        progress.advance()
        progress.stage("training", 0)
        progress.on_step(steps[0], TrainingRun(steps[:1], [], 12))
        progress.on_step(steps[-1], TrainingRun(steps, [(0, 9.0), (6, 8.5)], 12))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert re.search(r"encoding .* 1/2 ", text)
    # Steps 3 to 12.
    assert re.search(r"training .* 12/12 .* loss 7\.500, 15\.00 images/s, held-out 8\.500", text)


def test_without_a_terminal_a_line_now_and_then(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    console = Console(file=StringIO(), width=40)
    steps = [Step(n, 1, 4.0, 1e-3, 1.0, 2.0) for n in range(1, 101)]
    with TrainingProgress(console) as progress:
        progress.stage("loading", 0)
        now = 12.0
        progress.stage("encoding", 3)
        progress.advance()
        now = 21.0
        progress.advance()
        now = 23.0
        progress.advance()
        progress.stage("training", 0)
        for step in steps:
            now += 4.0
            progress.on_step(step, TrainingRun(steps[: step.step], [(0, 9.0)], 100))
    lines = console.file.getvalue().splitlines()
    assert lines[:3] == ["encoding", "encoding: 3/3", "training"]
    assert len(lines) == 3 + 400 // 12 + 1
    want = r"training: 3/100, loss 4\.000, 2\.00 images/s, held-out 9\.000(, .* left)?"
    assert re.fullmatch(want, lines[3])
    assert lines[-1].startswith("training: 100/100, loss 4.000")


def test_nothing_but_the_error_of_a_short_run(monkeypatch):
    console = Console(file=StringIO())

    def fail():
        with TrainingProgress(console) as progress:
            progress.stage("loading", 0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert console.file.getvalue() == ""


def test_a_system_that_does_not_say_the_memory(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_mib() is None
    assert "peak memory" not in rendered(replace(REPORT, peak_mib=peak_mib()))
