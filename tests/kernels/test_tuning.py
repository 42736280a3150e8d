"""Which configuration runs, with stand-ins for the GPU and for the clock."""

import json

import pytest
import torch
import triton

from visproj.kernels import tuning
from visproj.kernels.launch import Config

SLOW, FAST = Config((64, 64), 4, 2), Config((128, 64), 8, 2, descriptors=True)
SECONDS = {SLOW: 2.0, FAST: 1.0}
LIKE = torch.empty(1, dtype=torch.bfloat16)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU on which FAST is faster; gives what was run and what was timed."""
    ran, timed = [], []

    def do_bench(run, **options):
        run()
        timed.append(ran.pop())
        return SECONDS[timed[-1]]

    monkeypatch.setenv("VISPROJ_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "INTERPRETING", False)
    monkeypatch.setattr(tuning, "architecture", lambda device: 90)
    forget(monkeypatch)
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU 80/GB")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return ran, timed


def best(ran, rows=256, choices=(SLOW, FAST)):
    tuning.run_best("kernel", (rows, 4096, True), choices, ran.append, LIKE)
    return ran[-1]


def forget(monkeypatch):
    """As another process would start."""
    monkeypatch.setattr(tuning, "_remembered", {})
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_files_read", set())


def test_the_fastest_is_timed_once_and_remembered(gpu, monkeypatch):
    ran, timed = gpu
    assert best(ran) == FAST
    assert timed == [SLOW, FAST]
    assert ran == [FAST]
    assert best(ran) == FAST
    assert best(ran, rows=200) == FAST  # the same power of two
    assert len(timed) == 2
    best(ran, rows=257)
    assert len(timed) == 4
    forget(monkeypatch)
    assert best(ran) == FAST
    assert len(timed) == 4


def test_the_file_names_triton_and_the_device(gpu, tmp_path):
    ran, _ = gpu
    best(ran)
    (file,) = tmp_path.iterdir()
    assert file.name == f"autotune-Some-GPU-80-GB-triton-{triton.__version__}.json"
    assert json.loads(file.read_text()) == {
        "kernel 90 torch.bfloat16 256 4096 True": "128x64/8w2s descriptors"
    }


@pytest.mark.parametrize(
    "stored", ["", "[]", "{", '{"kernel 90 torch.bfloat16 256 4096 True": "?"}']
)
def test_a_file_that_says_nothing_is_replaced(gpu, stored):
    ran, timed = gpu
    tuning.cache_file().write_text(stored)
    assert best(ran) == FAST
    assert timed == [SLOW, FAST]
    assert "128x64" in tuning.cache_file().read_text()


def test_a_folder_that_cannot_be_written_is_no_error(gpu, monkeypatch, tmp_path):
    ran, timed = gpu
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VISPROJ_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert best(ran) == FAST
    assert best(ran) == FAST
    assert len(timed) == 2


@pytest.mark.parametrize("why", ["variable", "capturing", "distributed", "interpreter", "one"])
def test_nothing_is_timed(gpu, monkeypatch, why):
    ran, timed = gpu
    choices = (SLOW,) if why == "one" else (SLOW, FAST)
    if why == "variable":
        monkeypatch.setenv("VISPROJ_AUTOTUNE", "0")
    elif why == "capturing":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    elif why == "distributed":
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    elif why == "interpreter":
        monkeypatch.setattr(tuning, "INTERPRETING", True)
    assert best(ran, choices=choices) == SLOW
    assert timed == []
    assert ran == [SLOW]


@pytest.mark.parametrize("why", ["capturing", "distributed"])
def test_what_is_remembered_runs_where_nothing_is_timed(gpu, monkeypatch, why):
    ran, timed = gpu
    best(ran)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: why == "capturing")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: why == "distributed")
    assert best(ran) == FAST
    assert len(timed) == 2


def test_a_choice_that_fails_is_an_error(gpu):
    def run(config):
        raise RuntimeError(f"failed with the configuration {config}")

    with pytest.raises(RuntimeError, match="configuration 64x64/4w2s pointers"):
        tuning.run_best("kernel", (256,), (SLOW, FAST), run, LIKE)
