"""Which module may import which: the contracts in pyproject.toml, each seen to break."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def copy(tmp_path):
    """The package with its kernels inside, where import-linter finds them."""
    shutil.copytree(ROOT / "visproj", tmp_path / "visproj")
    shutil.copytree(ROOT / "kernels", tmp_path / "visproj" / "kernels")
    (tmp_path / "visproj" / "kernels" / "__init__.py").touch()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(folder):
    """Names of the broken contracts."""
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    verdicts = [line for line in lines if " KEPT" in line or " BROKEN" in line]
    broken = [line.partition(" BROKEN")[0] for line in verdicts if " BROKEN" in line]
    assert verdicts, done.stdout + done.stderr
    assert done.returncode == bool(broken), done.stdout + done.stderr
    return broken


def test_contracts_are_kept(copy):
    assert lint(copy) == []


LAYERS = "Imports run one way"
VIOLATIONS = {
    LAYERS: ("resampler.py", "from visproj.projectors import LinearProjector"),
    "The kernels know nothing of visproj but files and errors": (
        "kernels/layer_norm.py",
        "from visproj.positions import Grid",
    ),
    "The backend knows of the kernels only whether they can run": (
        "backend.py",
        "from visproj.kernels.linear import linear_fwd",
    ),
    "The oracle knows neither operations nor kernels": (
        "reference/projectors.py",
        "from visproj import ops",
    ),
    "Nothing but the demo uses the oracle": (
        "conversion.py",
        "from visproj.reference import projector_ref",
    ),
    "No circles": ("vlm/compose.py", "from visproj.vlm import model"),
}


@pytest.mark.slow
@pytest.mark.parametrize("contract", VIOLATIONS)
def test_a_planted_violation_is_reported(copy, contract):
    name, line = VIOLATIONS[contract]
    path = copy / "visproj" / name
    path.write_text(f"{path.read_text()}\n\n{line}\n")
    assert contract in lint(copy)
