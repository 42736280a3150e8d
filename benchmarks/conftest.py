"""pytest's options for the benchmarks: one process, and the set of cases."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import SETS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--set",
        dest="case_set",
        choices=SETS,
        help="set to measure after the smoke set; by default none on a CPU, quick on a GPU",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Switch pytest-xdist off: processes that run at the same time disturb each other's times."""
    config.option.numprocesses = 0
    config.option.dist = "no"
    config.option.tx = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test per implementation, shape and mode, in the order of the groups."""
    from benchmarks.test_projectors import cases

    asked = metafunc.config.option.case_set or ("quick" if torch.cuda.is_available() else "smoke")
    if "case" in metafunc.fixturenames:
        found = [case for name in dict.fromkeys(("smoke", asked)) for case in cases(name)]
        metafunc.parametrize("case", found, ids=str)
