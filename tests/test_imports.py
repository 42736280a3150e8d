"""What the sources import: the submodules that they use, and packages that an extra brings."""

import ast
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from visproj.info import distributions
from visproj.outcome import REQUIREMENTS

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    path
    for folder in ("visproj", "kernels", "benchmarks")
    for path in ROOT.glob(f"{folder}/**/*.py")
]

# Reads {module: [dotted names below it]}; prints those that are not there after `import module`
# alone, because they are submodules. Names that a package imports at their first use are.
PROBE = """
import importlib, json, sys
from types import ModuleType
missing = []
for module, names in json.load(sys.stdin).items():
    try:
        start = importlib.import_module(module)
    except ImportError:
        continue
    for lazily in (False, True):
        for name in list(names):
            found = start
            for part in name.split("."):
                if not lazily and part not in vars(found):
                    break
                try:
                    found = getattr(found, part)
                except AttributeError:
                    missing.append(f"{module}.{name}")
                    break
                if not isinstance(found, ModuleType):
                    names.remove(name)
                    break
            else:
                names.remove(name)
print(json.dumps(missing))
"""


def imports(tree):
    """Modules imported whole, by the name that they are bound to, and all dotted names imported."""
    bound, dotted = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            dotted.add(node.module)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                dotted.add(alias.name)
                top = alias.name.partition(".")[0]
                bound[alias.asname or top] = alias.name if alias.asname else top
    return bound, dotted


def chains(tree, names):
    """Dotted names that begin with one of ``names``, the longest of each expression."""
    inner = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node not in inner:
            parts = []
            while isinstance(node, ast.Attribute):
                parts.append(node.attr)
                node = node.value
                inner.add(node)
            if isinstance(node, ast.Name) and node.id in names:
                yield node.id, ".".join(reversed(parts))


def missing_submodules(used):
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=json.dumps(used),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def uses():
    """``{module: {dotted name below it: {files}}}`` for modules that are imported whole."""
    found = defaultdict(lambda: defaultdict(set))
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        bound, dotted = imports(tree)
        for name, chain in chains(tree, bound):
            module = bound[name]
            whole = f"{module}.{chain}."
            if not any(whole.startswith(f"{other}.") and other != module for other in dotted):
                found[module][chain].add(str(path.relative_to(ROOT)))
    return found


def test_submodules_are_imported_by_their_own_names():
    """``import package`` alone does not import them, unless something else has done so before."""
    found = uses()
    missing = missing_submodules({module: sorted(chains) for module, chains in found.items()})
    files = {name: found[name.partition(".")[0]][name.partition(".")[2]] for name in missing}
    assert files == {}


def test_the_probe_finds_a_submodule():
    used = {"huggingface_hub": ["utils.logging.set_verbosity_error", "hf_hub_download"]}
    used |= {"torch": ["nn.functional.relu", "_dynamo.reset"], "xml": ["dom"], "json": ["dumps"]}
    missing = ["huggingface_hub.utils.logging.set_verbosity_error", "xml.dom"]
    assert missing_submodules(used) == missing


def test_every_package_says_how_to_install_it():
    """What the command line answers where one is missing; see pyproject.toml for the extras."""
    imported = set()
    for path in SOURCES:
        if "benchmarks" not in path.relative_to(ROOT).parts:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            imported |= {name.partition(".")[0] for name in imports(tree)[1]}
    without = {"visproj", "benchmarks", "rich", "typer"}  # there is no command line without these
    without |= {"triton", "deepspeed", "typing_extensions"}  # used only where they are
    assert imported - sys.stdlib_module_names - without <= set(REQUIREMENTS)

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name, requirement in distributions().items():
        extra = re.search(r"\[(.+)\]", requirement)
        table = extra[1] if extra else "dependencies"
        listed = re.search(rf"^{table} = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)
        packages = [re.split("[<>=;]", line)[0] for line in ast.literal_eval(listed[1])]
        assert name in {package.replace("_", "-") for package in packages}, requirement
