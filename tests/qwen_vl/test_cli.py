import sys

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from qwen_vl.checkpoints import full_state, snapshot, write_checkpoint

from visproj import cli, outcome
from visproj.qwen_vl import QwenVisionTransformer


@pytest.fixture
def run(monkeypatch, capsys):
    """Run ``visproj extract`` in this process: exit status, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["visproj", "extract", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        captured = capsys.readouterr()
        return exit_info.value.code, captured.out, captured.err

    return call


def test_extract(run, tmp_path):
    source, target = write_checkpoint(tmp_path / "full"), tmp_path / "encoder"
    status, stdout, stderr = run(source, target, "--dtype", "bfloat16", "--format", "bin")
    assert (status, stderr) == (0, "")
    assert "files: config.json, model.safetensors, preprocessor_config.json, pytorch_mod" in stdout
    assert "tensors: 41, " in stdout
    assert "MiB in the checkpoint" in stdout
    assert QwenVisionTransformer.from_pretrained(target).conv1.weight.dtype == torch.bfloat16

    status, stdout, stderr = run(source, target)
    assert (status, stdout) == (1, "")
    assert stderr.startswith(f"error: {target} exists")
    assert stderr.count("\n") == 1
    assert run(source, target, "--overwrite")[0] == 0
    assert QwenVisionTransformer.from_pretrained(target).conv1.weight.dtype == torch.float32


def language_model_only(source):
    state = {key: value for key, value in full_state().items() if "visual" not in key}
    (source / "model.safetensors.index.json").unlink()
    for path in source.glob("*.safetensors"):
        path.unlink()
    write_checkpoint(source, shards=1, state=state)
    return [source], "has no keys that contain 'visual'"


def damaged_shard(source):
    path = source / "model-00003-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:99])
    return [source], f"{path} is not an intact safetensors file"


def no_such_directory(source):
    return ["./nowhere"], "./nowhere is not a directory, and cannot be a model's name"


def no_network(source):
    return ["nobody/nothing"], "config.json of a model of that name could not be downloaded from"


def revision_of_a_directory(source):
    return [source, "--revision", "v2"], "is a directory, so there is no revision v2"


@pytest.mark.parametrize(
    "case",
    [
        language_model_only,
        damaged_shard,
        no_such_directory,
        no_network,
        revision_of_a_directory,
    ],
    ids=lambda case: case.__name__,
)
def test_trouble_is_one_line(run, tmp_path, monkeypatch, case):
    def unreachable(*arguments, **options):
        raise LocalEntryNotFoundError("No network.\nCheck the connection.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    (source, *options), message = case(write_checkpoint(tmp_path / "full"))
    before = snapshot(tmp_path)
    status, stdout, stderr = run(source, tmp_path / "encoder", *options)
    assert (status, stdout) == (1, "")
    assert stderr.startswith("error: ")
    assert message in stderr
    assert stderr.count("\n") == 1
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--dtype", "int4", "'int4' is not one of 'float64', 'float32', 'float16', 'bfloat16'"),
        ("--format", "gguf", "'gguf' is not one of 'safetensors', 'bin'"),
    ],
)
def test_a_choice_that_there_is_not(run, tmp_path, option, value, message):
    status, stdout, stderr = run("nowhere", tmp_path / "encoder", option, value)
    assert (status, stdout) == (2, "")
    assert stderr == f"error: invalid value for '{option}': {message}\n"


def test_a_terminal_gets_bars(run, tmp_path, monkeypatch):
    monkeypatch.setattr(outcome.errors, "_force_terminal", True)
    status, _, stderr = run(write_checkpoint(tmp_path / "full"), tmp_path / "encoder")
    assert status == 0
    assert "\x1b[?25l" in stderr  # the cursor is hidden while bars are drawn


def test_help_names_every_option(run):
    status, stdout, _ = run("--help")
    assert status == 0
    for word in ("SOURCE", "DEST", "--dtype", "--revision", "--format", "--overwrite"):
        assert word in stdout
