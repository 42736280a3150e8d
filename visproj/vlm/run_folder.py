"""Folders that a run writes to: checks before the run, and a lock for one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from visproj.errors import InputError

LOCK_NAME = ".visproj.lock"
# Set by torchrun, accelerate and deepspeed, Open MPI, MPICH, MVAPICH, Horovod, Flux and srun.
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
        what: Name for the message of what runs in one process only.
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
            raise InputError(
                f"{what} runs in one process, but this process group has {count} processes"
            )


def is_writable(folder: Path) -> bool:
    """Create a folder if it is missing, and return whether it can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def check_writable(folder: Path) -> None:
    """Raise ``OSError`` unless ``folder`` is a directory that can be written to or created."""
    whole = folder.absolute()
    existing = next(path for path in (whole, *whole.parents) if path.exists())
    if not existing.is_dir():
        shown = folder if existing == whole else existing
        raise NotADirectoryError(f"{shown} is a file: choose another --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {folder}: no permission to write in {existing}")


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Create ``folder`` and lock it against other processes while the block runs.

    The system releases the lock of a process that is killed. A folder that was created here and is
    still empty after the block is removed.

    Raises:
        InputError: Another process holds the lock.
        OSError: The folder cannot be created or written to.
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
