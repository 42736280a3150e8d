import sys
from dataclasses import replace
from io import StringIO

from rich.console import Console
from vlm.training_models import REPORT

from visproj.vlm.report import peak_mib, render_report


def rendered(report):
    console = Console(file=StringIO(), width=100)
    console.print(render_report(report))
    return " ".join(console.file.getvalue().split())


def test_the_printed_report():
    text = rendered(REPORT)
    for part in (
        "baseline projector",
        "training samples, optimiser steps 48, 6 ",
        "trained parameters, dtype 2,240, float32 ",
        "untrained 4.000 ",
        "trained 1.000 (-75.0 %) ",
        "best of 6 captions is their own 75.0 % ",
        "permuted 25.0 % ",
        "by chance, 95 % interval 12.5 to 50.0 % ",
        "peak memory 1234 MiB",
        "2.0 minutes: loading 1 s, reading 20 s, training 90 s, scoring 9 s",
    ):
        assert part in text
    assert "trained 5.000 (+25.0 %) " in rendered(replace(REPORT, trained_loss=5.0))


def test_what_was_not_measured():
    bare = replace(REPORT, samples=None, untrained_loss=None, trained_loss=None, retrieval=None)
    text = rendered(bare)
    assert "optimiser steps a stream, 6" in text
    assert "loss per token of the answers no samples are held out" in text
    assert "captions" not in text


def test_a_system_that_does_not_say_the_memory(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_mib() is None
    assert "peak memory" not in rendered(replace(REPORT, peak_mib=peak_mib()))
