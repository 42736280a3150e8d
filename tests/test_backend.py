"""Which implementation runs, and what is said where it cannot."""

import asyncio
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from visproj import ops, use_backend
from visproj.backend import runs_triton

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60.0  # seconds that a thread waits for another before the test fails


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
    for unset in ("auto", ""):
        monkeypatch.setenv("VISPROJ_BACKEND", unset)
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


def in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(PATIENCE)


@pytest.mark.parametrize("leaves_first", ["first", "second"])
def test_overlapping_threads(leaves_first, x, by_itself):
    """Each thread has its own choice, whatever the other does, and nothing is left of either."""
    entered = {name: threading.Event() for name in ("first", "second")}
    left = {name: threading.Event() for name in ("first", "second")}
    other = {"first": "second", "second": "first"}

    def work(name, backend):
        if name == "second":
            assert entered["first"].wait(PATIENCE)
        with use_backend(backend):
            entered[name].set()
            assert entered[other[name]].wait(PATIENCE)
            inside = [runs_triton(x)]
            if name != leaves_first:
                assert left[leaves_first].wait(PATIENCE)
            inside.append(runs_triton(x))
        left[name].set()
        assert left[other[name]].wait(PATIENCE)
        return inside, runs_triton(x)

    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(work, *a) for a in (("first", "triton"), ("second", "torch")))
        assert first.result(PATIENCE) == ([True, True], by_itself)
        assert second.result(PATIENCE) == ([False, False], by_itself)
    assert runs_triton(x) is by_itself


def test_a_thread_without_a_block_follows_the_last(x, by_itself):
    """As those do in which PyTorch runs a checkpointed forward again, or a DataParallel replica."""

    def seen():
        return runs_triton(x)

    def chosen(backend):
        with use_backend(backend):
            return seen()

    with use_backend("triton"):
        assert in_thread(seen)
        assert not in_thread(lambda: chosen("torch"))
        assert in_thread(seen)
        with use_backend("torch"):
            assert not in_thread(seen)
        assert in_thread(seen)
    assert in_thread(seen) is by_itself


def choosing(backend, x):
    with use_backend(backend):
        while True:
            yield runs_triton(x)


def test_generators_leave_in_any_order(x, by_itself):
    first, second = choosing("triton", x), choosing("torch", x)
    assert next(first)
    assert not next(second)
    first.close()
    assert not runs_triton(x)
    second.close()
    assert runs_triton(x) is by_itself


def test_a_generator_closed_by_another_thread(x, by_itself):
    generator = choosing("triton", x)
    assert next(generator)
    in_thread(generator.close)
    assert runs_triton(x) is by_itself
    assert in_thread(lambda: runs_triton(x)) is by_itself


def test_compiled_code_follows_every_thread(x):
    """One graph for each choice, not for each block."""
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=record)
    def shifted(x):
        return x + 1 if runs_triton(x, None) else x + 2

    def by(backend):
        with use_backend(backend):
            return shifted(x)[0, 0].item()

    for _ in range(10):
        assert by("torch") == 2
        assert by("triton") == 1
        with use_backend("triton"):
            assert in_thread(lambda: by("torch")) == 2
            assert in_thread(lambda: shifted(x)[0, 0].item()) == 1
    assert len(graphs) <= 4


def test_many_threads_leave_nothing(x, by_itself):
    def work(n):
        with ExitStack() as stack:
            for backend in ("torch", "triton") * 50:
                stack.enter_context(use_backend(backend))
                assert runs_triton(x) is (backend == "triton")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
        assert [f.result() for f in [pool.submit(runs_triton, x)] * 8] == [by_itself] * 8
    assert runs_triton(x) is by_itself


def test_unknown_names(x, monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be one of auto, triton, torch, got 'cuda'"):
        runs_triton(x, "cuda")
    with (
        pytest.raises(ValueError, match=r"use_backend\(\) must be one of .* got 'Triton'"),
        use_backend("Triton"),
    ):
        pass
    for name in ("gpu", "Torch", " torch"):
        monkeypatch.setenv("VISPROJ_BACKEND", name)
        with pytest.raises(ValueError, match=rf"VISPROJ_BACKEND must be one of .* got '{name}'"):
            runs_triton(x)
    for odd in (None, ["torch"]):
        with pytest.raises(ValueError, match=r"use_backend\(\) must be one of"), use_backend(odd):
            pass
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

    monkeypatch.setattr(launch.Launch, "start", None)
    if operation is attention:
        kv = x.new_ones(0, 3, 2, 1, 8)
        out = ops.cross_attention(x.new_ones(2, 1, 8), kv, backend="triton")
        assert out.shape == (0, 2, 1, 8)
    else:
        assert not operation(x[:0], 8, "triton").numel()


def folded(x, width, backend):
    weight, vector = x.new_ones(width, x.shape[1]), x.new_ones(width)
    square = x.new_ones(x.shape[1], x.shape[1])
    with torch.no_grad():
        return ops.folded_linear(
            x[None], weight, vector, square, square[0], eps=1e-5, backend=backend
        )


@pytest.mark.parametrize("operation", [folded, attention])
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
    start = "visproj.errors.BackendError: the Triton backend was asked for, but the tensors are on"
    assert said.startswith(start)
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


def test_tasks_have_their_own_choices(x, by_itself):
    """And those that they start, in threads too, have theirs until they are left."""

    async def task(backend, want):
        with use_backend(backend):
            await asyncio.sleep(0.01)
            inside = [runs_triton(x), await asyncio.to_thread(runs_triton, x)]
            later = asyncio.create_task(left())
        assert inside == [want, want]
        return await later

    async def left():
        await asyncio.sleep(0.05)
        return runs_triton(x)

    async def main():
        return await asyncio.gather(task("torch", False), task("triton", True))

    assert asyncio.run(main()) == [by_itself, by_itself]
    assert runs_triton(x) is by_itself
