"""One process, and which set of cases."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import SETS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--set",
        dest="case_set",
        choices=SETS,
        help="cases beside the smoke set; by default none on a CPU, quick on a GPU",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Processes beside each other would measure each other, so pytest-xdist stays out."""
    config.option.numprocesses = 0
    config.option.dist = "no"
    config.option.tx = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test an implementation, shape and mode, in the order that groups are measured in."""
    from benchmarks.test_projectors import cases

    asked = metafunc.config.option.case_set or ("quick" if torch.cuda.is_available() else "smoke")
    if "case" in metafunc.fixturenames:
        found = [case for name in dict.fromkeys(("smoke", asked)) for case in cases(name)]
        metafunc.parametrize("case", found, ids=str)
