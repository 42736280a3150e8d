"""Entry point of the command ``visproj`` and of ``python -m visproj``."""

import os
import signal
from types import FrameType


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, or end the process at once while a module is being imported.

    Inside an import, Python may swallow the exception or turn it into another error, and a
    half-initialised library may abort the process.
    """
    caller = frame
    while caller is not None:
        if caller.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"stopped\n")
            os._exit(130)
        caller = caller.f_back
    signal.default_int_handler(number, frame)


def main() -> None:
    """Run the command line; Ctrl-C ends it with one line, even while modules are being imported."""
    # Leave Ctrl-C ignored if the caller ignores it, as a shell does for background commands.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    from visproj.cli import main as run

    run()


if __name__ == "__main__":
    main()
