"""``visproj train``, in this process."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from vlm.tiny import tiny_language_model, tiny_tokenizer
from vlm.training_models import REPORT, no_gpu

from visproj import backend, cli
from visproj.vlm import bundled, engine, training
from visproj.vlm.engine import TrainingSettings
from visproj.vlm.options import TrainingOptions
from visproj.vlm.samples import Columns


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


@pytest.fixture
def asked(monkeypatch):
    """What the command line asks run_training for, which does nothing."""
    calls = []

    def fake(options, settings, **callbacks):
        calls.append((options, settings, [block.name for block in backend._blocks]))
        return REPORT

    monkeypatch.setattr(training, "run_training", fake)
    return calls


OPTIONS = {
    "kind": ("vit", "kind", "vit"),
    "encoder": ("some/clip", "encoder", "some/clip"),
    "language-model": ("some/llama", "language_model", "some/llama"),
    "queries": (9, "queries", 9),
    "from-projector": ("before", "from_projector", Path("before")),
    "data": ("some/data", "data", "some/data"),
    "images": ("photographs", "images", Path("photographs")),
    "prompt": ("What?", "prompt", "What?"),
    "split": ("all", "split", "all"),
    "held-out": ("0.25", "held_out", 0.25),
    "views": (3, "views", 3),
    "cache-features": (2.5, "cache_features", 2.5),
    "max-length": (99, "max_length", 99),
    "out": ("results", "out", Path("results")),
}
FLAGS = {"streaming": "streaming", "strict": "strict", "resume": "resume", "retrieval": "retrieval"}
SETTINGS = {
    "workers": (5, "workers", 5),
    "epochs": (7, "epochs", 7),
    "max-steps": (70, "max_steps", 70),
    "learning-rate": (3e-4, "learning_rate", 3e-4),
    "batch": (5, "batch", 5),
    "accumulate": (6, "accumulate", 6),
    "dtype": ("float32", "dtype", "float32"),
    "save-steps": (11, "save_steps", 11),
    "eval-steps": (12, "eval_steps", 12),
    "log-steps": (13, "log_steps", 13),
    "report-to": ("wandb", "report_to", ("wandb",)),
    "deepspeed": ("zero3.json", "deepspeed", Path("zero3.json")),
    "seed": (11, "seed", 11),
}
SETTING_FLAGS = {"gradient-checkpointing": "gradient_checkpointing", "group-by-length": "by_length"}
COLUMNS = ("image", "caption", "question", "answer", "conversation")


def test_every_option_reaches_its_place(run, asked):
    valued = {**OPTIONS, **SETTINGS}
    arguments = [part for name, (text, *_) in valued.items() for part in (f"--{name}", text)]
    arguments += [f"--{name}" for name in (*FLAGS, *SETTING_FLAGS)]
    arguments += [part for name in COLUMNS for part in (f"--{name}-column", f"my {name}")]
    status, stdout, stderr = run("train", *arguments, "--backend", "torch")
    assert status == 0, stderr
    ((options, settings, chosen),) = asked
    want = {field: value for _, field, value in OPTIONS.values()}
    want |= dict.fromkeys(FLAGS.values(), True)
    columns = Columns(**{name: f"my {name}" for name in COLUMNS})
    assert options == TrainingOptions(**want, columns=columns)
    want = {field: value for _, field, value in SETTINGS.values()}
    want |= dict.fromkeys(SETTING_FLAGS.values(), True)
    assert settings == TrainingSettings(**want)
    assert chosen == ["torch"]
    assert "projector, checkpoints, log and loss curve in results" in stdout


@pytest.mark.parametrize(
    ("arguments", "kind", "epochs"),
    [
        (["--kind", "baseline"], "baseline", 3),
        (["--kind", "vit"], "vit", 3),
        ([], "perceiver", 7),
        (["--data", "somewhere"], "perceiver", 1),
    ],
)
def test_the_command_has_the_defaults_of_the_settings(run, asked, arguments, kind, epochs):
    assert run("train", *arguments)[0] == 0
    ((options, settings, chosen),) = asked
    assert settings == TrainingSettings(epochs=epochs)
    given = {"data": "somewhere"} if "--data" in arguments else {}
    named = "baseline" if "baseline" in arguments else "vit" if "vit" in arguments else None
    assert options == TrainingOptions(Path("visproj-train", kind), named, **given)
    assert chosen == ["auto"]


def test_the_help_names_every_option(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # narrow terminals have long names cut off
    status, stdout, _ = run("train", "--help")
    assert status == 0
    for option in (*OPTIONS, *FLAGS, *SETTINGS, *SETTING_FLAGS, *(f"{c}-column" for c in COLUMNS)):
        assert f"--{option}" in stdout
    assert "local" not in stdout


def small(out, data):
    """Arguments of a run of three steps."""
    sizes = ["--epochs", 1, "--batch", 2, "--dtype", "float32", "--workers", 0]
    sizes += ["--held-out", 0.34, "--report-to", "csv"]
    return ["train", "--kind", "baseline", "--data", data, "--out", out, *sizes]


def test_a_run_from_the_command_line(run, models, data, tmp_path):
    out = tmp_path / "out"
    status, stdout, stderr = run(*small(out, data))
    assert status == 0, stderr
    assert "training" in stderr
    report = json.loads((out / "report.json").read_text())
    text = " ".join(stdout.split())
    assert f"untrained {report['untrained_loss']:.3f} " in text
    assert f"trained {report['trained_loss']:.3f} (" in text
    assert f"{report['parameters']:,}" in text
    status, again, _ = run(*small(out, data), "--resume")
    assert status == 0
    assert f"trained {report['trained_loss']:.3f} (" in " ".join(again.split())


def fails(run, *arguments):
    """The line on stderr with the error of a command that fails, after those of its stages."""
    status, stdout, stderr = run(*arguments)
    assert status in (1, 2)  # 2 for what the parser of the arguments refuses
    assert stdout == ""
    *stages, line = stderr.splitlines()
    assert line.startswith("error: ")
    assert set(stages) <= {"loading the models", "reading the data", "training"}
    return line


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--max-steps", "0"], ["max-steps", "1"]),
        (["--held-out", "1.5"], ["held_out must be between 0 and 1"]),
        (["--held-out", "test"], ["has no split test", "train"]),
        (["--caption-column", "text"], ["has no column text", "captions", "image"]),
        (["--kind", "q-former"], ["kind", "'q-former'", "baseline", "vit", "perceiver"]),
        (["--dtype", "float16"], ["dtype", "'float16'", "auto", "bfloat16", "float32"]),
        (["--backend", "cuda"], ["'cuda'", "auto", "triton", "torch"]),
        (["--epochs", "0"], ["epochs", "1"]),
        (["--batch", "-1"], ["batch", "1"]),
        (["--accumulate", "0"], ["accumulate", "1"]),
        (["--queries", "0"], ["queries", "1"]),
        (["--learning-rate", "nan"], ["rate", "nan"]),
        (["--learning-rate", "inf"], ["rate", "inf"]),
        (["--seed", str(2**64)], ["seed"]),
        (["--resume"], ["holds no training run to resume"]),
    ],
)
def test_bad_options_are_one_line(run, models, data, tmp_path, arguments, parts):
    out = tmp_path / "out"
    arguments = ["--dtype", "float32", *arguments]
    line = fails(run, "train", "--data", data, "--out", out, *arguments)
    assert all(part in line for part in parts)
    assert not (out / "projector").exists()


def test_a_missing_data_folder_is_one_line(run, models, tmp_path):
    line = fails(run, *small(tmp_path / "out", tmp_path / "nowhere"))
    assert f"no such data: {tmp_path / 'nowhere'}" in line


def test_triton_that_cannot_run_is_one_line(run, models, data, tmp_path, monkeypatch):
    no_gpu(monkeypatch)
    line = fails(run, *small(tmp_path / "out", data), "--backend", "triton")
    assert "the Triton backend was asked for, but the tensors are on cpu" in line


def test_a_second_run_in_the_same_folder_is_one_line(run, models, data, tmp_path):
    out = tmp_path / "out"
    (out / "projector").mkdir(parents=True)
    assert f"{out} holds a training run: go on with --resume" in fails(run, *small(out, data))


def test_a_loss_that_is_not_a_number_is_one_line(run, models, data, tmp_path, monkeypatch):
    def load(name, dtype):
        language_model = tiny_language_model()
        torch.nn.init.constant_(language_model.lm_head.weight, math.nan)
        return "tiny-llama", language_model, tiny_tokenizer()

    monkeypatch.setattr(training, "load_language_model", load)
    line = fails(run, *small(tmp_path / "out", data))
    assert line.startswith("error: after step 0: the loss of the held-out samples is nan; nothing")
    assert not (tmp_path / "out" / "projector").exists()


def test_the_built_in_photographs_that_are_missing_are_one_line(run, tmp_path, monkeypatch):
    find = bundled.find_spec
    monkeypatch.setattr(
        bundled, "find_spec", lambda name: None if name == "skimage" else find(name)
    )
    line = fails(run, "train", "--out", tmp_path / "out", "--dtype", "float32")
    assert "the package skimage" in line
    assert "pip install 'visproj[train]'" in line


@pytest.mark.parametrize("package", ["datasets", "accelerate"])
def test_a_package_that_is_missing_is_one_line(run, models, data, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    line = fails(run, *small(tmp_path / "out", data))
    assert f"the package {package} is not installed: pip install 'visproj[train]'" in line


def test_tensorboard_that_is_missing_is_one_line(run, models, data, tmp_path, monkeypatch):
    find = engine.find_spec
    monkeypatch.setattr(
        engine, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    line = fails(run, *small(tmp_path / "out", data), "--report-to", "tensorboard")
    assert "the package tensorboard is not installed: pip install 'visproj[train]'" in line
