"""The command ``visproj``, which is also ``python -m visproj``."""

import os
import signal
from types import FrameType


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, or end the process at once where a module is being imported.

    Raised inside an import, the exception may be swallowed by Python, turned into another error, or
    abort the process in a library that is half initialised.
    """
    caller = frame
    while caller is not None:
        if caller.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"stopped\n")
            os._exit(130)
        caller = caller.f_back
    signal.default_int_handler(number, frame)


def main() -> None:
    """Run the command line; Ctrl-C ends it with one line, from the first import on."""
    # Not where the caller has Ctrl-C ignored, as a shell does for a command in the background.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    from visproj.cli import main as run

    run()


if __name__ == "__main__":
    main()
