"""What other runtimes make of a projector is timed only where it is the same function."""

import pytest
import torch
from torch import nn

from benchmarks import runtimes


def broken(module, x):
    raise RuntimeError("no such operator\nsecond line")


@pytest.fixture
def three(monkeypatch):
    """A runtime that calls the module, one that is absent and one that fails."""
    found = {
        "same": ((), lambda module, x: module),
        "absent": (("no_such_package",), lambda module, x: module),
        "broken": ((), broken),
        "rounded": ((), lambda module, x: lambda x: module(x) * 1.001),
    }
    monkeypatch.setattr(runtimes, "_RUNTIMES", found)


@torch.no_grad()
def test_only_what_agrees_is_called(three):
    module, x = nn.Linear(4, 3), torch.randn(2, 4)
    calls, missing = runtimes.runtime_calls({"fair": module}, x)
    assert list(calls) == ["fair, same"]
    assert torch.equal(calls["fair, same"](x), module(x))
    assert missing == [
        "absent: no_such_package not installed",
        "fair, broken: RuntimeError: no such operator",
        "fair, rounded: its result differs by 1.0e-03",
    ]


@torch.no_grad()
@pytest.mark.slow
def test_runtimes_that_are_here():
    """torch.compile, and the others where they are installed; a failure would be a reason."""
    module, x = nn.Linear(4, 3), torch.randn(2, 4)
    calls, missing = runtimes.runtime_calls({"fair": module}, x)
    assert "fair, torch.compile" in calls
    assert all("installed" in reason for reason in missing), missing
