"""Device, threads, and the one line for every group of tests that was not run."""

import os
from collections import Counter

import pytest
import torch

# What each group needs before it runs without being asked for by name.
GROUPS = {
    "slow": lambda: False,
    "distributed": lambda: False,
    "sanitizer": lambda: False,
    "gpu": torch.cuda.is_available,
}


def pytest_configure(config):
    # Without a GPU the same tests run the same kernels in Triton's interpreter. Whether it
    # interprets is settled when a kernel is decorated, so it is decided before any is imported.
    if not torch.cuda.is_available() and config.option.markexpr != "sanitizer":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Leave out the groups that the command line did not ask for with ``-m``."""
    if config.option.markexpr:
        return
    kept, left_out = [], []
    for item in items:
        groups = [group for group in GROUPS if item.get_closest_marker(group)]
        run = all(GROUPS[group]() for group in groups)
        (kept if run else left_out).append((item, groups))
    items[:] = [item for item, _ in kept]
    config.hook.pytest_deselected(items=[item for item, _ in left_out])
    counts = Counter(groups[0] for _, groups in left_out)
    config.stash[NOT_RUN] = counts
    if hasattr(config, "workeroutput"):
        config.workeroutput["not_run"] = dict(counts)


NOT_RUN = pytest.StashKey[Counter]()


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


@pytest.fixture(scope="session")
def device():
    """Where the tests run: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
