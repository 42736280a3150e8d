"""Every command of benchmarks/: help and bad input, once each in a process of its own."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import command

ROOT = Path(__file__).parent.parent.parent
COMMANDS = ("report", "fold", "launches", "codegen", "host_cost", "schedule", "loading", "pictures")


def start(name, *arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)],
        cwd=cwd,
        env={"PATH": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_these_are_all_commands():
    found = {
        path.stem
        for path in (ROOT / "benchmarks").glob("*.py")
        if 'if __name__ == "__main__":' in path.read_text()
    }
    assert found == set(COMMANDS)


BAD = [
    ("report", ["--device", "cuda:99"], 1, "--device cuda:99: PyTorch sees"),
    ("report", ["--device", "mps"], 1, "--device must be cpu, cuda or cuda:N, got 'mps'"),
    ("report", ["--device", "cpu:0"], 1, "--device must be cpu, cuda or cuda:N, got 'cpu:0'"),
    ("report", ["--set", "all"], 2, "argument --set: invalid choice: 'all'"),
    ("report", ["--minutes", "0"], 2, "--minutes: must be a number above 0, got '0'"),
    ("report", ["--minutes", "-1"], 2, "--minutes: must be a number above 0, got '-1'"),
    ("report", ["--seconds", "nan"], 2, "--seconds: must be a number of at least 0, got 'nan'"),
    ("report", ["--graphs", "--device", "cpu"], 1, "--graphs needs a CUDA device"),
    ("report", ["--compare", "nowhere.csv"], 1, "no file nowhere.csv"),
    ("report", ["--from-csv", "nowhere.csv"], 1, "no file nowhere.csv"),
    ("report", ["--from-csv", "."], 1, ".: Is a directory"),
    ("report", ["--compare", "a.txt"], 1, "a.txt is not a benchmark result"),
    ("report", ["--out", "a.txt"], 1, "cannot write into a.txt: a.txt is not a folder"),
    ("report", ["--out", "a.txt/b"], 1, "cannot write into a.txt/b: a.txt is not a folder"),
    ("report", ["--minute", "3"], 2, "unrecognized arguments: --minute 3"),
    ("fold", ["--batch", "0"], 2, "--batch: must be a whole number of at least 1, got '0'"),
    ("fold", ["--pairs", "none"], 2, "--pairs: must be a whole number of at least 1, got 'none'"),
    ("fold", ["--model", "minicpm"], 2, "argument --model: invalid choice: 'minicpm'"),
    ("launches", ["--batch", "-8"], 2, "--batch: must be a whole number of at least 1"),
    ("pictures", ["--out", "a.txt"], 1, "cannot write into a.txt: a.txt is not a folder"),
    ("loading", ["--rounds", "0"], 2, "--rounds: must be a whole number of at least 1, got '0'"),
    ("host_cost", ["--rounds", "0"], 2, "--rounds: must be a whole number of at least 1, got '0'"),
    ("schedule", ["--machine", "V100"], 2, "argument --machine: invalid choice: 'V100'"),
    ("schedule", ["--batch", "0"], 2, "--batch: must be a whole number of at least 1, got '0'"),
    ("codegen", ["--arch", "75"], 2, "argument --arch: invalid choice: 75"),
    ("codegen", ["--dtype", "fp64"], 2, "argument --dtype: invalid choice: 'fp64'"),
    ("codegen", ["--part", "2/2"], 2, "--part: must be I/N with I below N, got '2/2'"),
    ("codegen", ["--out", "a.txt/b"], 1, "cannot write into a.txt: a.txt is not a folder"),
    ("codegen", ["--amd", "--first"], 1, "--amd takes no other option than --dtype"),
]


@pytest.mark.parametrize("name", COMMANDS)
def test_in_a_fresh_process(name, tmp_path):
    done = start(name, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    (tmp_path / "a.txt").write_text("text\n")
    arguments, status, message = next(case for command, *case in BAD if command == name)
    done = start(name, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (status, "")
    assert_refused(done.stderr, message, tmp_path)


@pytest.mark.parametrize(("name", "arguments", "status", "message"), BAD)
def test_bad_input(name, arguments, status, message, monkeypatch, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("text\n")
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(f"benchmarks.{name}").main
    with pytest.raises(SystemExit) as ended:
        command.run_command(lambda _: main(arguments))
    assert ended.value.code == status
    out, err = capsys.readouterr()
    assert out == ""
    assert_refused(err, message, tmp_path)


def assert_refused(printed, message, folder):
    """One line, and nothing written."""
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["a.txt"]


def test_a_folder_that_cannot_be_written_to(monkeypatch, tmp_path):
    monkeypatch.setattr(command.os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=f"{tmp_path} is not writable"):
        command.check_folder(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []


def test_what_a_user_cannot_cause_is_a_traceback():
    def broken(arguments):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        command.run_command(broken)


def test_bench_command(tmp_path):
    """`visproj bench` hands everything on, from any folder."""
    done = subprocess.run(
        [sys.executable, "-m", "visproj.cli", "bench", "--set", "all"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "argument --set: invalid choice: 'all'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
