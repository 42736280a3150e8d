"""Folders that a run writes to: checked before minutes of work, and one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from visproj.errors import InputError

LOCK_NAME = ".visproj.lock"
# What torchrun, accelerate and deepspeed, Open MPI, MPICH, MVAPICH, Horovod, Flux and srun set.
PROCESS_COUNTS = (
    "WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "HOROVOD_SIZE",
    "FLUX_JOB_SIZE",
    "SLURM_STEP_NUM_TASKS",
)


def refuse_parallel(what: str) -> None:
    """Raise ``InputError`` if this is one of several processes that were started together.

    Args:
        what: Runs in one process alone, for the message.
    """
    for name in PROCESS_COUNTS:
        if os.environ.get(name, "").strip().lstrip("0") not in ("", "1"):
            raise InputError(
                f"{what} runs in one process, and this is one of {os.environ[name]} ({name}): "
                "start it without torchrun, accelerate, deepspeed, mpirun or srun"
            )
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        count = distributed.get_world_size()
        if count > 1:
            raise InputError(f"{what} runs in one process, and this process group has {count}")


def is_writable(folder: Path) -> bool:
    """Return whether a folder can be written, after making it if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def check_writable(folder: Path) -> None:
    """Raise ``OSError`` if ``folder`` is not a directory that can be written or made."""
    whole = folder.absolute()
    existing = next(path for path in (whole, *whole.parents) if path.exists())
    if not existing.is_dir():
        shown = folder if existing == whole else existing
        raise NotADirectoryError(f"{shown} is a file: choose another --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {folder}: no permission to write in {existing}")


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Make ``folder`` and keep other processes out of it while the block runs.

    The system drops the lock of a process that is killed. Where the block fails and has written
    nothing, the folder is removed again.

    Raises:
        InputError: Another process has it.
        OSError: It cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_NAME)
    try:
        with suppress(NotImplementedError):  # a file system without locks
            lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another process is writing {folder}: wait until it ends, or choose another --out"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK_NAME).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()
