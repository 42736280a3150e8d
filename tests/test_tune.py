"""``visproj tune``, on a GPU that is not there: which choices it records, and who reads them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from visproj import tune
from visproj.errors import BackendError, InputError

pytest.importorskip("triton", reason="kernels need triton")

ROOT = Path(__file__).parents[1]

# Kernels are compiled for an H100 and launch nothing; every choice takes as long, so that the first
# is recorded. The tensors are on the CPU.
SCRIPT = """
import json, sys
from unittest import mock

import torch
import triton
from benchmarks.host_cost import launching_nowhere
from visproj import build_projector, tune, use_backend
from visproj.kernels import plans, tuning

def call(projector, **options):
    '''As a process of a group would, which has timed nothing.'''
    plans._plans.clear()
    tuning._remembered.clear(), tuning._chosen.clear(), tuning._files_read.clear()
    read, missed = tuning._read_or_timed, []

    def reading(names, *others):
        found = read(names, *others)
        missed.extend([] if found else [names])
        return found

    with (
        use_backend("triton"),
        mock.patch.object(torch.distributed, "is_initialized", lambda: True),
        mock.patch.object(tuning, "_read_or_timed", reading),
        mock.patch.object(triton.testing, "do_bench", side_effect=AssertionError("timed")),
    ):
        x = torch.randn(1, 5, 32).requires_grad_()
        projector(x).sum().backward()
        with torch.no_grad():
            projector.fold()(x)
    return list(map(str, missed))

options = tune.TuningOptions(
    width=32, lang_dim=64, tokens=4, queries=2, heads=2, batches=(1,), dtypes=("float32",),
    training="--no-training" not in sys.argv,
)
kinds = {"perceiver": {"query_grid": (2, 2), "num_heads": 2}, "baseline": {}}
with launching_nowhere(), mock.patch.object(tune, "tuning_device", lambda: torch.device("cpu")):
    first, second = tune.tune(options), tune.tune(options)
    recorded = json.loads(first.file.read_text())
    missed = {name: call(build_projector(name, 32, 64, **rest)) for name, rest in kinds.items()}
print(json.dumps([first.recorded, recorded, second.recorded, first.left_out, missed]))
"""


def start(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_it_records_is_all_that_a_process_group_needs():
    new, file, again, left_out, missed = start()
    assert new == file
    assert again == {}
    assert left_out == []
    assert missed == {"perceiver": [], "baseline": []}
    kernels = {key.split()[0] for key in new}
    assert kernels == {
        "cross_attention_fwd",
        "folded_linear",
        "linear_bwd_weight",
        "linear_table",
    }
    assert all(" 90 torch.float32 " in key for key in new)


def test_without_training_no_backward_is_timed():
    new, *_ = start("--no-training")
    assert "folded_linear" in {key.split()[0] for key in new}
    assert not [key for key in new if "bwd" in key]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"batches": (1, 0)}, "batch must be at least 1, got 0"),
        ({"dtypes": ("float64",)}, "unknown dtype 'float64', choose from bfloat16, float16"),
    ],
)
def test_options_that_fit_no_call(options, message):
    with pytest.raises(InputError, match=message):
        tune.TuningOptions(**options)


def test_without_a_gpu_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="nothing can be timed here: there is no CUDA device"):
        tune.tune(tune.TuningOptions())


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """As far as :func:`tune.tune` looks before it calls a projector."""
    monkeypatch.setenv("VISPROJ_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "tuning_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("VISPROJ_AUTOTUNE", "0", "nothing is timed with VISPROJ_AUTOTUNE=0"),
        ("VISPROJ_AUTOTUNE", "no", "VISPROJ_AUTOTUNE must be 0 or 1"),
        ("WORLD_SIZE", "2", "tuning runs in one process, and this is one of 2"),
    ],
)
def test_where_nothing_may_be_timed(gpu, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=message):
        tune.tune(tune.TuningOptions())


def test_a_folder_that_cannot_be_written_is_an_error(gpu, monkeypatch, tmp_path):
    """Only here: a kernel that cannot record its choice times it again in the next process."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VISPROJ_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(OSError, match="file"):
        tune.tune(tune.TuningOptions())


def test_calls_that_do_not_fit_into_memory_are_named(monkeypatch):
    def out_of_memory(x):
        raise torch.OutOfMemoryError("out of memory")

    assert not tune._fits(out_of_memory, (2, 3), dtype=torch.float32, device="cpu")
    assert tune._fits(lambda x: x, (2, 3), dtype=torch.float32, device="cpu")
    # Timing that has no memory is given up in silence: PyTorch counts it.
    counts = iter([0, 1])
    monkeypatch.setattr(tune, "_memory_errors", lambda: next(counts))
    assert not tune._fits(lambda x: x, (2, 3), dtype=torch.float32, device="cpu")


def test_the_report():
    report = tune.TuningReport(Path("choices.json"), {"b": "x", "a": "y"}, ["vit, 8 images"])
    assert list(tune.render_tuning(report)) == [
        "a: y",
        "b: x",
        "note: out of memory, not everything was timed: vit, 8 images",
        "2 configurations newly recorded in choices.json",
    ]
