"""Which implementation runs, and what is said where it cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from visproj import ops, use_backend
from visproj.backend import runs_triton

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def x(device):
    return torch.zeros(3, 4, device=device)


@pytest.fixture
def by_itself(device):
    """What ``auto`` gives here: the kernels on a GPU."""
    return device.type == "cuda"


def test_automatic(x, by_itself, monkeypatch):
    monkeypatch.delenv("VISPROJ_BACKEND", raising=False)
    assert runs_triton(x) is runs_triton(x, "auto") is by_itself
    monkeypatch.setenv("VISPROJ_BACKEND", "auto")
    assert runs_triton(x) is by_itself


def test_argument_then_context_then_variable(x, monkeypatch):
    monkeypatch.setenv("VISPROJ_BACKEND", "triton")
    assert runs_triton(x)
    with use_backend("torch"):
        assert not runs_triton(x)
        assert runs_triton(x, "triton")
        with use_backend("triton"):
            assert runs_triton(x)
            assert not runs_triton(x, "torch")
        assert not runs_triton(x)
    assert runs_triton(x)
    monkeypatch.setenv("VISPROJ_BACKEND", "torch")
    assert not runs_triton(x)
    with use_backend("triton"):
        assert runs_triton(x)


def test_context_ends_with_an_error(x, by_itself):
    with pytest.raises(KeyError), use_backend("triton"):
        raise KeyError
    assert runs_triton(x) is by_itself


def test_unknown_names(x, monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be one of auto, triton, torch, got 'cuda'"):
        runs_triton(x, "cuda")
    with (
        pytest.raises(ValueError, match=r"use_backend\(\) must be one of .* got 'Triton'"),
        use_backend("Triton"),
    ):
        pass
    monkeypatch.setenv("VISPROJ_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"VISPROJ_BACKEND must be one of .* got 'gpu'"):
        runs_triton(x)
    assert not runs_triton(x, "torch")


def norm(x, width, backend):
    weight, vector = x.new_ones(width, x.shape[1]), x.new_ones(width)
    return ops.linear_layer_norm(x, weight, None, vector, None, backend=backend)


def chain(x, width, backend):
    weight, vector = x.new_ones(width, x.shape[1]), x.new_ones(width)
    out_weight = x.new_ones(3, width)
    return ops.linear_norm_linear(
        x[None], weight, None, vector, None, 1e-5, out_weight, None, backend=backend
    )


def attention(x, width, backend):
    return ops.cross_attention(
        x.new_ones(2, 1, width), x.new_ones(1, 3, 2, 1, width), backend=backend
    )


OPERATIONS = [norm, chain, attention]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_fp64_is_pytorchs(operation, x):
    assert operation(x.double(), 8, "auto").dtype == torch.float64
    with pytest.raises(TypeError, match="float32, float16 and bfloat16, got float64"):
        operation(x.double(), 8, "triton")


@pytest.mark.parametrize(
    ("operation", "width", "message"),
    [
        (norm, 16385, "D is 16385, more than 16384"),
        (chain, 16385, "D is 16385, more than 16384"),
        (attention, 257, "head width 257 is above 256"),
    ],
)
def test_what_no_kernel_takes(operation, width, message, x):
    """PyTorch by itself, an error where the kernels were asked for."""
    assert operation(x, width, "auto").numel()
    with pytest.raises(ValueError, match=message):
        operation(x, width, "triton")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_empty_batches_launch_nothing(operation, x, monkeypatch):
    from visproj.kernels import launch

    monkeypatch.setattr(launch, "start", None)
    if operation is attention:
        kv = x.new_ones(0, 3, 2, 1, 8)
        out = ops.cross_attention(x.new_ones(2, 1, 8), kv, backend="triton")
        assert out.shape == (0, 2, 1, 8)
    else:
        assert not operation(x[:0], 8, "triton").numel()


@pytest.mark.parametrize("operation", [chain, attention])
def test_a_failing_kernel_is_an_error_with_its_configuration(operation, x, monkeypatch):
    """It never falls back: whoever asked for the kernels should know that they did not run."""
    from visproj.kernels import configs
    from visproj.kernels.launch import Config

    def impossible(kernel, operands, precision):
        return (Config((48, 48) if "attention" in kernel else (48, 48, 48), warps=4, stages=3),)

    monkeypatch.setattr(configs, "candidates", impossible)
    message = (
        r"kernel _\w+ failed on \w+.*configuration 48x48.*/4w3s pointers.*VISPROJ_BACKEND=torch"
    )
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        operation(x.repeat(8, 1), 8, "triton")


def python(source, **variables):
    """Whether Triton interprets is settled once per process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | variables
    return subprocess.run(
        [sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=300
    )


CALL = """
import torch
from visproj import ops
x, weight, vector = torch.ones(3, 4), torch.ones(8, 4), torch.ones(8)
ops.linear_layer_norm(x, weight, None, vector, None)
"""


def test_without_a_gpu_the_error_says_what_is_missing():
    done = python(CALL, TRITON_INTERPRET="0", VISPROJ_BACKEND="triton")
    assert done.returncode != 0
    said = done.stderr.splitlines()[-1]
    assert said.startswith("RuntimeError: the Triton backend was asked for, but the tensors are on")
    for part in ("cpu", 'use_backend("torch")', "VISPROJ_BACKEND=torch", "TRITON_INTERPRET=1"):
        assert part in said
    assert python(CALL, TRITON_INTERPRET="0", VISPROJ_BACKEND="auto").returncode == 0


def test_without_triton():
    """Hidden as if it were not installed: PyTorch runs everything, and the error names it."""
    hide = (
        "import importlib.util, importlib.abc, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'triton' else find(n, *a)\n"
    )
    assert python(hide + CALL, VISPROJ_BACKEND="auto").returncode == 0
    done = python(hide + CALL, VISPROJ_BACKEND="triton")
    assert "triton is not installed (pip install triton)" in done.stderr.splitlines()[-1]
