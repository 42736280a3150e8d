"""Choosing a configuration: timed at first use and remembered on disk."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from visproj.files import cache_folder, read_json_object, replacing
from visproj.kernels.launch import INTERPRETING, Config, architecture, switched_on

_chosen: dict[str, str] = {}
_files_read: set[Path] = set()
_lock = threading.Lock()  # held while timing as well: two threads would disturb each other


def run_best(
    kernel: str,
    shape: Sequence[Any],
    choices: Sequence[Config],
    run: Callable[[Config], None],
    like: Tensor,
) -> Config:
    """Call ``run`` with the best of ``choices`` and return that.

    The first use of a kernel at a shape (its first entry, the rows, counted in powers of two) times
    every choice and remembers the fastest, in this process and in :func:`cache_file`. While a CUDA
    graph is captured, in an initialised process group, under the interpreter and with
    ``VISPROJ_AUTOTUNE=0`` nothing is timed: what is remembered runs, else the first choice.
    ``VISPROJ_AUTOTUNE=0`` takes the first choice always.

    ``run`` must be safe to repeat.

    Raises:
        ValueError: If ``VISPROJ_AUTOTUNE`` is neither 0 nor 1.
    """
    config = choices[0]
    if switched_on("VISPROJ_AUTOTUNE") and len(choices) > 1:
        with _lock:
            config = _remembered_or_timed(kernel, shape, choices, run, like)
    run(config)
    return config


def cache_file() -> Path | None:
    """Where choices are kept: one file for every version of triton and kind of device."""
    folder = cache_folder()
    if folder is None:
        return None
    device = torch.cuda.get_device_name().replace(" ", "-").replace("/", "-")
    return folder / f"autotune-{device}-triton-{triton.__version__}.json"


def _remembered_or_timed(
    kernel: str,
    shape: Sequence[Any],
    choices: Sequence[Config],
    run: Callable[[Config], None],
    like: Tensor,
) -> Config:
    if INTERPRETING:
        return choices[0]
    rows, *rest = shape
    parts = (kernel, architecture(), like.dtype, triton.next_power_of_2(rows), *rest)
    key = " ".join(map(str, parts))
    by_name = {str(choice): choice for choice in choices}
    path = cache_file()
    if path is not None and path not in _files_read:
        _files_read.add(path)
        _chosen.update(_read(path))
    if (known := by_name.get(_chosen.get(key, ""))) is not None:
        return known
    if torch.cuda.is_current_stream_capturing() or _distributed():
        return choices[0]
    times = [
        triton.testing.do_bench(lambda c=choice: run(c), warmup=5, rep=20) for choice in choices
    ]
    best = choices[times.index(min(times))]
    _chosen[key] = str(best)
    if path is not None:
        _write(path, {**_read(path), key: str(best)})
    return best


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _read(path: Path) -> dict[str, str]:
    """What earlier processes chose. What cannot be read or understood counts as not there."""
    try:
        stored = read_json_object(path)
    except (OSError, ValueError):
        return {}
    return {key: name for key, name in stored.items() if isinstance(name, str)}


def _write(path: Path, choices: dict[str, str]) -> None:
    """Replace the file in one step. A folder that cannot be written only costs the next process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps(choices, indent=1, sort_keys=True))
    except OSError:
        return
