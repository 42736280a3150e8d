"""Functions that the commands of this folder share; bad input gives one line on stderr."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from visproj.errors import MissingPackageError, VisprojError


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors in one line and takes full option names only."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(
            prog,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with 2."""
        self.exit(2, f"error: {' '.join(message.split())}; see --help\n")


def run_command(main: Callable[[Sequence[str] | None], int]) -> NoReturn:
    """Run a command and exit with its status.

    An error that the user caused is printed as one line, with status 1. Ctrl-C gives one line and
    status 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without µ shows ?
    try:
        sys.exit(main(None))
    except (VisprojError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            message = f"{error.filename}: {error.strerror}"
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def require(package: str) -> None:
    """Raise unless a package is installed.

    Raises:
        MissingPackageError: If it is not.
    """
    if find_spec(package) is None:
        raise MissingPackageError(f"{package} is not installed: pip install {package}")


def positive_int(text: str) -> int:
    """Parse an integer of at least 1."""
    number = int(text) if text.strip().lstrip("+").isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return number


def finite(least: float, *, above: bool = False) -> Callable[[str], float]:
    """Return a parser of finite numbers that are at least ``least``, or with ``above`` greater."""
    wanted = f"a number {'above' if above else 'of at least'} {least:g}"

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or number < least or (above and number == least):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return number

    return parse


def check_folder(folder: Path) -> None:
    """Raise unless files can be written into ``folder``, which need not exist yet.

    Raises:
        OSError: If it is not a folder, cannot be created or cannot be written to.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"cannot write into {folder}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write into {folder}: {existing} is not writable")
