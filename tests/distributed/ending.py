"""``visproj`` with a record of how its processes end.

Usage: ``torchrun ending.py FOLDER ARGUMENTS``. Each process writes ``rank-N``.
"""

import atexit
import os
import sys
from pathlib import Path

from visproj.cli import main

folder = sys.argv.pop(1)


class End:
    """An object that lives until the interpreter is finalised."""

    def __init__(self):
        self.file = os.open(Path(folder, f"rank-{os.environ['RANK']}"), os.O_CREAT | os.O_WRONLY)
        self.write = os.write  # names of modules may be gone by then
        atexit.register(self.write, self.file, b"exit handlers")

    def __del__(self):
        self.write(self.file, b", finalised")


end = End()
main()
