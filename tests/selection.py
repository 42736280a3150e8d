"""Which tests run, in how many processes, and whether Triton's kernels are interpreted."""

import os
from collections import Counter
from importlib.util import find_spec
from itertools import chain, combinations
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression
from quick import QUICK

PROCESSES = 2
GROUPS = ("slow", "distributed", "sanitizer", "gpu")  # left out unless asked for
NEEDS = {
    "distributed": ("deepspeed", "pip install -c constraints.txt -e '.[distributed]'"),
    "sanitizer": (
        "ttsem",
        "in an environment of its own: pip install -c constraints.txt -e '.[test]' && "
        "pip install --ignore-requires-python --no-deps ttsem==0.1.0 triton==3.8.0",
    ),
}
NOT_RUN = pytest.StashKey[Counter]()


def has_gpu():
    import torch  # not at the top: with several processes the first one runs no test

    return torch.cuda.is_available()


def parse(text):
    """The expression given with ``-m``; without one, what every test satisfies."""
    try:
        return Expression.compile(text or "slow or not slow")
    except Exception as error:  # which class it is depends on pytest's version
        raise pytest.UsageError(f"Wrong expression passed to '-m': {text}: {error}") from None


def holds(expression, marks):
    return expression.evaluate(
        lambda name, **wanted: any(
            mark.name == name and wanted.items() <= mark.kwargs.items() for mark in marks
        )
    )


MARKS = {name: getattr(pytest.mark, name).mark for name in (*GROUPS, "quick")}


def subsets(group):
    """Every choice of the other groups' marks."""
    others = [mark for name, mark in MARKS.items() if name != group]
    return chain.from_iterable(combinations(others, size) for size in range(len(others) + 1))


def asks_for(expression, group, marks=()):
    """Whether the expression selects tests for being in the group.

    That is, there are tests, with these marks and any of the groups', for which it holds if they
    are in the group and does not if they are not.
    """
    return any(
        holds(expression, [*marks, *some, MARKS[group]]) and not holds(expression, [*marks, *some])
        for some in subsets(group)
    )


def selects_only(expression, group):
    """Whether the expression asks for the group and holds for no test outside it."""
    return asks_for(expression, group) and not any(
        holds(expression, some) for some in subsets(group)
    )


def arguments(config):
    """Of each argument of the command line the path and the rest of an id, which may be empty."""
    for argument in config.args:
        path, _, rest = argument.partition("::")
        yield (config.invocation_params.dir / path).resolve(), rest


def is_named(item, config):
    """Whether the command line names the test, or what it is part of, by its id."""
    rest = item.nodeid.partition("::")[2]
    return any(
        item.path == path and name and (rest == name or rest.startswith((f"{name}[", f"{name}::")))
        for path, name in arguments(config)
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Two processes where a folder is asked for; for a file or a test, starting them takes longer.

    Distributed tests start their own. ``-n`` and ``--dist`` come first, and xdist may be missing.
    """
    option = config.option
    decided = getattr(option, "numprocesses", 0) is not None or "PYTEST_XDIST_WORKER" in os.environ
    if decided or option.usepdb or selects_only(parse(option.markexpr), "distributed"):
        return
    if any(path.is_dir() for path, _ in arguments(config)):
        option.numprocesses = PROCESSES
        option.dist = "loadscope" if option.dist == "no" else option.dist


def pytest_configure(config):
    expression = parse(config.option.markexpr)
    sanitizer = selects_only(expression, "sanitizer")
    if asks_for(expression, "sanitizer") and not sanitizer:
        raise pytest.UsageError(
            "sanitizer tests need kernels that are not interpreted, and so a run of their own: "
            "pytest -m sanitizer"
        )
    for group, (package, command) in NEEDS.items():
        if asks_for(expression, group) and not find_spec(package):
            raise pytest.UsageError(f"{group} tests need {package}: {command}")
    # Without a GPU the same tests run the same kernels in Triton's interpreter. Whether it
    # interprets is settled when a kernel is decorated, so it is decided before any is imported.
    folder = Path(__file__).parent / "sanitizer"
    sanitizer |= all(path.is_relative_to(folder) for path, _ in arguments(config))
    runs_tests = not getattr(config.option, "numprocesses", None)
    if runs_tests and not sanitizer and not has_gpu():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_ignore_collect(collection_path, config):
    """The files without a quick test are not even imported for ``-m quick``."""
    if collection_path.suffix != ".py" or not selects_only(parse(config.option.markexpr), "quick"):
        return None
    return True if relative(collection_path) not in QUICK else None


def relative(path):
    return Path(os.path.relpath(path, Path(__file__).parent)).as_posix()


def pytest_itemcollected(item):
    names = QUICK.get(relative(item.path), ())
    if names == "all" or getattr(item, "originalname", item.name) in names:
        item.add_marker("quick")


def pytest_collection_modifyitems(config, items):
    """Leave out the groups that the command line did not ask for, with ``-m`` or by name."""
    expression = parse(config.option.markexpr)
    absent = GROUPS if not has_gpu() else GROUPS[:-1]
    kept, left_out, counts = [], [], Counter()
    for item in items:
        marks = list(item.iter_markers())
        others = [mark for mark in marks if mark.name not in MARKS]
        missing = [
            group
            for group in absent
            if item.get_closest_marker(group) and not asks_for(expression, group, others)
        ]
        # What does not satisfy the expression, pytest itself leaves out.
        if missing and holds(expression, marks) and not is_named(item, config):
            left_out.append(item)
            counts[missing[0]] += 1
        else:
            kept.append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)
    config.stash[NOT_RUN] = counts
    if hasattr(config, "workeroutput"):
        config.workeroutput["not_run"] = dict(counts)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Every xdist worker collects the same tests, so one worker's counts are everybody's."""
    if counts := getattr(node, "workeroutput", {}).get("not_run"):
        node.config.stash[NOT_RUN] = Counter(counts)


def pytest_terminal_summary(terminalreporter, config):
    for group, count in sorted(config.stash.get(NOT_RUN, {}).items()):
        terminalreporter.write_line(
            f"not run: {count} {group} tests; run them with: pytest -m {group}"
        )
