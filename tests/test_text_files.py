"""Text files are UTF-8 on every machine, whatever its own encoding is."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for name in ("visproj", "benchmarks") for path in (ROOT / name).rglob("*.py"))


def without_encoding(tree):
    """Lines of calls that read or write text in the machine's own encoding."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or any(word.arg == "encoding" for word in call.keywords):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        modes = [*call.args, *(word.value for word in call.keywords if word.arg == "mode")]
        binary = any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)
        owner = getattr(getattr(call.func, "value", None), "id", "")
        opens = name in ("open", "fdopen") and owner not in ("os", "Image")
        if name in ("read_text", "write_text") or (opens and not binary):
            yield call.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_has_an_encoding(path):
    assert list(without_encoding(ast.parse(path.read_text(encoding="utf-8")))) == []


def test_what_is_found():
    text = "p.open()\nopen(f, 'w')\np.write_text(t)\np.open('rb')\nopen(f, encoding='utf-8')"
    assert list(without_encoding(ast.parse(text))) == [1, 2, 3]
