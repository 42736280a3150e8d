"""Launches that were planned before: the same launches, and only for operands of the same kind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels_support import random

plans = pytest.importorskip("visproj.kernels.plans", reason="kernels need triton")

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_planned_launch_is_the_binders():
    """In a process in which Triton compiles: arguments, grid, kernel and allocator are equal."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "kernels_plans.py"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-2000:]
    assert int(done.stderr.split()[0]) > 60


def operands():
    return [torch.ones(4, 8), None, torch.ones(3)]


CHANGES = {
    "name": lambda o: ("other", o, 1),
    "setting": lambda o: ("op", o, 2),
    "shape": lambda o: ("op", [torch.ones(5, 8), *o[1:]], 1),
    "stride": lambda o: ("op", [torch.ones(8, 4).T, *o[1:]], 1),
    "dtype": lambda o: ("op", [o[0].bfloat16(), *o[1:]], 1),
    "alignment": lambda o: ("op", [torch.ones(33)[1:].view(4, 8), *o[1:]], 1),
    "absent": lambda o: ("op", [o[0], None, None], 1),
    "present": lambda o: ("op", [o[0], o[2], o[2]], 1),
    "order": lambda o: ("op", [o[2], None, o[0]], 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_key_depends_on(change):
    want = plans.key_of("op", operands(), 1)
    assert want == plans.key_of("op", operands(), 1)
    x, _, vector = operands()
    assert want == plans.key_of("op", [torch.nn.Parameter(x), None, vector], 1)
    assert want != plans.key_of(*CHANGES[change](operands()))


def test_subclasses_have_no_key(monkeypatch):
    with torch._subclasses.FakeTensorMode():
        assert plans.key_of("op", [torch.ones(3)]) is None
    monkeypatch.setattr(plans, "REMEMBERS", False)
    assert plans.key_of("op", operands()) is None


def test_only_what_is_settled_is_remembered(monkeypatch):
    made = iter(["first", "second", "third", "other"])
    key = plans.key_of("op", operands())
    assert plans.recall(key, lambda: (next(made), False)) == "first"
    assert plans.recall(key, lambda: (next(made), True)) == "second"
    assert plans.recall(key, lambda: (next(made), True)) == "second"
    assert plans.recall(None, lambda: (next(made), True)) == "third"
    monkeypatch.setattr(plans, "MOST", 1)
    plans.recall(("another",), lambda: (next(made), True))
    assert list(plans._plans) == [("another",)]


def test_shapes_layouts_and_dtypes_in_turn(tiles, device, monkeypatch):
    """Each plan computes what a call without plans does, whatever ran in between."""
    from visproj.kernels.linear import Epilogue, folded_linear_fwd, linear_fwd

    tiles()

    def calls():
        for dtype in (torch.float32, torch.bfloat16):
            for rows, gap in ((5, 0), (7, 1), (5, 1)):
                torch.manual_seed(rows)
                x = random(2, rows + gap, 24, dtype=dtype, device=device)[:, gap:]
                weight, bias = (random(*s, dtype=dtype, device=device) for s in ((40, 24), (40,)))
                factor = random(24, 24, dtype=dtype, device=device).triu()
                yield linear_fwd(x, weight)
                yield linear_fwd(x, weight, Epilogue(bias=bias))
                yield folded_linear_fwd(x, weight, bias, factor, bias[:24], None, None, 1e-5)
                yield folded_linear_fwd(x, weight, bias, factor, bias[:24], bias, None, 1e-5)

    first = list(calls())
    assert len(plans._plans) == 24
    again = list(calls())
    assert len(plans._plans) == 24
    monkeypatch.setattr(plans, "REMEMBERS", False)
    for got, repeated, want in zip(first, again, calls(), strict=True):
        assert torch.equal(got, want)
        assert torch.equal(repeated, want)
