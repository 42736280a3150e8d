"""What a call costs the host, with a driver that launches nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
# Of the time of upstream's eager module, as measured on an idle machine; other tests run beside
# this one and take the caches from both sides, which costs the longer code more.
BARS = {"folded": 1.0, "unfolded": 1.5, "training": 2.0}
BUSY = 1.25


@pytest.mark.slow
def test_the_last_line_holds_the_bars():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.host_cost"],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert "Perceiver, C 8, D 16, fp32, one image" in table[0]
    number = r"(\d+\.\d\d)"
    found = re.fullmatch(
        f"host time of upstream's: folded {number} unfolded {number} training {number}", last
    )
    assert found, last
    for ratio, (name, bar) in zip(map(float, found.groups()), BARS.items(), strict=True):
        assert 0.1 < ratio <= BUSY * bar, (name, last)
