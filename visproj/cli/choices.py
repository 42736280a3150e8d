"""What the commands have in common: choices of options, checks, and quiet libraries."""

from enum import Enum
from importlib.util import find_spec

import typer

from visproj.outcome import errors


# The choices of options, which typer checks and completes. The tests compare them with the lists in
# the modules that take them, which import torch.
class Kind(str, Enum):
    """Projectors."""

    baseline = "baseline"
    vit = "vit"
    perceiver = "perceiver"


class Backend(str, Enum):
    """What runs a projector."""

    auto = "auto"
    triton = "triton"
    torch = "torch"


class TrainingDtype(str, Enum):
    """Dtypes to train in."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


class KernelDtype(str, Enum):
    """Dtypes that the kernels compute in."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class StoredDtype(str, Enum):
    """Dtypes to write."""

    float64 = "float64"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Format(str, Enum):
    """What an extracted encoder is written as."""

    safetensors = "safetensors"
    bin = "bin"


def check_positive(value: float) -> float:
    """Return a positive, finite number or raise typer's error."""
    if not 0 < value < float("inf"):
        raise typer.BadParameter(f"{value} is not a positive number")
    return value


def check_seed(value: int) -> int:
    """Return a seed that PyTorch and NumPy take or raise typer's error."""
    if not 0 <= value < 2**32:
        raise typer.BadParameter(f"{value} is not at least 0 and less than 2**32")
    return value


def quiet_libraries() -> None:
    """Silence what the libraries say on the way: our own lines show progress and errors."""
    from transformers.utils import logging

    quiet_hub()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if find_spec("datasets") is not None:
        import datasets

        datasets.disable_progress_bars()


def quiet_hub() -> None:
    """Silence the client's many lines about retries, and its bars where no terminal shows them."""
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not errors.is_terminal:
        disable_progress_bars()
