"""Tiles given to processors, by hand and for the whole Perceiver."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import schedule
from benchmarks.model import Launch, Machine
from benchmarks.schedule import MACHINES, Processors, row, schedules
from visproj import PerceiverProjector
from visproj.kernels import configs, cross_attention_queries, launch, plans, registry, tuning
from visproj.kernels.makespan import Tiles, makespan

ROOT = Path(__file__).parents[2]
# Ten processors of 1 TFLOP/s each, and memory that takes no time.
TEN = Processors(90, 10, Machine(10e12, 10e12, 10e12, 1e30), 1e30)


@pytest.mark.parametrize(
    ("pieces", "slots", "end"),
    [
        ([], 2, 0),
        ([3], 2, 3),
        ([3, 2, 2], 2, 4),  # 3 beside 2, then 2 after the 2
        ([2, 2, 3], 2, 5),
        ([1] * 10, 3, 4),
    ],
)
def test_makespan(pieces, slots, end):
    assert makespan(pieces, slots) == end


def own(**rest):
    """A product of ours: rows and columns of 128 x 128 tiles, 64 deep."""
    rest = {
        "images": 1,
        "length": 128,
        "N": 256,
        "K": 256,
        "GROUP_M": 8,
        "TRIANGULAR": False,
    } | rest
    kernel = SimpleNamespace(__name__="_linear_fwd_kernel")
    config = SimpleNamespace(blocks=(128, 128, 64), stages=3)
    started = SimpleNamespace(kernel=kernel, config=config, rest=rest, programs=0)
    return Launch("_linear_fwd_kernel", 1, 0, started=started)


@pytest.mark.parametrize(
    ("rest", "depths"),
    [
        ({}, [256, 256]),
        ({"TRIANGULAR": True}, [256, 128]),
        # Column by column of a group of rows.
        ({"TRIANGULAR": True, "length": 256}, [256, 256, 128, 128]),
        ({"TRIANGULAR": True, "length": 256, "GROUP_M": 1}, [256, 128, 256, 128]),
        ({"K": 250}, [256, 256]),
        ({"length": 129, "images": 2, "N": 1}, [256] * 4),
    ],
)
def test_the_tiles_of_a_product(rest, depths):
    (tiles,) = schedule._tiles(own(**rest))
    assert list(tiles.work) == [2 * 128 * 128 * depth for depth in depths]


def test_fewer_tiles_than_processors_leave_some_idle():
    found = row(own(), TEN)
    assert (found.tiles, found.waves, found.used) == (2, 1, pytest.approx(0.2))
    assert found.perfect == pytest.approx(2 * 128 * 128 * 256 / 1e12)
    assert found.sober > found.perfect


def test_the_last_round_leaves_some_idle():
    """Two tiles share a processor: 22 of them go into 20 slots, then 2."""
    found = row(own(length=128 * 11), TEN)
    assert (found.tiles, found.waves) == (22, 2)
    assert found.used == pytest.approx(22 / 40)


def test_memory_is_a_bound_as_well():
    machine = Processors(90, 10, Machine(10e12, 10e12, 10e12, 1e9), 1e30)
    norm = row(Launch("aten.native_layer_norm", 0, 1_000_000), machine)
    assert (norm.tiles, norm.perfect, norm.sober) == (0, 1e-3, 1e-3 + schedule.GAP)


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("rows", [128, 256, 2048, 8192])
def test_a_product_of_pytorch_takes_the_best_tile(name, rows):
    """No peak is exceeded, and no candidate of the library would soberly be faster."""
    machine = MACHINES[name]
    launch = Launch("aten.mm", 2 * rows * 4096 * 4096, 0, shape=(rows, 4096))
    found = row(launch, machine)
    assert found.perfect >= launch.flops / machine.rates.matmul
    assert found.sober > found.perfect
    assert len(schedule._tiles(launch)) == len(schedule.LIBRARY)


def test_attention_has_a_tile_for_128_queries():
    launch = Launch(
        "aten._flash_attention_forward", 4 * 2 * 8 * 256 * 64 * 16, 0, shape=(2, 8, 256, 16)
    )
    (tiles,) = schedule._tiles(launch)
    assert tiles == Tiles([launch.flops / 32] * 32)


@pytest.mark.parametrize("images", [1, 8])
def test_a_choice_that_was_not_timed_is_nearly_the_best(monkeypatch, images):
    """At perfect rates of an H100, for every kernel at the shapes of its examples."""
    found = {}

    def untimed(choices, tiles, device):
        taken = rule(choices, tiles, device)
        seconds = {choice: tiles(choice).seconds(132) for choice in choices}
        found[name] = seconds[taken] / min(seconds.values())
        return taken

    rule = tuning.untimed
    monkeypatch.setattr(tuning, "untimed", untimed)
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(cross_attention_queries, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(configs, "architecture", lambda device: 90)
    monkeypatch.setattr(plans, "REMEMBERS", False)
    monkeypatch.setattr(launch.Launch, "_start", lambda self, tensors: None)
    monkeypatch.setenv("VISPROJ_AUTOTUNE", "0")
    sizes = registry.Sizes(images=images, make=partial(torch.empty, device="meta"))
    chosen = {name: example for name, example in registry.load().items() if example.table}
    for name in chosen:
        chosen[name].call(sizes)
    assert found.keys() == chosen.keys()
    assert {name: ratio for name, ratio in found.items() if ratio > 1.1} == {}


@pytest.fixture(scope="module")
def unfolded():
    """With weights of any value: nothing is computed."""
    with torch.device("meta"):
        projector = PerceiverProjector(schedule.WIDTH, schedule.LANG_DIM)
    return {"unfolded": projector.bfloat16().to_empty(device="cpu")}


@pytest.mark.parametrize(
    ("machine", "images"),
    # 128 tiles of one image are two rounds of an A100's 108 processors: 59 % of them are busy.
    [("H100", 1), ("H100", 8), ("H100", 32), ("A100", 8), ("A100", 32)],
)
def test_attention_backward_is_within_a_tenth_of_its_ideal(unfolded, machine, images):
    rows = schedules(unfolded, MACHINES[machine], images)["unfolded", "backward"]
    used = {row.name: row.used for row in rows if "attention_bwd_d" in row.name and row.tiles}
    assert used.keys() == {"_cross_attention_bwd_dkv_kernel", "_cross_attention_bwd_dq_kernel"}
    assert min(used.values()) >= 1 / 1.1, used


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "most"), [("H100", {1: 45, 8: 212, 32: 830}), ("A100", {1: 150})]
)
def test_the_last_line(machine, most):
    """The folded form with the configurations that a run without timing takes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    batches = [f"--batch={images}" for images in most]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.schedule", "--machine", machine, *batches],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    about = f"folded on {machine} at perfect rates, {' '.join(map(str, most))} images: "
    assert last.startswith(about), last
    found = last.removeprefix(about).removesuffix(" us").split()
    for time, (images, bar) in zip(map(int, found), most.items(), strict=True):
        assert 19e9 * images / MACHINES[machine].rates.matmul * 1e6 < time <= bar
    for word in (
        "unfolded backward",
        "upstream forward",
        "SMs used",
        "(model)",
        "_linear_fwd_kernel",
    ):
        assert word in "\n".join(lines)
