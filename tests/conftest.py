"""Device, threads and seeds; ``selection`` holds the hooks that decide what runs."""

import os
import sys

import pytest
from selection import (  # noqa: F401
    pytest_cmdline_main,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_ignore_collect,
    pytest_itemcollected,
    pytest_terminal_summary,
    pytest_testnodedown,
)


@pytest.fixture(scope="session", autouse=True)
def threads():
    """One for each of several processes."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device():
    """Where the tests run: a GPU if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def nothing_planned():
    """No launch is the plan of another test, which may have changed what plans follow from."""
    if plans := sys.modules.get("visproj.kernels.plans"):
        plans._plans.clear()


@pytest.fixture(autouse=True)
def seeded():
    import torch

    torch.manual_seed(0)
