"""Run the sanitizer's tests, and fail unless they were a whole gate.

``python tests/sanitizer/gate.py``; arguments go to pytest. What a test launched arrives with its
report, so xdist changes nothing.
"""

import ast
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"
CASES_WANTED, BUGS_WANTED, PROGRAMS_WANTED = 100, 8, 4


def kernels_of(folder):
    """Names of the Triton kernels that are launched from a folder's modules."""
    functions = (
        node
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    )
    return {function.name for function in functions if function.name.endswith("_kernel")}


class Tally:
    """Pytest plugin: counts what ran, and says what is missing."""

    def __init__(self, kernels):
        self.kernels = kernels
        self.counts = Counter()
        self.programs = {}  # of each kernel, the most program instances of a launch
        self.faults, self.unchecked, self.not_passed = [], [], set()

    def pytest_runtest_logreport(self, report):
        if report.outcome != "passed":
            self.not_passed.add(report.nodeid)
        seen = dict(report.user_properties).get("sanitizer")
        if report.when != "teardown" or seen is None:
            return
        if seen["planted"]:
            passed = report.nodeid not in self.not_passed
            self.counts["reported"] += passed and "::test_reported[" in report.nodeid
            self.counts["clean"] += passed and "::test_clean_without_it[" in report.nodeid
            return
        self.counts["cases"] += 1
        self.faults += [f"{report.nodeid}: {fault}" for fault in seen["faults"]]
        self.unchecked += [f"{report.nodeid}: {kernel}" for kernel in seen["unchecked"]]
        for kernel, programs in seen["programs"].items():
            self.counts["launches"] += len(programs)
            self.programs[kernel] = max(self.programs.get(kernel, 0), *programs)

    def complaints(self):
        """What keeps this from being a gate, a line each."""
        found = [f"fault: {fault}" for fault in self.faults]
        found += [f"not checked for races: {launch}" for launch in self.unchecked]
        if self.not_passed:
            found.append(f"{len(self.not_passed)} tests did not pass")
        for what, wanted in (("cases", CASES_WANTED), ("reported", BUGS_WANTED)):
            if self.counts[what] < wanted:
                found.append(f"{self.counts[what]} {what}, at least {wanted} wanted")
        if self.counts["clean"] != self.counts["reported"]:
            found.append("a planted bug without a clean twin")
        for kernel in sorted(self.kernels):
            if (programs := self.programs.get(kernel, 0)) < PROGRAMS_WANTED:
                found.append(
                    f"{kernel}: {programs} program instances at most, {PROGRAMS_WANTED} wanted"
                )
        return found

    def __str__(self):
        return (
            f"sanitizer: {self.counts['cases']} cases, {self.counts['launches']} launches of "
            f"{len(self.programs)} kernels, {len(self.faults)} faults, {len(self.unchecked)} "
            f"unchecked; {self.counts['reported']} planted bugs reported, "
            f"{self.counts['clean']} clean twins"
        )


def main(arguments):
    tally = Tally(kernels_of(KERNELS))
    start = time.perf_counter()
    options = ["-m", "sanitizer", "--dist=worksteal", "-p", "no:cacheprovider", str(HERE)]
    status = pytest.main([*options, *arguments], plugins=[tally])
    print(f"{tally}; {time.perf_counter() - start:.0f} s")
    complaints = tally.complaints()
    for complaint in complaints:
        print(f"sanitizer gate: {complaint}")
    return int(bool(status or complaints))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
