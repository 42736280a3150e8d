"""Tests marked ``sanitizer`` run inside ttsem; what each of them launched goes into its report."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from selection import NEEDS

# They define kernels, which takes triton.
collect_ignore = [] if find_spec("triton") else ["test_kernels.py", "test_planted.py"]


@pytest.fixture(scope="module")
def ttsem_session():
    import triton

    try:
        from sanitizer.session import session
    except ImportError as error:
        message = f"{error}: {NEEDS['sanitizer'][1]}"
        raise pytest.fail.Exception(message, pytrace=False) from None
    if triton.knobs.runtime.interpret:
        pytest.fail(
            "kernels are interpreted here; without TRITON_INTERPRET: pytest -m sanitizer",
            pytrace=False,
        )
    with session() as seen:
        yield seen


@pytest.fixture(autouse=True)
def launched(request):
    """What the test launched, and the faults of it."""
    if not request.node.get_closest_marker("sanitizer"):
        return None
    seen = request.getfixturevalue("ttsem_session")
    seen.forget()
    request.getfixturevalue("monkeypatch").setenv("VISPROJ_AUTOTUNE", "0")  # there is no clock
    return seen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fail a test that a clean gate may not contain, and put what it launched into its report."""
    seen = item.funcargs.get("launched")
    planted = item.path.name == "test_planted.py"
    try:
        result = yield
    finally:
        if seen is not None:
            report = {
                "planted": planted,
                "programs": seen.programs,
                "faults": [f"{fault.kind}: {fault.text[:500]}" for fault in seen.faults],
                "unchecked": seen.unchecked,
            }
            item.user_properties.append(("sanitizer", report))
    if seen is not None and not planted:
        assert seen.programs, "the test launched no kernel"
        assert not seen.faults, "a fault was caught before it reached the test"
        assert not seen.unchecked, f"too large for the race check: {seen.unchecked}"
    return result


@pytest.fixture
def pretend(launched, monkeypatch):
    """Have the launchers choose as on a GPU of another compute capability or size."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from visproj.kernels.device import architecture

    def gpu(capability, multiprocessors=4):
        properties = SimpleNamespace(multi_processor_count=multiprocessors)
        monkeypatch.setattr(driver.active, "_target", GPUTarget("cuda", capability, 32))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: divmod(capability, 10))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
        architecture.cache_clear()

    yield gpu
    architecture.cache_clear()
