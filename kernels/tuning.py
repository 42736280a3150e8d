"""Autotuning: the choice of a configuration, timed at its first use and cached on disk."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from visproj.files import cache_folder, read_json_object, replacing
from visproj.kernels.device import INTERPRETING, architecture, multiprocessors, switched_on
from visproj.kernels.makespan import Tiles

_log = logging.getLogger("visproj")

_chosen: dict[str, str] = {}  # choices that were read from files
_remembered: dict[tuple[Any, ...], Any] = {}  # choices looked up or timed in this process
_files_read: set[Path] = set()
_lock = threading.Lock()  # held while timing as well: two threads would disturb each other


C = TypeVar("C")  # a configuration, or anything else that str() gives a unique name


class Library:
    """PyTorch's own implementation of what a kernel computes, timed like a configuration."""

    def __str__(self) -> str:
        return "PyTorch"


LIBRARY = Library()


class Choice(NamedTuple, Generic[C]):
    """A configuration, and whether the choice is final: the next call would get the same."""

    config: C
    settled: bool


def choose(
    kernel: str,
    shape: Sequence[Any],
    choices: Sequence[C],
    prepare: Callable[[C], Callable[[], object]],
    like: Tensor,
    tiles: Callable[[C], Tiles] | None = None,
) -> Choice[C]:
    """Return the best of ``choices``.

    The first use of a kernel with a shape times every choice, including :data:`LIBRARY` if the
    launcher offers it. The fastest is cached in this process and in :func:`cache_file`. The first
    entry of the shape, the number of rows, is rounded up to a power of two.

    Nothing is timed while a CUDA graph is captured, in an initialised process group or under the
    interpreter: then a cached choice is used, or :func:`untimed` if there is none. With
    ``VISPROJ_AUTOTUNE=0``, or if timing itself runs out of memory, :func:`untimed` is used. A
    choice that fails or runs out of memory is skipped.

    Args:
        kernel: Name of the kernel.
        shape: Everything that the best choice depends on. Callers round counts of tokens to powers
            of two, so that not every new count is timed.
        choices: In order of preference.
        prepare: Returns a function that runs the kernel with a configuration, safe to repeat.
        like: A tensor on the device.
        tiles: See :func:`untimed`.

    Raises:
        RuntimeError: If every choice fails.
        ValueError: If ``VISPROJ_AUTOTUNE`` is neither 0 nor 1.
    """
    off = os.environ.get("VISPROJ_AUTOTUNE") and not switched_on("VISPROJ_AUTOTUNE")
    own = [choice for choice in choices if choice is not LIBRARY]  # cannot be judged untimed
    if off or len(choices) == 1:
        return Choice(untimed(own, tiles, like.device), True)
    rows, *rest = shape
    names = (kernel, like.dtype, triton.next_power_of_2(rows), *rest)
    key = (like.device, tuple(choices), *names)
    if (known := _remembered.get(key)) is None:
        with _lock, torch.cuda.device_of(like):
            known = _read_or_timed(names, choices, prepare, like.device)
        if known is None:  # not final during a capture, or without memory for timing
            first = untimed(own, tiles, like.device)
            return Choice(first, INTERPRETING or _distributed())
        _remembered[key] = known
    return Choice(known, True)


def untimed(choices: Sequence[C], tiles: Callable[[C], Tiles] | None, device: torch.device) -> C:
    """Return the choice whose tiles occupy the processors for the shortest time.

    Large tiles reach more of the peak, but if there are fewer tiles than processors, smaller ones
    finish sooner. Of choices that take equally long, the first is returned.

    Args:
        choices: In order of preference.
        tiles: Returns the tiles of a choice. If ``None``, the first choice is returned.
        device: Device whose processors are counted.
    """
    if tiles is None or len(choices) == 1:
        return choices[0]
    processors = multiprocessors(device)

    def seconds(choice: C) -> float:
        cut = tiles(choice)
        return cut.seconds(processors, cut.reached() if cut.size else 1.0)

    return min(choices, key=seconds)


def cache_file() -> Path | None:
    """Return the file for choices, one per version of triton and kind of device, or ``None``."""
    folder = cache_folder()
    if folder is None:
        return None
    device = torch.cuda.get_device_name().replace(" ", "-").replace("/", "-")
    return folder / f"autotune-{device}-triton-{triton.__version__}.json"


def _read_or_timed(
    names: tuple[Any, ...],
    choices: Sequence[C],
    prepare: Callable[[C], Callable[[], object]],
    device: torch.device,
) -> C | None:
    """Return an earlier process's choice, else the fastest; ``None`` if nothing may be timed."""
    if INTERPRETING:
        return None
    kernel, *others = names
    key = " ".join(map(str, (kernel, architecture(device), *others)))
    by_name = {str(choice): choice for choice in choices}
    path = cache_file()
    if path is not None and path not in _files_read:
        _files_read.add(path)
        _chosen.update(recorded(path))
    if (known := by_name.get(_chosen.get(key, ""))) is not None:
        return known
    if torch.cuda.is_current_stream_capturing() or _distributed():
        return None
    try:
        best = _fastest(kernel, choices, prepare)
    except torch.OutOfMemoryError:  # timing itself takes 256 MB
        return None
    _chosen[key] = str(best)
    if path is not None:
        _write(path, {**recorded(path), key: str(best)})
    return best


def _fastest(kernel: str, choices: Sequence[C], prepare: Callable[[C], Callable[[], object]]) -> C:
    """Time every choice and return the fastest; skip, with a warning, those that fail."""
    found = {choice: _milliseconds(prepare(choice)) for choice in choices}
    times = {choice: time for choice, time in found.items() if isinstance(time, float)}
    for choice, error in found.items():
        if isinstance(error, RuntimeError):
            if not times:
                raise error
            _log.warning("skipped %s for the kernel %s: %s", choice, kernel, error)
    return min(times, key=times.__getitem__)


def _milliseconds(run: Callable[[], object]) -> float | RuntimeError:
    """Return the time of a call, ms, or its error; raise if timing itself runs out of memory."""
    failed: list[RuntimeError] = []

    def call() -> None:
        try:
            run()
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            failed.append(error)
            raise

    try:
        return triton.testing.do_bench(call, warmup=5, rep=20)
    except RuntimeError:
        if not failed:
            raise
        return failed[0]


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def recorded(path: Path) -> dict[str, str]:
    """Return the choices of earlier processes; none if the file cannot be read or parsed."""
    try:
        stored = read_json_object(path)
    except (OSError, ValueError):
        return {}
    return {key: name for key, name in stored.items() if isinstance(name, str)}


def _write(path: Path, choices: dict[str, str]) -> None:
    """Replace the file in one step; if that fails, later processes time again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps(choices, indent=1, sort_keys=True))
    except OSError:
        return
