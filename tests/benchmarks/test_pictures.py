"""The documents' pictures are those that the code draws, and their figures are those it counts."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

import matplotlib

from benchmarks import pictures
from visproj.supported import MODELS, count

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("fold", "multiply_adds", "speedups")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
# Names that matplotlib hashes from coordinates.
HASHED = re.compile(r'(?:id|href)="[^"]*"|url\([^)]*\)')


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    assert {path.stem for path in pictures.draw(folder)} == set(NAMES)
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def committed(name):
    return (pictures.PICTURES / f"{name}.svg").read_text(encoding="utf-8")


def texts(svg):
    """Every line of text, in the order of drawing."""
    found = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(text.itertext()) for text in found]


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_picture_is_what_is_drawn(name, drawn):
    again = "python -m benchmarks.pictures draws it again"
    assert texts(committed(name)) == texts(drawn[name]), again
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    if f"matplotlib=={matplotlib.__version__} " in pinned:
        old, new = (HASHED.sub("", svg) for svg in (committed(name), drawn[name]))
        assert NUMBER.split(old) == NUMBER.split(new), again
        numbers = (list(map(float, NUMBER.findall(svg))) for svg in (old, new))
        # Points; another CPU may round coordinates in another way.
        assert next(numbers) == pytest.approx(next(numbers), abs=0.01), again


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_says_where_its_figures_come_from(name, drawn):
    source = "Measured at" if name == "speedups" else "ounted from the code"
    assert any(source in text for text in texts(drawn[name]))
    assert "<text" in drawn[name]
    assert "<dc:date>" not in drawn[name]


def test_multiply_adds_of_every_model(drawn):
    found = texts(drawn["multiply_adds"])
    for name, entry in MODELS.items():
        published, folded, form = count(entry)
        assert name in found
        assert f"{published / 1e9:.2f}" in found
        fewer = f"{published / folded:.2f} times fewer, form {form}"
        assert f"{folded / 1e9:.2f} ({fewer})" in found


def test_stages_by_hand():
    """The Perceiver of DeepSpeed-VisualChat: 256 tokens and queries, widths 1024 and 4096."""
    before, after = pictures.stage_gmacs()
    tokens, width, lang_dim = 256, 1024, 4096
    square = tokens * lang_dim**2 / 1e9
    attention = 2 * tokens * tokens * lang_dim / 1e9
    assert before == pytest.approx(
        {
            "kv_proj": tokens * width * lang_dim / 1e9,
            "query projection": square,
            "key projection": square,
            "value projection": square,
            "attention": attention,
            "out_proj": square,
            "Linear": square,
        }
    )
    # n blocks of a triangular product do (n + 1) / 2n of it: 4 of 256 columns, 8 of 512.
    assert after == pytest.approx(
        {
            "keys and values": tokens * width * 2 * lang_dim / 1e9,
            "their row scale": 5 / 8 * tokens * width**2 / 1e9,
            "attention": attention,
            "output": square,
            "its row scale": 9 / 16 * square,
        }
    )
    counted = count(MODELS["DeepSpeed-VisualChat"])
    assert sum(before.values()) == pytest.approx(counted.published / 1e9)
    assert sum(after.values()) == pytest.approx(counted.folded / 1e9)


def test_stages_are_labelled(drawn):
    before, after = pictures.stage_gmacs()
    found = texts(drawn["fold"])
    together = "\n".join(found)
    for name, gmacs in before.items():
        assert re.search(rf"^{name}(: |\n){gmacs:.2f}$", together, re.MULTILINE)
    for product, scale in (("keys and values", "their row scale"), ("output", "its row scale")):
        assert f"{after[product] + after[scale]:.2f}" in found
        assert f"product: {after[product]:.2f}" in found
        assert f"row scale: {after[scale]:.2f}" in found
    for name, stages in (("published", before), ("folded", after)):
        assert f"{name}: {sum(stages.values()):.1f} GMACs" in found


def test_speeds_are_the_measured_ones(drawn):
    together = " ".join(texts(drawn["speedups"]))
    for row in pictures.read_measured():
        if row.implementation == "folded" and row.baseline:
            assert row.ratio in together
            assert f"{row.device}, {row.dtype}" in together
        elif not row.baseline:
            assert f"{row.microseconds} µs" in together


def tables(text):
    """Every table of a document: rows of cells, the header first, without marks of emphasis."""
    found, table = [], []
    for line in [*re.sub("[*`]", "", text).splitlines(), ""]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif table:
            found.append([table[0], *table[2:]])
            table = []
    return found


def stated(row, document):
    """Whether a table states the figure for this implementation, baseline and number of images."""
    wanted = row.ratio or row.microseconds
    if row.lowest:
        wanted += f" ({row.lowest} to {row.highest})"
    images = "1 image" if row.images == "1" else f"{row.images} images"
    for header, *rows in tables(document):
        by_images = any(re.match(r"\d+ image", cell) for cell in header)
        for name, *cells in rows:
            if row.implementation not in name.replace("fold(", "folded("):
                continue
            for column, cell in zip(header[1:], cells, strict=False):
                # A cell may hold several: `3.06 / 1.92` in the row `as fast as upstream / fair`.
                figures, names = cell.split(" / "), name.split(" / ")
                if len(figures) == 1 or len(figures) != len(names):
                    figures, names = [cell], [f"{name} {column}"]
                pairs = zip(figures, names, strict=True)
                matches = any(
                    figure == wanted and row.baseline in beside for figure, beside in pairs
                )
                if matches and (column == images or not by_images):
                    return True
    return False


def test_measured_figures_are_those_of_the_documents():
    paths = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
    documents = [path.read_text(encoding="utf-8") for path in paths if path.exists()]
    commands = " ".join(" ".join(documents).split())
    rows = pictures.read_measured()
    assert len(rows) == len(set(rows)) > 0
    for row in rows:
        assert any(stated(row, document) for document in documents), row
        assert f"`{row.command}`" in commands, row


def test_a_figure_that_no_table_states_is_noticed():
    table = "| | 1 image | 8 images |\n|---|---|---|\n| folded | 93 | **279** |\n"
    row = pictures.Measured("", "", "", "8", "folded", "", "", "", "", "279", "")
    assert stated(row, table)
    assert not stated(row._replace(microseconds="93"), table)
    assert not stated(row._replace(implementation="fair"), table)
    ratios = "| | 8 images |\n|---|---|\n| folded, as fast as upstream / fair | 3.06 / 1.92 |\n"
    row = row._replace(baseline="fair", ratio="1.92")
    assert stated(row, ratios)
    assert not stated(row._replace(ratio="3.06"), ratios)


def test_every_picture_is_shown():
    document = (ROOT / "docs" / "folding.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"](pictures/{name}.svg)" in document


def test_command(tmp_path, capsys):
    assert pictures.main(["--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == sorted(str(tmp_path / "new" / f"{name}.svg") for name in NAMES)
