"""Processes, dtype and Trainer's arguments."""

import os
from dataclasses import replace

import pytest
import torch

from visproj.errors import InputError
from visproj.vlm import engine
from visproj.vlm.engine import (
    TrainingSettings,
    check_engine,
    engine_of_its_own,
    faster_dtype,
    launched,
    settle_dtype,
    training_arguments,
)
from visproj.vlm.run_folder import PROCESS_COUNTS

SETTINGS = TrainingSettings(dtype="float32", report_to=("csv",))


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in (*PROCESS_COUNTS, "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("epochs", (0, -1), "epochs must be at least 1"),
        ("batch", (0,), "batch must be at least 1"),
        ("accumulate", (0,), "accumulate must be at least 1"),
        ("save_steps", (0,), "save_steps must be at least 1"),
        ("log_steps", (0,), "log_steps must be at least 1"),
        ("eval_steps", (-1,), "eval_steps must be at least 0"),
        ("workers", (-1,), "workers must be at least 0"),
        ("max_steps", (0, -2), "max_steps must be at least 1, or -1 for none"),
        ("learning_rate", (0.0, float("nan"), float("inf")), "learning_rate must be positive"),
        ("clip", (0.0, float("nan")), "clip must be positive"),
        ("weight_decay", (-0.1, float("inf")), "weight_decay must be at least 0"),
        ("warmup", (-0.1, 1.0), "warmup must be at least 0 and less than 1"),
        ("seed", (-1, 2**32), "seed must be at least 0 and less than"),
        ("dtype", ("float16", "half"), "dtype must be one of auto, bfloat16, float32"),
    ],
)
def test_settings_are_checked(name, values, message):
    for value in values:
        with pytest.raises(InputError, match=message):
            TrainingSettings(**{name: value})


def test_arguments_of_trainer(tmp_path):
    chosen = replace(SETTINGS, learning_rate=3e-4, batch=3, accumulate=5, warmup=0.1, clip=0.5)
    args = training_arguments(chosen, tmp_path, evaluates=True, resumes=False)
    assert (args.learning_rate, args.max_grad_norm) == (3e-4, 0.5)
    assert args.per_device_train_batch_size == args.per_device_eval_batch_size == 3
    assert args.gradient_accumulation_steps == 5
    assert args.get_warmup_steps(200) == 20
    assert (args.eval_on_start, args.bf16, args.n_gpu) == (True, False, args.n_gpu)
    assert args.use_cpu == (not torch.cuda.is_available())
    assert args.report_to == []
    args = training_arguments(chosen, tmp_path, evaluates=True, resumes=True)
    assert not args.eval_on_start


@pytest.mark.parametrize("name", PROCESS_COUNTS)
def test_processes_that_do_not_take_part(tmp_path, monkeypatch, name):
    assert launched() == 1
    monkeypatch.setenv(name, "3")
    assert launched() == 3
    with pytest.raises(InputError, match="3 processes, each of which would train alone"):
        training_arguments(SETTINGS, tmp_path, evaluates=False, resumes=False)


def test_what_the_launcher_says_may_be_anything(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "many")
    monkeypatch.setenv("PMI_SIZE", "1")
    assert launched() == 1


@pytest.mark.parametrize("faster", ["bfloat16", "float32"])
def test_the_faster_dtype(tmp_path, monkeypatch, faster):
    chosen = getattr(torch, faster)
    monkeypatch.setattr(engine, "_seconds", lambda dtype: 1.0 if dtype == chosen else 2.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert faster_dtype(torch.device("cpu")) == faster
    assert settle_dtype(replace(SETTINGS, dtype="auto"), tmp_path).dtype == faster
    assert settle_dtype(SETTINGS, tmp_path) == SETTINGS
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: faster == "bfloat16")
    assert faster_dtype(torch.device("cuda")) == faster


def test_the_probe_takes_a_moment():
    assert 0 < engine._seconds(torch.float32) < 5


class Accelerator:
    device = torch.device("cpu")

    class distributed_type:  # noqa: N801 (accelerate's name)
        name = "MULTI_CPU"


def test_an_engine_that_is_not_used(monkeypatch, tmp_path):
    check_engine(Accelerator, SETTINGS)
    with pytest.raises(InputError, match=r"DEEPSPEED was requested .* runs MULTI_CPU on cpu"):
        check_engine(Accelerator, replace(SETTINGS, deepspeed=tmp_path / "zero3.json"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="FSDP was requested but is not used"):
        check_engine(Accelerator, SETTINGS)
    monkeypatch.setattr(Accelerator.distributed_type, "name", "FSDP")
    check_engine(Accelerator, SETTINGS)


def test_autocast_is_what_the_dtype_says():
    for dtype in ("bfloat16", "float32"):
        with replace(SETTINGS, dtype=dtype).autocast(torch.device("cpu")):
            out = torch.ones(2, 2) @ torch.ones(2, 2)
        assert out.dtype == getattr(torch, dtype)


def test_the_environment_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    before = dict(os.environ)
    with engine_of_its_own():
        chosen = replace(SETTINGS, dtype="bfloat16")
        training_arguments(chosen, tmp_path, evaluates=False, resumes=False)
        assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert dict(os.environ) == before
