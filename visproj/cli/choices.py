"""Shared parts of the commands: choices and checks of options, and silenced libraries."""

from enum import Enum
from importlib.util import find_spec

import typer

from visproj.outcome import errors


# The choices of options, which typer checks and completes. They repeat lists of modules that import
# torch; tests compare the two.
class Kind(str, Enum):
    """Kind of projector."""

    baseline = "baseline"
    vit = "vit"
    perceiver = "perceiver"


class Backend(str, Enum):
    """Implementation that runs a projector."""

    auto = "auto"
    triton = "triton"
    torch = "torch"


class TrainingDtype(str, Enum):
    """Dtype to train in."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


class KernelDtype(str, Enum):
    """Dtype that the kernels compute in."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class StoredDtype(str, Enum):
    """Dtype of written weights."""

    float64 = "float64"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Format(str, Enum):
    """File format of an extracted encoder."""

    safetensors = "safetensors"
    bin = "bin"


def check_positive(value: float) -> float:
    """Return ``value`` if it is positive and finite, else raise typer's error for options."""
    if not 0 < value < float("inf"):
        raise typer.BadParameter(f"must be positive and finite, got {value}")
    return value


def check_seed(value: int) -> int:
    """Return ``value`` if PyTorch and NumPy accept it as a seed, else raise typer's error."""
    if not 0 <= value < 2**32:
        raise typer.BadParameter(f"must be at least 0 and less than 2**32, got {value}")
    return value


def quiet_libraries() -> None:
    """Silence the libraries' log lines and bars; visproj shows progress and errors itself."""
    from transformers.utils import logging

    quiet_hub()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if find_spec("datasets") is not None:
        import datasets

        datasets.disable_progress_bars()


def quiet_hub() -> None:
    """Silence the hub client's lines about retries, and its bars if stderr is not a terminal."""
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not errors.is_terminal:
        disable_progress_bars()
