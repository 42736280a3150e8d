"""Checkpoints of a training run: which are complete, and whether a run may resume from them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visproj.errors import InputError
from visproj.files import replacing, write_json

COMPLETE = "complete"
RUN_NAME = "run.json"
GROWING = ("epochs", "max steps")  # a resumed run may have more of these


def checkpoints(out: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first: those that hold the marker file."""
    found = {}
    for folder in out.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if number and (folder / COMPLETE).is_file():
            found[int(number[1])] = folder
    return [found[step] for step in sorted(found)]


def mark_complete(folder: Path) -> None:
    """Flush the files of a checkpoint to disk, then write the marker that it is complete."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    with replacing(folder / COMPLETE) as partial:
        partial.touch()


def remove_incomplete(out: Path) -> None:
    """Remove the incomplete checkpoints that killed runs have left."""
    whole = checkpoints(out)
    for folder in out.glob("checkpoint-*"):
        if folder not in whole:
            shutil.rmtree(folder, ignore_errors=True)


def write_identity(out: Path, identity: Mapping[str, Any]) -> None:
    """Write the settings, data and models that a resumed run must have in common with this one."""
    with replacing(out / RUN_NAME) as partial:
        write_json(partial, dict(identity))


def check_identity(out: Path, identity: Mapping[str, Any]) -> None:
    """Raise unless the run in ``out`` has the settings, data and models of ``identity``.

    Only the numbers of epochs and steps may differ: they may be larger than before.

    Raises:
        InputError: The run differs, and the message names the first difference; or the file that
            describes it cannot be read.
    """
    file = out / RUN_NAME
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        names = [*dict.fromkeys([*before, *identity])]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"cannot read {file} ({error}): choose another --out") from error
    after = json.loads(json.dumps(dict(identity)))
    for name in names:
        old, new = before.get(name), after.get(name)
        grown = name in GROWING and (new is None or (old is not None and old <= new))
        if old != new and not grown:
            raise InputError(
                f"the run in {out} has {name} {old}, but this one has {new}: give the same options "
                "with --resume, or choose another --out"
            )
