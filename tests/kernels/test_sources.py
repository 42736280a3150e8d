"""Every masked load says what it gives where the mask is closed: no tool sees the absence."""

import ast
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "kernels").glob("*.py"))


def loads(source):
    """The calls of ``tl.load`` in a source, by line: the arguments they are given."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "load"):
            positional = ("pointer", "mask", "other")[: len(node.args)]
            found[node.lineno] = {*positional, *(keyword.arg for keyword in node.keywords)}
    return found


def careless(source):
    """Lines of the loads with a mask and nothing for where it is closed."""
    return [line for line, given in loads(source).items() if given & {"mask", "other"} == {"mask"}]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_masked_loads_have_other(path):
    assert not careless(path.read_text())


def test_there_are_loads_to_look_at():
    assert sum(len(loads(path.read_text())) for path in SOURCES) > 20


PLANTED = """
x = tl.load(ptr)
x = tl.load(ptr, mask=inside, other=0.0)
x = tl.load(ptr, inside, 0.0)
x = tiles.load([row, 0])
x = tl.load(ptr, mask=inside)
x = tl.load(ptr, inside)
x = tl.load(
    ptr + rows[:, None], mask=inside, eviction_policy="evict_last"
).to(tl.float32)
"""


def test_a_load_without_other_is_seen():
    assert careless(PLANTED) == [6, 7, 8]
