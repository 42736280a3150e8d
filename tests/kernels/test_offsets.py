"""Offsets beyond 2**31 elements, in a process that may crash."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels need triton")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("offsets.py")
CASES = [
    *(f"linear {d}" for d in (0, 1, "weight", "table")),
    "weight gradient",
    "packed attention",
    *(f"attention {t} {d}" for t in ("q", "k", "v", "mask", "gradients") for d in (0, 1, 2)),
]


@pytest.fixture(scope="module")
def errors():
    """What ran before a crash is there, the rest is missing."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {(name, style): error for name, style, error in lines}, done.stderr


@pytest.mark.parametrize("style", ["pointers", "descriptors"])
@pytest.mark.parametrize("case", CASES)
def test_far_apart(case, style, errors):
    found, trouble = errors
    assert (case, style) in found, f"the process ended before: {trouble[-2000:]}"
    # bf16: roundings of 0.002 each, of probabilities, result and gradient.
    assert found[case, style] < 0.01
