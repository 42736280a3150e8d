"""The repair of Triton's interpreter: with it every check passes, without it the checks notice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels need triton")

ROOT = Path(__file__).resolve().parent.parent.parent
MODULE = ROOT / "kernels" / "interpreter.py"
CHECKS = Path(__file__).with_name("interpreter_kernels.py")

# What the stock interpreter gets right in triton 3.6.0, 3.7.1 and 3.8.0; it fails everything else.
RIGHT_IN_STOCK = {
    "absolute_values",
    "atomics_raise",
    "bitcasts",
    "casts_to_and_from_fp8",
    "descriptors",
    "dots_in_full_fp32",
    "dots_of_fp16_accumulate_in_fp32",
    "layouts",
    "repairing_twice_is_repairing_once",
}


def python(*arguments):
    """Triton decides once per process, as it is imported, hence a process for every answer."""
    settings = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def wrong(state):
    """What is wrong by name of the check, and the names of the checks with nothing wrong."""
    report = json.loads(python(str(CHECKS), state))
    return {name: found for name, found in report.items() if found}, {
        name for name, found in report.items() if not found
    }


def test_repaired_interpreter_computes_bf16_like_torch():
    failed, passed = wrong("repaired")
    assert not failed
    assert passed > RIGHT_IN_STOCK


def test_stock_interpreter_fails_the_same_checks():
    """A gate that cannot fail is no gate. Should triton repair itself, this says what to delete."""
    failed, passed = wrong("stock")
    print("fails in the stock interpreter:", *sorted(failed), sep="\n  ")
    assert passed == RIGHT_IN_STOCK
    assert {"dots_of_bf16", "casts_from_fp32", "arithmetic", "comparisons"} <= set(failed)


def test_triton_is_imported_when_asked_for():
    """Run by path: as visproj.kernels.interpreter it would bring torch, seconds of it."""
    out = python(
        "-c",
        "import os, runpy, sys\n"
        f"interpreting = runpy.run_path({str(MODULE)!r})['interpreting']\n"
        "print('triton' in sys.modules, interpreting(), 'triton' in sys.modules)\n"
        "os.environ['TRITON_INTERPRET'] = '0'\n"
        "print(interpreting())",
    )
    assert out.split() == ["False", "True", "True", "False"]
