"""``visproj train`` in two processes is ``visproj train`` in one with the whole batch."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from distributed.commands import RATE, outputs, train, weights, write_models
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

KINDS = ("baseline", "perceiver")
# Sums in another order: roundings of 6e-8, of which AdamW's division makes up to 1e-5.
BOUND = 1e-5
STEPS = 6  # two epochs of twelve samples in fours


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def log(out):
    with (out / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def losses(out, name="loss"):
    return [float(row[name]) for row in log(out) if row[name]]


def succeeded(done):
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    """Runs in one process with batches of four, by kind."""
    found = {}
    for kind in KINDS:
        out = tmp_path_factory.mktemp("alone") / kind
        arguments = ("--kind", kind, "--batch", 4, "--epochs", 2, "--held-out", 0.3)
        succeeded(train(models, out, *arguments))
        found[kind] = out
    return found


# Twelve samples to train on; five are held out, which two processes with batches of two pad.
def arguments(kind, batch=2):
    return ("--kind", kind, "--batch", batch, "--epochs", 2, "--held-out", 0.3)


def assert_same(kind, out, want):
    assert losses(out) == pytest.approx(losses(want), rel=BOUND)
    assert losses(out, "eval_loss") == pytest.approx(losses(want, "eval_loss"), rel=BOUND)
    got, expected = weights(out), weights(want)
    for name, tensor in expected.items():
        if name.endswith("in_proj_bias"):
            continue  # the keys' gradient is zero but for rounding, which AdamW scales up
        # A weight that began at zero is nothing but a sum of AdamW's steps, each up to RATE long.
        scale = max(tensor.abs().max().item(), STEPS * RATE)
        assert (got[name] - tensor).abs().max() <= BOUND * scale, name
    scale = outputs(want).abs().max()
    assert (outputs(out) - outputs(want)).abs().max() <= BOUND * scale


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_under_torchrun(models, alone, tmp_path, kind):
    done = succeeded(train(models, tmp_path / "out", *arguments(kind), processes=2))
    assert_same(kind, tmp_path / "out", alone[kind])
    assert done.stdout.count("projector, checkpoints, log and loss curve in") == 1
    assert (tmp_path / "out" / "checkpoint-6" / "rng_state_1.pth").is_file()
    assert (tmp_path / "out" / "checkpoint-6" / "complete").is_file()


@pytest.mark.parametrize("rate", [RATE, 1e30])
def test_the_interpreter_is_not_finalised_beside_threads_of_gloo(models, tmp_path, rate):
    """They would abort a process now and then, after an error as well."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc_per_node=2", Path(__file__).with_name("ending.py"), tmp_path]
    chosen = (*arguments("baseline"), "--learning-rate", rate)
    done = train(models, tmp_path / "out", *chosen, launcher=launcher)
    assert (done.returncode == 0) == (rate == RATE), done.stderr
    ends = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("rank-*")}
    assert ends == {"rank-0": "exit handlers", "rank-1": "exit handlers"}


def test_accelerate_launch(models, alone, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launcher += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", "--main_process_port", "0", "-m", "visproj"]
    done = train(models, tmp_path / "out", *arguments("baseline"), launcher=launcher)
    succeeded(done)
    assert_same("baseline", tmp_path / "out", alone["baseline"])


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_that_are_stopped_and_go_on(models, alone, tmp_path, kind):
    out = tmp_path / "out"
    chosen = (*arguments(kind), "--save-steps", 2)
    succeeded(train(models, out, *chosen, processes=2))
    # As if both processes had been killed while they wrote the third checkpoint.
    (out / "checkpoint-6" / "complete").unlink()
    shutil.rmtree(out / "projector")
    before = load_file(out / "checkpoint-4" / "model.safetensors")
    succeeded(train(models, out, *chosen, "--resume", processes=2))
    assert_same(kind, out, alone[kind])
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(out).items())


def deepspeed(folder, stage):
    """DeepSpeed's configuration, with every parameter partitioned however small."""
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    (folder / "zero.json").write_text(json.dumps(config))
    return ("--deepspeed", folder / "zero.json")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_deepspeed(models, alone, tmp_path, kind, stage):
    """Stopped while the last checkpoint is written, and resumed."""
    out = tmp_path / "out"
    chosen = (*arguments(kind), "--save-steps", 2, *deepspeed(tmp_path, stage))
    succeeded(train(models, out, *chosen, processes=2))
    assert_same(kind, out, alone[kind])
    parts = sorted(path.name for path in (out / "checkpoint-6" / "global_step6").iterdir())
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt" in parts
    if stage == 3:
        assert "zero_pp_rank_1_mp_rank_00_model_states.pt" in parts
    frozen = (models / "llama" / "model.safetensors").stat().st_size
    written = sum(path.stat().st_size for path in (out / "checkpoint-6").rglob("*model_states.pt"))
    assert written < frozen / 2
    (out / "checkpoint-6" / "complete").unlink()
    succeeded(train(models, out, *chosen, "--resume", processes=2))
    assert_same(kind, out, alone[kind])


def fails(done):
    assert done.returncode != 0
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_two_runs_in_one_folder(models, alone):
    lines = fails(train(models, alone["baseline"], *arguments("baseline"), processes=2))
    assert lines
    assert all("holds a training run: go on with --resume" in line for line in lines)


def test_an_engine_that_is_ignored_stops_the_run(models, tmp_path):
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    done = train(models, tmp_path / "out", *arguments("baseline"), variables=variables)
    (line,) = fails(done)
    assert "FSDP" in line


def test_processes_that_do_not_find_each_other(models, tmp_path):
    """A launcher that sets only its own names: each process would train alone."""
    variables = {"SLURM_STEP_NUM_TASKS": "2"}
    done = train(models, tmp_path / "out", *arguments("baseline"), variables=variables)
    (line,) = fails(done)
    assert "a launcher has started 2 processes, each of which would train alone" in line
    assert not (tmp_path / "out" / "projector").exists()
