"""``visproj train``, in this process."""

import json
import math
import sys

import pytest
import torch
from vlm.tiny import tiny_language_model, tiny_tokenizer
from vlm.training_models import REPORT, no_gpu

from visproj import backend, cli
from visproj.vlm import bundled, training
from visproj.vlm.loop import TrainingSettings
from visproj.vlm.training import TrainingOptions


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


def test_every_option_reaches_its_place(run, asked, tmp_path):
    arguments = {
        "kind": "vit",
        "data": tmp_path / "data",
        "out": tmp_path / "out",
        "encoder": "some/clip",
        "language-model": "some/llama",
        "queries": 9,
        "epochs": 7,
        "learning-rate": 3e-4,
        "batch": 5,
        "accumulate": 6,
        "dtype": "float32",
        "seed": 11,
        "backend": "torch",
    }
    flags = [part for name, value in arguments.items() for part in (f"--{name}", value)]
    status, stdout, _ = run("train", *flags, "--resume")
    assert status == 0
    ((options, settings, chosen),) = asked
    assert options == TrainingOptions(
        "vit",
        tmp_path / "out",
        tmp_path / "data",
        "some/clip",
        "some/llama",
        queries=9,
        resume=True,
    )
    assert settings == TrainingSettings(
        epochs=7, learning_rate=3e-4, batch=5, accumulate=6, dtype="float32", seed=11
    )
    assert chosen == ["torch"]
    assert f"projector, log and loss curve in {tmp_path / 'out'}" in stdout


@pytest.mark.parametrize(("kind", "epochs"), [("baseline", 3), ("vit", 3), ("perceiver", 6)])
def test_the_command_has_the_defaults_of_the_settings(run, asked, kind, epochs):
    assert run("train", "--kind", kind)[0] == 0
    ((options, settings, chosen),) = asked
    assert settings == TrainingSettings(epochs=epochs)
    assert options == TrainingOptions(kind, options.out)
    assert options.out.parts == ("visproj-train", kind)
    assert chosen == ["auto"]


def test_the_help_names_every_option(run):
    status, stdout, _ = run("train", "--help")
    assert status == 0
    for option in ("kind", "data", "out", "queries", "epochs", "batch", "dtype", "seed", "resume"):
        assert f"--{option}" in stdout


def small(out, data):
    """Arguments of a run of three steps."""
    sizes = ["--epochs", 1, "--batch", 16, "--accumulate", 1, "--dtype", "float32", "--seed", 0]
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
    found = report["retrieval"]
    assert f"own {100 * found['rate']:.1f} % " in text
    assert f"permuted {100 * found['control']:.1f} % " in text
    low, high = found["interval"]
    assert f"{100 * low:.1f} to {100 * high:.1f} % " in text
    assert f"{report['parameters']:,}" in text
    status, again, _ = run(*small(out, data), "--resume")
    assert status == 0
    assert f"trained {report['trained_loss']:.3f} (" in " ".join(again.split())


def fails(run, *arguments):
    """The one line on stderr of a command that fails."""
    status, stdout, stderr = run(*arguments)
    assert status in (1, 2)  # 2 for what the parser of the arguments refuses
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    return stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--kind", "q-former"], ["kind", "'q-former'", "baseline", "vit", "perceiver"]),
        (["--dtype", "float16"], ["dtype", "'float16'", "bfloat16", "float32"]),
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
    line = fails(run, "train", "--data", data, "--out", out, *arguments)
    assert all(part in line for part in parts)
    assert models.loaded == []
    assert not out.exists()


def test_a_missing_data_folder_is_one_line(run, models, tmp_path):
    line = fails(run, *small(tmp_path / "out", tmp_path / "nowhere"))
    assert f"no such captions file: {tmp_path / 'nowhere' / 'captions.jsonl'}" in line


def test_triton_that_cannot_run_is_one_line(run, models, data, tmp_path, monkeypatch):
    no_gpu(monkeypatch)
    line = fails(run, *small(tmp_path / "out", data), "--backend", "triton")
    assert "the Triton backend was asked for, but the tensors are on cpu" in line


def test_a_second_run_in_the_same_folder_is_one_line(run, models, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "resume.pt").touch()
    assert f"{out} holds a training run: go on with --resume" in fails(run, *small(out, data))


def test_a_loss_that_is_not_a_number_is_one_line(run, models, data, tmp_path, monkeypatch):
    def load(name, dtype):
        language_model = tiny_language_model()
        torch.nn.init.constant_(language_model.lm_head.weight, math.nan)
        return "tiny-llama", language_model, tiny_tokenizer()

    monkeypatch.setattr(training, "load_language_model", load)
    line = fails(run, *small(tmp_path / "out", data))
    assert line.startswith("error: after step 0: the loss of the held-out views is nan; nothing is")
    assert not (tmp_path / "out" / "projector").exists()
    assert not (tmp_path / "out" / "resume.pt").exists()


def test_the_built_in_photographs_that_are_missing_are_one_line(run, tmp_path, monkeypatch):
    find = bundled.find_spec
    monkeypatch.setattr(
        bundled, "find_spec", lambda name: None if name == "skimage" else find(name)
    )
    line = fails(run, "train", "--out", tmp_path / "out")
    assert "the package skimage" in line
    assert "pip install 'visproj[train]'" in line


def test_tensorboard_that_is_missing_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in ("visproj.vlm.loop", "torch.utils.tensorboard"):
        monkeypatch.delitem(sys.modules, name)
    line = fails(run, "train", "--out", tmp_path / "out")
    assert "the package tensorboard" in line
    assert "pip install 'visproj[train]'" in line
