"""Pages that MkDocs makes from what lies outside of docs/: documents of the root, and the code."""

import re
from pathlib import Path
from typing import Any

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click
from typer.main import get_command

from visproj.cli import app

ROOT = Path(__file__).resolve().parent.parent
COMMAND_LINE = """# Command line

This page is made from the code. `visproj --help` and `visproj COMMAND --help` print the same.
`python -m visproj` is the same command. `visproj --install-completion` sets up the shell's tab key.

"""


def on_config(config: Any) -> Any:
    """Read the Sphinx roles of docstrings."""
    config.markdown_extensions.append(Roles())
    return config


class Roles(Extension):
    """``:func:`~package.name` `` as the code ``name``, ``:func:`package.name` `` in full."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Register the preprocessor, which runs before all others."""
        md.preprocessors.register(_ReadRoles(md), "roles", 100)


class _ReadRoles(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        short = [re.sub(r":[a-z]+:`~(?:\w+\.)*(\w+)`", r"`\1`", line) for line in lines]
        return [re.sub(r":[a-z]+:(`[\w.]+`)", r"\1", line) for line in short]


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    pages = {
        "index.md": document("README.md"),
        "cli.md": command_line(),
        "contributing.md": document("CONTRIBUTING.md"),
        "changelog.md": document("CHANGELOG.md"),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def command_line() -> str:
    """Return every command and option as Markdown."""
    command: Any = get_command(app)
    with command.make_context("visproj", [], resilient_parsing=True) as context:
        text = get_docs_for_click(obj=command, ctx=context, name="visproj")
    title, _, rest = text.partition("\n")
    assert title == "# `visproj`", title
    return COMMAND_LINE + rest.lstrip()


def document(name: str) -> str:
    """Return a document of the root with its links rewritten for a page inside docs/."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for page in ("CONTRIBUTING.md", "CHANGELOG.md"):
        text = text.replace(f"]({page}", f"]({page.lower()}")
    return text.replace("](docs/", "](")
