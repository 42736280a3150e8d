"""A floor is a bound only with the best rate that its working set can have."""

import pytest
from benchmarks_support import CPU, small_group

from benchmarks import ceilings as module
from benchmarks.ceilings import Ceilings
from benchmarks.model import Cost, Launch

MIB = 2**20


def test_the_rate_is_that_of_the_working_set():
    """In a cache, at the edge and beyond it."""
    found = Ceilings(CPU, {MIB: 100e9, 2 * MIB: 80e9, 64 * MIB: 12e9, 256 * MIB: 10e9})
    assert found.bandwidth(MIB) == 100e9
    # 3 MiB may fit where 4 do not: the rate is that of the size below.
    assert found.bandwidth(3 * MIB) == 80e9
    assert found.bandwidth(65 * MIB) == 12e9
    assert found.bandwidth(4000 * MIB) == 10e9
    # A smaller working set is never slower: what was measured in a bad moment does not count.
    found.memory[MIB] = 5e9
    assert found.bandwidth(MIB) == 80e9


def test_the_floor_of_what_fits_a_cache_is_lower():
    found = Ceilings(CPU, {MIB: 100e9, 256 * MIB: 10e9}, {"fp32": 1e12})
    small, large = Cost((), MIB), Cost((), 256 * MIB)
    assert found.floor_seconds(small, "fp32") == pytest.approx(MIB / 100e9)
    assert found.floor_seconds(large, "fp32") == pytest.approx(256 * MIB / 10e9)
    product = Cost((Launch("aten.mm", 10**12, 1),), MIB)
    assert found.floor_seconds(product, "fp32") == pytest.approx(1)


@pytest.fixture
def clock(monkeypatch):
    """Every call takes ``clock["seconds"]``; the calls are counted."""
    state = {"seconds": 1e-3, "calls": 0}

    def samples(calls, device, seconds, min_rounds):
        state["calls"] += len(calls)
        for call in calls.values():
            call(0)
        return {name: [9.0, state["seconds"], 9.0] for name in calls}

    monkeypatch.setattr(module, "paired_samples", samples)
    return state


def test_the_best_moment_counts(clock):
    found = Ceilings(CPU)
    shape = small_group().shape  # 2 x 65 rows, 256 deep, 128 wide
    found.observe(shape, [MIB + 1])
    # Of reading one, reading both, and reading both and writing one the last moves most.
    assert found.memory == {MIB: 1.5 * MIB / 1e-3}
    # The largest of 130 x 256 x 128, 130 x 128 x 128 and 128 x 130 x 256.
    assert found.matmul == {"fp32": 2 * 130 * 256 * 128 / 1e-3}
    before = dict(found.memory), dict(found.matmul)
    clock["seconds"] = 2e-3
    found.observe(shape, [MIB])
    assert (found.memory, found.matmul) == before
    clock["seconds"] = 0.5e-3
    found.observe(shape, [MIB])
    assert found.memory == {MIB: 1.5 * MIB / 0.5e-3}
    assert found.matmul == {"fp32": 2 * 130 * 256 * 128 / 0.5e-3}


def test_every_size_and_dtype_is_measured_first(monkeypatch, clock):
    monkeypatch.setitem(module.LARGEST, "cpu", 2**18)
    monkeypatch.setitem(module.SQUARES, "cpu", (8, 16))
    found = Ceilings(CPU)
    found.measure(["fp32", "bf16"])
    assert list(found.memory) == [2**16, 2**17, 2**18]
    assert found.matmul == dict.fromkeys(("fp32", "bf16"), 2 * 16**3 / 1e-3)
    assert clock["calls"] == 3 * 3 + 2 * 2
    assert found.notes() == {
        "best memory": "64 KiB 0.4 GB/s, 128 KiB 0.4 GB/s, 256 KiB 0.4 GB/s",
        "best matmul": "fp32 0 GFLOP/s, bf16 0 GFLOP/s",
    }
    # What is larger or smaller than anything measured has the rate of the nearest.
    found.observe(small_group().shape, [1, 2**30])
    assert list(found.memory) == [2**16, 2**17, 2**18]


def test_real_rates():
    found = Ceilings(CPU)
    found.observe(small_group().shape, [2**20])
    # From a busy core of a slow machine to a server's cache.
    assert 1e7 < found.bandwidth(2**20) < 1e14
    assert 1e7 < found.matmul["fp32"] < 1e15
