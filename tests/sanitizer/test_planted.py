"""The sanitizer reports every planted mistake, and nothing of the same kernels without it."""

import pytest
import torch
from sanitizer.planted import PLANTED, column_sums
from triton.runtime import driver

pytestmark = pytest.mark.sanitizer
each = pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.bug)


@each
def test_reported(planted, launched):
    with pytest.raises(Exception) as stop:  # noqa: PT011
        planted.run(planted.bug)
    assert len(launched.faults) == 1, repr(stop.value)
    fault = launched.faults[0]
    assert (fault.kind, fault.kernel) == (planted.kind, planted.kernel), fault.text
    assert planted.buffer in (None, fault.buffer), fault.text


@each
def test_clean_without_it(planted, launched):
    planted.run("")
    assert launched.programs
    assert not launched.faults
    assert not launched.unchecked


def test_launch_too_large_for_the_race_check_is_counted(launched, monkeypatch):
    monkeypatch.setattr("ttsem.memory.ACCESS_BUDGET", 100)
    monkeypatch.setattr("ttsem.memory.SPAN_BUDGET", 1)
    column_sums("")
    assert launched.unchecked == ["_column_sums_kernel"]


def test_pretend(pretend):
    pretend(80, multiprocessors=7)
    assert driver.active.get_current_target().arch == 80
    assert torch.cuda.get_device_capability() == (8, 0)
    assert torch.cuda.get_device_properties(0).multi_processor_count == 7
