"""The gate fails on everything that would make it less than a gate."""

from types import SimpleNamespace

import pytest
from sanitizer.gate import BUGS_WANTED, CASES_WANTED, Tally


def reports(count, name, planted=False, programs=4, when_failed=None, **seen):
    seen = {"planted": planted, "programs": {"_k_kernel": [1, programs]}} | seen
    seen = {"faults": [], "unchecked": []} | seen
    for index in range(count):
        for when in ("setup", "call", "teardown"):
            yield SimpleNamespace(
                nodeid=f"tests/sanitizer/{name}[{index}]",
                when=when,
                outcome="failed" if when == when_failed else "passed",
                user_properties=[("sanitizer", seen)],
            )


def tally(cases=CASES_WANTED, bugs=BUGS_WANTED, clean=BUGS_WANTED, kernels=("_k_kernel",), **case):
    result = Tally(set(kernels))
    for report in (
        *reports(cases, "test_kernels.py::test_linear", **case),
        *reports(bugs, "test_planted.py::test_reported", planted=True),
        *reports(clean, "test_planted.py::test_clean_without_it", planted=True),
    ):
        result.pytest_runtest_logreport(report)
    return result


def test_a_whole_gate_has_no_complaints():
    whole = tally()
    assert whole.complaints() == []
    assert str(whole).startswith("sanitizer: 100 cases, 200 launches of 1 kernels, 0 faults")


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"cases": CASES_WANTED - 1}, "99 cases, at least 100 wanted"),
        ({"bugs": BUGS_WANTED - 1, "clean": BUGS_WANTED - 1}, "7 reported, at least 8 wanted"),
        ({"clean": BUGS_WANTED - 1}, "a planted bug without a clean twin"),
        ({"faults": ["out-of-bounds read"]}, "out-of-bounds read"),
        ({"unchecked": ["_k_kernel"]}, "not checked for races"),
        ({"when_failed": "setup"}, "100 tests did not pass"),
        ({"when_failed": "call"}, "100 tests did not pass"),
        ({"when_failed": "teardown"}, "100 tests did not pass"),
        ({"programs": 3}, "_k_kernel: 3 program instances at most, 4 wanted"),
        ({"kernels": ("_k_kernel", "_l_kernel")}, "_l_kernel: 0 program instances at most"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_complaints(changed, complaint):
    assert any(complaint in line for line in tally(**changed).complaints())
