import re
from io import StringIO

import pytest
from rich.console import Console

from visproj import progress as module
from visproj.progress import ConsoleProgress


def test_bars_of_a_terminal():
    console = Console(file=StringIO(), width=120, force_terminal=True)
    with ConsoleProgress(console, "reading [/b]") as progress:
        progress.stage("encoding", 2)
        progress.advance()
        progress.stage("training", 12, done=10)
        progress.advance("loss 8.000")
        progress.advance("loss 7.500 [/b]")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert "reading [/b] " in text
    assert re.search(r"encoding .* 1/2 ", text)
    assert re.search(r"training .* 12/12 .* loss 7\.500 \[/b\]", text)


def test_without_a_terminal_a_line_now_and_then(monkeypatch):
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    console = Console(file=StringIO(), width=40)
    with ConsoleProgress(console, "reading") as progress:
        progress.stage("loading", 0)
        now = 12.0
        progress.stage("encoding", 3)
        progress.advance()
        now = 21.0
        progress.advance()
        now = 23.0
        progress.advance()
        progress.stage("training", 100)
        for step in range(1, 101):
            now += 4.0
            progress.advance(f"loss {step}")
    lines = console.file.getvalue().splitlines()
    assert lines[:3] == ["encoding", "encoding: 3/3", "training"]
    assert len(lines) == 3 + 400 // 12 + 1
    assert re.fullmatch(r"training: 3/100, loss 3(, .* left)?", lines[3])
    assert lines[-1] == "training: 100/100, loss 100"


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_but_the_error_of_a_short_run(terminal):
    console = Console(file=StringIO(), width=40, force_terminal=terminal, _environ={})

    def fail():
        with ConsoleProgress(console, "reading") as progress:
            progress.stage("loading")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    shown = console.file.getvalue()
    assert shown.endswith("\x1b[2K") if terminal else shown == ""


def test_stopped_for_something_else_to_be_printed():
    console = Console(file=StringIO(), width=40, force_terminal=True, _environ={})
    with ConsoleProgress(console, "reading", transient=True) as progress:
        progress.stop()
        console.print("an answer")
        progress.stage("drawing")
    assert console.file.getvalue().endswith("an answer\n")
