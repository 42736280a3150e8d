"""The registry for pytest-benchmark: ``pytest benchmarks --benchmark-only [-k smoke]``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

import pytest
import torch

from benchmarks.cases import Group, Implementation, groups
from benchmarks.measure import synchronise
from benchmarks.suite import Prepared, prepare


@dataclass(frozen=True)
class Case:
    """One implementation of a group in one mode."""

    set_name: str
    group: Group
    entry: Implementation
    mode: str

    def __str__(self) -> str:
        name = self.entry.name.replace(" ", "_")
        return f"{self.set_name}-{self.group.task.name}-{name}-{self.group.shape}-{self.mode}"


def cases(set_name: str) -> Iterator[Case]:
    """Yield all cases of a set, group by group."""
    for group in groups(set_name):
        for entry in group.implementations():
            for mode in group.modes:
                if entry.trains or mode == "forward":
                    yield Case(set_name, group, entry, mode)


@lru_cache(maxsize=1)
def _prepared(group: Group) -> Prepared:
    return prepare(group, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.mark.benchmark(max_time=0.3)
def test_time(case: Case, benchmark: Any) -> None:
    """Time an implementation only if its result agrees with the oracle."""
    with torch._functorch.config.patch(donated_buffer=False):
        prepared = _prepared(case.group)
        candidate = next(c for c in prepared.candidates if c.entry.name == case.entry.name)
        if candidate.left_out:
            pytest.skip(candidate.left_out)
        if candidate.verdict.failure:
            pytest.fail(candidate.verdict.failure)
        assert candidate.costs is not None
        cost = candidate.costs[case.mode]
        benchmark.group = f"{case.group.task.name}-{case.group.shape}-{case.mode}"
        benchmark.extra_info["model_gflop"] = cost.flops / 1e9
        benchmark.extra_info["model_min_mb"] = cost.min_bytes / 1e6
        with torch.set_grad_enabled(case.mode != "forward"):
            call, number = prepared.call(candidate, case.mode), count()

            def run() -> None:
                call(next(number))
                synchronise(prepared.device)

            benchmark(run)
