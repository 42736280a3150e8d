"""Entry point of ``python -m visproj.cli``."""

from visproj.cli import main

main()
