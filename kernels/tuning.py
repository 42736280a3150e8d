"""Choosing a configuration: timed at first use and remembered on disk."""

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

_chosen: dict[str, str] = {}  # what files say
_remembered: dict[tuple[Any, ...], Any] = {}  # what was looked up or timed in this process
_files_read: set[Path] = set()
_lock = threading.Lock()  # held while timing as well: two threads would disturb each other


C = TypeVar("C")  # a configuration, or anything else with a name of its own


class Library:
    """PyTorch's own way to do what a kernel does: timed like a configuration."""

    def __str__(self) -> str:
        return "PyTorch"


LIBRARY = Library()


class Choice(NamedTuple, Generic[C]):
    """A configuration, and whether the next call would be given the same."""

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

    The first use of a kernel at a shape (its first entry, the rows, counted in powers of two) times
    every choice, :data:`LIBRARY` among them where the launcher offers it, and remembers the
    fastest, in this process and in :func:`cache_file`. While a CUDA
    graph is captured, in an initialised process group, under the interpreter and with
    ``VISPROJ_AUTOTUNE=0`` nothing is timed: what is remembered is taken, else :func:`untimed`.
    ``VISPROJ_AUTOTUNE=0`` takes that always, and so does a first use without the memory that timing
    itself takes. A choice that fails, or runs out of memory, is passed over.

    Args:
        kernel: Its name.
        shape: What the best choice depends on; counts of tokens in powers of two, so that not every
            new count is timed.
        choices: In order of preference.
        prepare: Returns what runs the kernel with a configuration, safe to repeat.
        like: A tensor on the device.
        tiles: See :func:`untimed`.

    Raises:
        RuntimeError: If every choice fails.
        ValueError: If ``VISPROJ_AUTOTUNE`` is neither 0 nor 1.
    """
    off = os.environ.get("VISPROJ_AUTOTUNE") and not switched_on("VISPROJ_AUTOTUNE")
    own = [choice for choice in choices if choice is not LIBRARY]  # nothing is known of it untimed
    if off or len(choices) == 1:
        return Choice(untimed(own, tiles, like.device), True)
    rows, *rest = shape
    names = (kernel, like.dtype, triton.next_power_of_2(rows), *rest)
    key = (like.device, tuple(choices), *names)
    if (known := _remembered.get(key)) is None:
        with _lock, torch.cuda.device_of(like):
            known = _read_or_timed(names, choices, prepare, like.device)
        if known is None:  # capturing a graph ends; a process group and the interpreter stay
            first = untimed(own, tiles, like.device)
            return Choice(first, INTERPRETING or _distributed())
        _remembered[key] = known
    return Choice(known, True)


def untimed(choices: Sequence[C], tiles: Callable[[C], Tiles] | None, device: torch.device) -> C:
    """Return the choice whose tiles occupy the processors for the shortest time.

    Large tiles reach more of the peak, but where they are fewer than the processors, smaller ones
    are done sooner. Of choices that take equally long the first is returned.

    Args:
        choices: In order of preference.
        tiles: Of a choice; without, the first is taken.
        device: Whose processors are counted.
    """
    if tiles is None or len(choices) == 1:
        return choices[0]
    processors = multiprocessors(device)

    def seconds(choice: C) -> float:
        cut = tiles(choice)
        return cut.seconds(processors, cut.reached() if cut.size else 1.0)

    return min(choices, key=seconds)


def cache_file() -> Path | None:
    """Where choices are kept: one file for every version of triton and kind of device."""
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
    """Return what an earlier process chose, else the fastest; ``None`` where nothing is timed."""
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
    """Time every choice. One that does not compile or start is passed over, with a warning."""
    found = {choice: _milliseconds(prepare(choice)) for choice in choices}
    times = {choice: time for choice, time in found.items() if isinstance(time, float)}
    for choice, error in found.items():
        if isinstance(error, RuntimeError):
            if not times:
                raise error
            _log.warning("passed over %s of %s: %s", choice, kernel, error)
    return min(times, key=times.__getitem__)


def _milliseconds(run: Callable[[], object]) -> float | RuntimeError:
    """Time a call, or return its own error; that timing itself has no memory is raised."""
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
