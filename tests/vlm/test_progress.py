import re
from dataclasses import replace
from io import StringIO

from rich.console import Console
from vlm.training_models import REPORT

from visproj.vlm.loop import Step, TrainingRun
from visproj.vlm.progress import TrainingProgress, render_report


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
