"""The documents' examples run as they stand, and their commands are accounted for."""

import re
from pathlib import Path

import docs_commands
import pytest
from examples import EXAMPLES, MARKS

import visproj
from visproj.supported import MODELS, describe_models

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ("changelog.md", "cli.md", "contributing.md", "index.md")  # docs/hooks.py makes them


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=MARKS.get(line, ())) for line in EXAMPLES]
)
def test_example(line, monkeypatch, tmp_path):
    (block,) = (block for block in docs_commands.python_blocks() if line in block)
    monkeypatch.chdir(tmp_path)
    prepare, check = EXAMPLES[line]
    names = prepare(monkeypatch)
    exec(block, names)
    check(names)


def test_every_example_is_run():
    blocks = docs_commands.python_blocks()
    assert [block for block in blocks if sum(line in block for line in EXAMPLES) != 1] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("document", ["README.md", "docs/models.md"])
def test_the_models_that_convert_are_counted(document):
    """The table is what `visproj info --models` prints."""
    text = (ROOT / document).read_text(encoding="utf-8")
    rows = [line.split() for line in list(describe_models())[1:]]
    assert len(rows) == len(MODELS)
    for row in rows:
        assert f"| {' | '.join(row)} |" in text


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert [name for name in visproj.__all__ if f"visproj.{name}" not in reference] == []


def headings(text):
    """Anchors of a document's headings, as MkDocs and GitHub make them."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[ -]+", "-", re.sub(r"[^\w -]", "", title.lower())) for title in titles}


def broken_links(path):
    """Links to files or headings that are not there; those to other hosts are not followed."""
    text = path.read_text(encoding="utf-8")
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if "://" in link or (path.parent.name == "docs" and name in GENERATED):
            continue
        if not target.exists() or (
            anchor and anchor not in headings(target.read_text(encoding="utf-8"))
        ):
            broken.append(link)
    return broken


@pytest.mark.parametrize(
    "path", [*docs_commands.documents(), ROOT / "CHANGELOG.md"], ids=lambda path: path.name
)
def test_links_lead_somewhere(path):
    assert broken_links(path) == []


def test_a_broken_link_is_noticed(tmp_path):
    document = tmp_path / "a.md"
    document.write_text("# One: two\n[](a.md#one-two) [](#three) [](b.md) [](https://x.org/y)")
    assert broken_links(document) == ["#three", "b.md"]


def test_every_command_is_run_or_listed():
    found = docs_commands.commands()
    assert docs_commands.stale_entries(found) == []
    run = docs_commands.to_run(found)
    assert "visproj demo" in run["pip install -c constraints.txt -e '.[demo]'"]
    assert "visproj extract checkpoint encoder/" in run["pip install -c constraints.txt -e ."]


def documents(tmp_path, readme):
    for name in ("README.md", "CONTRIBUTING.md"):
        (tmp_path / name).write_text(readme if name == "README.md" else "")
    return docs_commands.commands(tmp_path)


def test_commands_are_found(tmp_path):
    found = documents(
        tmp_path,
        "`visproj nothing` in a sentence\n"
        "```bash\npip install -c constraints.txt -e '.[train]' && visproj a  # why\n"
        "visproj b \\\n    --long\n```\n"
        "```console\n$ visproj c\nwhat it prints\n```\n"
        "```python\nd = 1\n```\n"
        "| what | command |\n|---|---|\n| `x` | `pytest e` or `visproj bench f` |\n",
    )
    install = "pip install -c constraints.txt -e '.[train]'"
    bench = "pip install -c constraints.txt -e '.[bench]'"
    texts = ["visproj a", "visproj b --long", "visproj c", "pytest e"]
    expected = [(text, install) for text in texts] + [("visproj bench f", bench)]
    assert [(command.text, command.install) for command in found] == expected
    assert docs_commands.to_run(found) == {install: texts, bench: ["visproj bench f"]}


def test_a_new_command_and_a_stale_entry_are_noticed(tmp_path):
    with pytest.raises(SystemExit, match=r"README\.md: no install line above `visproj new`"):
        documents(tmp_path, "```bash\nvisproj new\n```\n")
    found = documents(tmp_path, "```bash\npytest\n```\n")
    assert "pytest -m slow" in docs_commands.stale_entries(found)
    assert "pytest" not in docs_commands.stale_entries(found)


def test_the_first_failure_ends_the_run(tmp_path, capsys):
    with pytest.raises(SystemExit, match="no such thing"):
        docs_commands.run("echo no such thing; exit 3", tmp_path, {"PATH": "/usr/bin:/bin"})
    assert re.fullmatch(r"  3 +\d+\.\d s  echo .*\n", capsys.readouterr().out)


def test_its_test_command_is_what_ci_runs():
    commands = re.findall(r"^pip install .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands[:2] == [
        "pip install -c constraints.txt -e '.[demo]' && visproj demo",
        "pip install -c constraints.txt -e '.[test]' && pytest",
    ]
    assert 'grep -m1 "^pip install .*&& pytest$" README.md' in (ROOT / ".ci/run").read_text()
