"""What pytest runs for the expressions, files and ids that a command line may hold."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import selection
from quick import QUICK

ROOT = Path(__file__).resolve().parent.parent

pytest_plugins = "pytester"

SUITE = """
    import pytest

    def test_plain(): pass

    @pytest.mark.slow
    def test_slow(): pass

    @pytest.mark.gpu
    @pytest.mark.parametrize("n", [1])
    def test_gpu(n): pass

    @pytest.mark.slow
    @pytest.mark.gpu
    def test_slow_gpu(): pass

    @pytest.mark.distributed
    def test_distributed(): pass

    @pytest.mark.sanitizer
    def test_sanitizer(): pass
"""
MARKERS = "[pytest]\nmarkers =\n    slow\n    gpu\n    distributed\n    sanitizer\n    quick\n"
WITHOUT_GPU = {
    "": "plain",
    "not gpu": "plain",
    "not slow": "plain",
    "not slow and not gpu": "plain",
    "not sanitizer": "plain",
    "slow": "slow",
    "slow and not gpu": "slow",
    "not (not slow)": "slow",
    "slow or not slow": "plain",
    "slow or not gpu": "plain slow",
    "gpu": "gpu[1]",
    "slow or gpu": "slow gpu[1] slow_gpu",
    "slow or not distributed": "plain slow",
    "quick or slow": "slow",
    "slow and gpu": "slow_gpu",
    "distributed": "distributed",
    "distributed and not slow": "distributed",
    "sanitizer": "sanitizer",
    "sanitizer and not slow": "sanitizer",
    "parametrize": "",
    "parametrize and gpu": "gpu[1]",
}
WITH_GPU = {
    "": "plain gpu[1]",
    "not gpu": "plain",
    "not slow": "plain gpu[1]",
    "slow": "slow slow_gpu",
    "slow and not gpu": "slow",
    "gpu": "gpu[1]",
    "slow or gpu": "slow gpu[1] slow_gpu",
    "parametrize": "gpu[1]",
}


MARKS = {
    "plain": [],
    "slow": ["slow"],
    "gpu[1]": ["gpu", "parametrize"],
    "slow_gpu": ["slow", "gpu"],
    "distributed": ["distributed"],
    "sanitizer": ["sanitizer"],
}


def items():
    """The suite's tests, as far as the selection looks at them."""
    for name, marks in MARKS.items():
        found = {mark: getattr(pytest.mark, mark).mark for mark in marks}
        yield SimpleNamespace(
            name=name,
            path=Path("/suite/test_suite.py"),
            nodeid=f"test_suite.py::test_{name}",
            iter_markers=found.values,
            get_closest_marker=found.get,
        )


def selected(monkeypatch, expression="", args=(), gpu=False):
    """Names of the tests that stay, pytest's own selection by mark included."""
    monkeypatch.setattr(selection, "has_gpu", lambda: gpu)
    kept, config = list(items()), mock.MagicMock(args=args)
    config.option.markexpr = expression
    config.invocation_params.dir = Path("/suite")
    selection.pytest_collection_modifyitems(config, kept)
    parsed = selection.parse(expression)
    return " ".join(one.name for one in kept if selection.holds(parsed, [*one.iter_markers()]))


@pytest.mark.parametrize(
    ("gpu", "expression"),
    [(False, text) for text in WITHOUT_GPU] + [(True, text) for text in WITH_GPU],
)
def test_expressions(gpu, expression, monkeypatch):
    wanted = (WITH_GPU if gpu else WITHOUT_GPU)[expression]
    assert selected(monkeypatch, expression, gpu=gpu) == wanted


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("test_slow", "plain slow"),
        ("test_gpu", "plain gpu[1]"),
        ("test_gpu[1]", "plain gpu[1]"),
        ("test_plain", "plain"),
    ],
)
def test_a_test_named_by_its_id_runs(name, runs, monkeypatch):
    assert selected(monkeypatch, args=[f"test_suite.py::{name}"]) == runs
    assert selected(monkeypatch, args=[f"/suite/test_suite.py::{name}"]) == runs
    assert selected(monkeypatch, args=[f"other.py::{name}"]) == "plain"
    assert selected(monkeypatch, "not (slow or gpu)", [f"test_suite.py::{name}"]) == "plain"


@pytest.fixture
def run(pytester, monkeypatch):
    """What pytest prints for some arguments, a line after the other."""
    monkeypatch.setattr(selection, "NEEDS", {})
    monkeypatch.setattr(selection, "has_gpu", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # to be put back
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makefile(".ini", pytest=MARKERS)
    pytester.makepyfile(test_suite=SUITE)

    def inner(*arguments):
        result = pytester.runpytest_inprocess(*arguments, "-v", plugins=[selection])
        return "\n".join(result.outlines + result.errlines)

    return inner


def test_pytest_itself(run):
    """The hooks in a run, with the tests of ``MARKS`` in a file."""
    output = run()
    assert "not run: 2 slow tests; run them with: pytest -m slow" in output
    assert "1 passed, 5 deselected" in output
    output = run("-m", "not slow")
    assert "slow tests" not in output
    assert "1 passed, 5 deselected" in output
    assert "1 passed" in run("test_suite.py::test_slow")


def test_a_wrong_expression_is_one_line(run):
    assert "ERROR: Wrong expression passed to '-m': slow and (" in run("-m", "slow and (")


@pytest.mark.parametrize("group", selection.NEEDS)
def test_a_missing_package_is_one_line(group, run, monkeypatch):
    monkeypatch.setattr(selection, "NEEDS", {group: ("no_such_package", "pip install it")})
    output = run("-m", f"{group} and not slow")
    assert f"ERROR: {group} tests need no_such_package: pip install it" in output
    assert "passed" not in output
    assert "Traceback" not in output


def test_sanitizer_tests_run_alone():
    config = mock.MagicMock()
    config.option.markexpr = "sanitizer or slow"
    with pytest.raises(pytest.UsageError, match="sanitizer tests need"):
        selection.pytest_configure(config)


@pytest.mark.parametrize(
    ("expression", "args", "interpreted"),
    [
        ("", ["tests"], True),
        ("not sanitizer", ["tests"], True),
        ("sanitizer", ["tests"], False),
        ("sanitizer and not slow", ["tests"], False),
        ("", ["tests/sanitizer/test_planted.py::test_pretend"], False),
        ("", ["tests/sanitizer", "tests/kernels"], True),
    ],
)
def test_who_interprets(expression, args, interpreted, monkeypatch):
    monkeypatch.setattr(selection, "NEEDS", {})
    monkeypatch.setattr(selection, "has_gpu", lambda: False)
    monkeypatch.setattr(selection.os, "environ", {})
    config = mock.MagicMock(args=args)
    config.option.markexpr, config.option.numprocesses = expression, None
    config.invocation_params.dir = ROOT
    selection.pytest_configure(config)
    assert ("TRITON_INTERPRET" in selection.os.environ) == interpreted


@pytest.mark.parametrize(
    ("arguments", "expression", "options", "processes"),
    [
        (["tests"], "", {}, 2),
        (["tests"], "slow", {}, 2),
        (["tests"], "distributed", {}, None),
        (["tests"], "", {"numprocesses": 0}, 0),
        (["tests"], "", {"numprocesses": 4}, 4),
        (["tests"], "", {"usepdb": True}, None),
        (["tests/test_suite.py"], "", {}, None),
        (["tests/test_suite.py::test_plain"], "", {}, None),
        (["tests/test_suite.py", "tests"], "", {}, 2),
    ],
)
def test_processes(arguments, expression, options, processes, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    option = start(tmp_path, arguments, markexpr=expression, **options)
    assert option.numprocesses == processes
    assert option.dist == ("loadscope" if processes == 2 else "no")


def start(folder, args, **options):
    """The options after the hook that decides on processes."""
    (folder / "tests").mkdir()
    given = {"numprocesses": None, "dist": "no", "usepdb": False, "markexpr": ""}
    config = SimpleNamespace(
        option=SimpleNamespace(**given | options),
        args=args,
        invocation_params=SimpleNamespace(dir=folder),
    )
    selection.pytest_cmdline_main(config)
    return config.option


def test_a_worker_starts_no_workers(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    assert start(tmp_path, ["tests"]).numprocesses is None


@pytest.mark.parametrize("path", QUICK)
def test_quick_tests_exist(path):
    """A test that is renamed or moved would drop out unseen."""
    source = (ROOT / "tests" / path).read_text()
    for name in () if QUICK[path] == "all" else QUICK[path]:
        assert f"def {name}(" in source
