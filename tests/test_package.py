"""What importing and installing the package does, each in a process of its own."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

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


# Hugging Face's ``kernels`` as far as transformers looks at it while it is imported.
KERNELS = """
import enum
class Mode(enum.Flag):
    FALLBACK = enum.auto()
    INFERENCE = enum.auto()
    TRAINING = enum.auto()
    TORCH_COMPILE = enum.auto()
def __getattr__(name):
    if name.startswith("_"):
        raise AttributeError(name)
    return type(name, (), {"__new__": lambda cls, *args, **options: lambda target: target})
"""


def run(code, cwd=ROOT, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
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


def test_imports_neither_torch_nor_triton_nor_transformers():
    """Importing it takes milliseconds, and using a projector needs nothing that few have."""
    out = run(
        "import sys, visproj\n"
        "print({'torch', 'numpy', 'visproj.backend'} & set(sys.modules))\n"
        "seldom = {'triton', 'transformers', 'typer', 'safetensors', 'visproj.qwen_vl',\n"
        "          'visproj.conversion', 'visproj.weights'}\n"
        "print(visproj.PerceiverProjector.__name__, visproj.backend.BACKENDS[0])\n"
        "print(seldom & set(sys.modules)); print(visproj.convert, visproj.save_projector)"
    )
    assert out.splitlines()[:3] == ["set()", "PerceiverProjector auto", "set()"]


def test_only_its_own_names_are_attributes():
    """The root of the repository is searched for ``kernels`` alone."""
    assert visproj.kernels.__name__ == "visproj.kernels"
    for name in ("setup", "tests", "benchmarks", "nothing", "__wrapped__"):
        assert not hasattr(visproj, name)


def test_a_saved_program_loads_once_the_operations_are_imported(tmp_path):
    """``torch.export`` keeps the names of custom operations; ``visproj.ops`` registers them."""
    with visproj.use_backend("triton"):
        projector = visproj.LinearProjector(16, 32).eval()
        program = torch.export.export(projector, (torch.randn(1, 5, 16),))
    assert "visproj.linear_layer_norm_fwd" in str(program.graph)
    torch.export.save(program, tmp_path / "program.pt2")
    graph = run(
        "import torch, visproj.ops; print(torch.export.load('program.pt2').graph)",
        tmp_path,
        PYTHONPATH=str(ROOT),
    )
    assert "visproj.linear_layer_norm_fwd" in graph


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


def install_kernels(folder):
    """A stand-in for Hugging Face's distribution, of the version that transformers asks for."""
    version = getattr(transformers.utils.import_utils, "KERNELS_MIN_VERSION", "0.10.0")
    metadata = folder / f"kernels-{version}.dist-info" / "METADATA"
    package = folder / "kernels" / "__init__.py"
    for file, text in {
        metadata: f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n",
        package: KERNELS,
    }.items():
        file.parent.mkdir(parents=True)
        file.write_text(text)


@pytest.mark.parametrize("where", ["root", "elsewhere"])
@pytest.mark.parametrize("installed", [False, True], ids=["without kernels", "with kernels"])
def test_transformers_imports_after_visproj(installed, where, tmp_path):
    """With Hugging Face's distribution ``kernels`` and without it, our folder being in the way."""
    spec = importlib.util.find_spec("kernels")  # our own folder, of which no file is the origin
    if not installed and spec is not None and spec.origin is not None:
        pytest.skip(f"kernels is installed here: {spec.origin}")
    packages = tmp_path / "packages"
    if installed:
        install_kernels(packages)
    out = run(
        "import sys, visproj\n"
        "from transformers import CLIPVisionModel, LlamaForCausalLM, Trainer\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "print(CLIPVisionModel.__name__, LlamaForCausalLM.__name__, Trainer.__name__)\n"
        "print(is_kernels_available(), getattr(sys.modules.get('kernels'), '__file__', None))\n"
        "import visproj.kernels.support",
        ROOT if where == "root" else tmp_path,
        PYTHONPATH=os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")]),
    )
    names, found = out.splitlines()
    assert names.split() == ["CLIPVisionModel", "LlamaForCausalLM", "Trainer"]
    file = packages / "kernels" / "__init__.py"
    assert found == (f"True {file}" if installed else "False None")


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
