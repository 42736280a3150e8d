"""The command ``visproj``, which is also ``python -m visproj``."""

import sys


def main() -> None:
    """Run the command line, and end quietly on Ctrl-C while it is still being imported."""
    try:
        from visproj.cli import main as run
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
