"""What importing and installing the package does, each in a process of its own."""

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import visproj

ROOT = Path(__file__).resolve().parent.parent

BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocker())
"""


def run(code, cwd=ROOT):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("blocked", ["triton", "transformers"])
def test_works_without(blocked):
    out = run(
        BLOCK.format(names={blocked})
        + "import torch, visproj\n"
        + "p = visproj.PerceiverProjector(32, 64)\n"
        + "print(*p(torch.randn(1, 50, 32)).shape)"
    )
    assert out.split() == ["1", "256", "64"]


def test_imports_neither_triton_nor_transformers():
    out = run("import sys, visproj; print({'triton', 'transformers', 'typer'} & set(sys.modules))")
    assert out.strip() == "set()"


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_kernels_is_ours_only_below_visproj(where, tmp_path):
    """The folder must not hide Hugging Face's distribution ``kernels`` from transformers."""
    cwd = ROOT if where == "root" else tmp_path
    out = run(
        "import importlib.util, visproj.kernels.support as support\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "print(spec is None or spec.loader is None or 'site-packages' in str(spec.origin))\n"
        "print(support.why_unavailable.__module__)",
        cwd,
    )
    assert out.split() == ["True", "visproj.kernels.support"]


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_transformers_models_import_after_visproj(where, tmp_path):
    cwd = ROOT if where == "root" else tmp_path
    out = run(
        "import visproj\n"
        "from transformers import CLIPVisionModel, LlamaForCausalLM, Trainer\n"
        "print(CLIPVisionModel.__name__, LlamaForCausalLM.__name__, Trainer.__name__)",
        cwd,
    )
    assert out.split() == ["CLIPVisionModel", "LlamaForCausalLM", "Trainer"]


def test_an_uninstalled_clone_works(tmp_path):
    """From a copy of the tree that is not on any installed path."""
    for folder in ("visproj", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    out = run(
        "import visproj, visproj.kernels.support as s; print(visproj.__file__, s.__file__)",
        tmp_path,
    )
    assert all(path.startswith(str(tmp_path)) for path in out.split())


def test_why_triton_kernels_cannot_run():
    out = run(
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import torch, visproj.kernels.support as s; cpu = torch.device('cpu')\n"
        "print(s.why_unavailable(cpu)); s.find_spec = lambda name: None\n"
        "print(s.why_unavailable(cpu))"
    )
    assert out.splitlines() == [
        "the tensors are on cpu, not on a GPU",
        "triton is not installed (pip install triton)",
    ]


def test_version_and_public_names():
    assert visproj.__version__ == importlib.metadata.version("visproj")
    assert all(hasattr(visproj, name) for name in visproj.__all__)
