"""A ttsem session that keeps what it saw, and also reports what stock ttsem lets pass.

Beyond out-of-bounds accesses and races: loads of memory that nothing has written (stock ttsem
leaves them as NaN in the values) and overflow of 32-bit integers (Triton's own debug assertions).
Kernels are compiled to TTIR, which is what ttsem runs, and no further: no LLVM, no ptxas.
"""

import math
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version

import numpy as np
import pytest
import torch
import triton
from sanitizer.unwritten import PATTERNS, fill
from triton.runtime import driver
from ttsem import _fakedriver, harness, mlir, ops, sanitize, values
from ttsem.memory import Memory

if version("ttsem") != "0.1.0" or not triton.__version__.startswith("3.8."):
    raise ImportError(
        "the sanitizer needs ttsem 0.1.0, whose insides it changes, and triton 3.8: of 3.7's "
        f"descriptors ttsem moves one element; found {version('ttsem')} and {triton.__version__}"
    )

# bf16 travels as uint16.
_LOADED = {
    getattr(np, {"bfloat16": "uint16"}.get(name, name)): pattern
    for name, pattern in ((str(d).removeprefix("torch."), p) for d, (_, p) in PATTERNS.items())
}


@dataclass
class Fault:
    """What was reported, of which kernel, and the kernel's parameter that it is about."""

    kind: str
    kernel: str
    buffer: str | None
    text: str


@dataclass
class Seen:
    """What ran in a session since ``forget``: program instances of every launch, and faults."""

    programs: dict[str, list[int]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    last: str = ""

    def forget(self) -> None:
        self.__init__()


def _fault(stop: Exception, kernel: str) -> Fault:
    if isinstance(stop, sanitize.Unjudged):
        kind = "int32 overflow" if "overflow detected" in str(stop) else "unjudged"
        return Fault(kind, kernel, None, str(stop))
    fault = stop.fault
    race = re.search(r"\((write-write|read-write|write-atomic)\)", fault.detail)
    kind = (
        f"{race[1]} race" if race else fault.kind.replace("_", " ").replace("oob", "out-of-bounds")
    )
    if "nothing has written" in fault.detail:
        kind = "unwritten read"
    return Fault(kind, fault.kernel, fault.buffer, str(stop))


def _reporting(load):
    """``Memory.load`` or ``Memory.atomic`` that refuses to return unwritten memory."""

    def wrapper(self, *args, **kwargs):
        out = load(self, *args, **kwargs)
        pattern = _LOADED.get(out.dtype.type)
        if pattern is not None:
            count = int((out.view(f"i{out.itemsize}") == pattern).sum())
            if count:
                raise values.Poison(f"it loads {count} element(s) that nothing has written")
        return out

    return wrapper


def _load_tile(interp, op, args):
    """``tt.descriptor_load`` in the shape of its result, which may lack dimensions of size 1."""
    (tile,) = ops._desc_load(interp, op, args)
    return [tile.reshape(ops._rty(op).shape)]


def _store_tile(interp, op, args):
    tile = np.asarray(args[1]).reshape(args[0].block_shape)
    return ops._desc_store(interp, op, [args[0], tile, *args[2:]])


def _unwritten(make):
    def wrapper(*args, **kwargs):
        return fill(make(*args, **kwargs))

    return wrapper


@contextmanager
def session(capability: int = 90):
    """Run every launch of this process in the sanitizer, as if on a GPU of that capability."""
    seen = Seen()
    record_launch = harness.record_launch

    def record(fn, args, kwargs, *rest):
        seen.last = fn.__name__
        recorded = record_launch(fn, args, {**kwargs, "debug": True}, *rest)
        seen.programs.setdefault(seen.last, []).append(math.prod(recorded.record.grid))
        return recorded

    mlir.enable_generic_printing()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", None)
        patch.setattr(harness, "record_launch", record)
        patch.setattr(harness, "ir_for_launch", harness._stage_text)
        patch.setitem(ops.OPS, "tt.descriptor_load", _load_tile)
        patch.setitem(ops.OPS, "tt.descriptor_store", _store_tile)
        for method in ("load", "atomic"):
            patch.setattr(Memory, method, _reporting(getattr(Memory, method)))
        for owner, names in (
            (torch, ("empty", "empty_like", "empty_strided")),
            (torch.Tensor, ("new_empty", "new_empty_strided")),
        ):
            for name in names:
                patch.setattr(owner, name, _unwritten(getattr(owner, name)))
        try:
            with sanitize.session(
                capability,
                on_stop=lambda stop: seen.faults.append(_fault(stop, seen.last)),
                on_unchecked=lambda: seen.unchecked.append(seen.last),
            ):
                yield seen
        finally:
            _fakedriver.unstub_torch_cuda()
