"""A registry small enough to run in a test."""

import torch

from benchmarks import cases
from benchmarks.ceilings import Ceilings

CPU = torch.device("cpu")


class FixedCeilings(Ceilings):
    """Rates that nothing changes: 10 GB/s at every size, 100 GFLOP/s."""

    def __init__(self, device=CPU):
        super().__init__(device, {2**28: 1e10}, {"fp32": 1e11, "bf16": 1e11})

    def measure(self, dtypes):
        pass

    def observe(self, shape, working_sets):
        pass


def small_group(task="linear_layer_norm", batch=2, dtype="fp32", modes=cases.MODES, lang_dim=128):
    shape = cases.Shape(cases.ENCODERS["tiny"], lang_dim, batch, dtype)
    return cases.Group(cases.TASKS[task], shape, modes, compiled=False)


def use_small_set(monkeypatch, count=3, *, draws=False):
    """Make ``smoke`` a few groups of one quick task; plots, which take longer, on request."""
    found = [small_group(batch=batch) for batch in range(1, count + 1)]
    monkeypatch.setattr("benchmarks.report.groups", lambda name: found)
    monkeypatch.setattr("benchmarks.report.Ceilings", FixedCeilings)
    if not draws:
        monkeypatch.setattr("benchmarks.plots.draw", lambda results, folder: [])


def add(monkeypatch, task, name, build, **options):
    """One more implementation: one entry in the registry."""
    entry = cases.Implementation(task, name, build, **options)
    monkeypatch.setattr(cases, "IMPLEMENTATIONS", [*cases.IMPLEMENTATIONS, entry])
