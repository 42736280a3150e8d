"""The choice between Triton kernels and PyTorch.

The first of these that is set decides: an operation's argument ``backend``, :func:`use_backend`,
the environment variable ``VISPROJ_BACKEND``. Without them it is ``"auto"``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from visproj.errors import BackendError, InputError
from visproj.kernels.support import why_unavailable

BACKENDS = ("auto", "triton", "torch")


class _Block:
    """One ``with use_backend(name)`` block."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.left = False


class _Thread(threading.local):
    """The blocks that this thread has entered, oldest first."""

    def __init__(self) -> None:
        self.blocks: list[_Block] = []


_own: ContextVar[tuple[_Block, ...]] = ContextVar("visproj_backend", default=())  # oldest first
_thread = _Thread()  # the same per thread, for compiled code: Dynamo cannot read a ContextVar
_blocks: list[_Block] = []  # those of all threads and tasks


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the implementation of every operation called inside the block.

    The choice applies to the thread or asyncio task that enters the block, and to the tasks that
    are started inside it. Choices made in other threads or tasks do not affect it. A thread that
    has not entered a block follows the block that was entered last in any thread. This includes
    threads that PyTorch starts: those of ``nn.DataParallel``, and those in which gradient
    checkpointing recomputes a forward during the backward. With gradient checkpointing, call the
    backward inside the block too, or set ``VISPROJ_BACKEND``. Otherwise a backward uses the
    implementation that its forward used, wherever it is called.

    Blocks may overlap: leaving a block undoes only its own choice. A generator follows the choices
    of the code that runs it, and compiled code those of the thread that runs it.

    Args:
        name: ``"auto"``: Triton kernels for tensors on an NVIDIA GPU of compute capability 8.0 or
            newer, PyTorch for everything else. ``"triton"``: the kernels, or an error that says
            what is missing. ``"torch"``: PyTorch.

    Raises:
        ValueError: If ``name`` is not one of these.
    """
    block = _Block(check_backend(name, "use_backend()"))
    entered = (_thread.blocks, _blocks)  # a generator may be closed by another thread
    for blocks in entered:
        blocks.append(block)
    _own.set((*_own.get(), block))
    try:
        yield
    finally:
        block.left = True  # tasks may hold copies of this context
        for blocks in entered:
            blocks.remove(block)
        _own.set(tuple(other for other in _own.get() if not other.left))


def check_backend(name: str, source: str) -> str:
    """Return ``name`` or raise ``ValueError`` saying where the unknown name came from."""
    if name not in BACKENDS:
        raise InputError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def runs_triton(x: Tensor, backend: str | None = None, *, unsupported: str | None = None) -> bool:
    """Return whether an operation on ``x`` runs on the Triton kernels.

    Args:
        x: The operation's first tensor.
        backend: The caller's own choice, which overrides all others.
        unsupported: The reason why no kernel supports this case, or ``None``. Given a reason,
            ``"triton"`` raises and ``"auto"`` chooses PyTorch.

    Raises:
        RuntimeError: If ``"triton"`` was chosen and cannot run on this device.
        TypeError: If ``"triton"`` was chosen and ``x`` is fp64.
        ValueError: If the backend is unknown, or ``"triton"`` was chosen in an unsupported case.
    """
    compiling = torch.compiler.is_compiling()
    if backend is not None:
        name = check_backend(backend, "backend")
    elif (
        latest := (
            _thread.blocks if compiling else [block for block in _own.get() if not block.left]
        )
        or _blocks[-1:]
    ):
        name = latest[-1].name  # a slice: another thread may empty the list before an index
    else:
        name = check_backend(os.environ.get("VISPROJ_BACKEND") or "auto", "VISPROJ_BACKEND")
    if name == "torch":
        return False
    # While compiling this is not checked: the compiler reports itself what it cannot trace.
    stack = None if compiling else torch._C._functorch.peek_interpreter_stack()
    if stack is not None:
        unsupported = unsupported or (
            "transforms of torch.func (grad, vmap, jvp) are not supported by the custom operations"
        )
    if name == "auto":
        return (
            x.device.type == "cuda"
            and x.dtype != torch.float64
            and unsupported is None
            and torch.version.hip is None
            and _why_not(x.device) is None
        )
    if reason := _why_not(x.device):
        raise BackendError(
            f"the Triton backend was asked for, but {reason}. PyTorch runs the same operation with "
            'visproj.use_backend("torch") or VISPROJ_BACKEND=torch; TRITON_INTERPRET=1 interprets '
            "the kernels on a CPU, slowly"
        )
    if x.dtype == torch.float64:
        raise TypeError("the Triton backend takes float32, float16 and bfloat16, got float64")
    if unsupported is not None:
        raise InputError(f"the Triton backend does not take this: {unsupported}")
    return True


def _why_not(device: torch.device) -> str | None:
    """Return :func:`why_unavailable` of a device, cached."""
    if device not in _reasons:
        _reasons[device] = why_unavailable(device)
    return _reasons[device]


_reasons: dict[torch.device, str | None] = {}
# Dynamo cannot trace how the reason is found. torch.compiler.assume_constant_result sets the same
# flag, but calling it would import Dynamo and Triton together with this module.
_why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]
