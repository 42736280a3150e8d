"""The photographs and captions that come with visproj, and the form that they are written in."""

import json

import pytest
from vlm.tiny import tiny_model, tiny_photograph

from visproj.errors import InputError
from visproj.vlm.photographs import read_rgb
from visproj.vlm.preparing import DialogueEncoder, prepare
from visproj.vlm.samples import Columns
from visproj.vlm.sources import open_source

PROMPT = "What is it?"
GOOD = {"image": "a.png", "captions": ["A red dot.", "One red pixel."]}


@pytest.fixture(scope="module")
def encode():
    return DialogueEncoder(tiny_model(), None)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISPROJ_CACHE_DIR", str(tmp_path / "cache"))


def prepared(data, encode):
    return prepare(open_source(data), "train", Columns(), PROMPT, encode)


@pytest.fixture(scope="module")
def built_in(encode, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISPROJ_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return prepared(None, encode)


def captions(found):
    return [caption for row in found.table["answers"] for caption in row[0]]


def test_the_built_in_set_is_large_enough(built_in):
    files = [file for number in range(len(built_in.table)) for file in built_in.images(number)]
    assert len(files) == len({file.stem for file in files}) == 15
    assert all(read_rgb(file).mode == "RGB" for file in files)
    assert all(len(row[0]) >= 3 for row in built_in.table["answers"])
    assert built_in.table["questions"][:] == [[PROMPT]] * 15


def test_no_two_built_in_captions_are_the_same(built_in):
    found = [caption.lower() for caption in captions(built_in)]
    assert len(found) == len(set(found)) == 45
    assert all(6 <= len(caption.split()) <= 14 for caption in found)


def test_built_in_captions_stay_true_in_a_mirror(built_in):
    words = " ".join(captions(built_in)).lower().replace(".", "").split()
    assert not {"left", "right", "leftmost", "rightmost"} & set(words)


@pytest.fixture
def folder(tmp_path):
    """Two small images."""
    inside = tmp_path / "set"
    (inside / "more").mkdir(parents=True)
    for path in (inside / "a.png", inside / "more/a.png"):
        tiny_photograph().save(path)
    return inside


def write(folder, text):
    (folder / "captions.jsonl").write_bytes(text.encode() if isinstance(text, str) else text)


def test_both_forms_of_a_line(folder, encode):
    other = json.dumps({"image": "more/a.png", "caption": " Ein röter Punkt. "})
    write(folder, f"{json.dumps(GOOD)}\n\n{other}\n")
    found = prepared(str(folder), encode)
    assert [found.images(number) for number in (0, 1)] == [
        [folder / "a.png"],
        [folder / "more/a.png"],
    ]
    assert found.table["answers"][:] == [[GOOD["captions"]], [["Ein röter Punkt."]]]


def test_windows_line_ends_and_a_byte_order_mark(folder, encode):
    write(folder, (json.dumps(GOOD) + "\r\n\r\n").encode("utf-8-sig"))
    assert captions(prepared(str(folder), encode)) == GOOD["captions"]


FAULTS = {
    "not JSON": ("{'image': 'a.png'}", r"not JSON \("),
    "no image": ('{"captions": ["x"]}', "it has a caption and no image"),
    "no captions": ('{"image": "a.png"}', "it has no column with texts: it has image"),
    "blank": ('{"image": "a.png", "caption": " "}', "its caption is ' ', expected a text "),
    "missing": ('{"image": "b.png", "caption": "x"}', r"no such image: .*b\.png"),
}


@pytest.mark.parametrize(("line", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_with_its_line(folder, encode, line, message):
    write(folder, f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(InputError, match=rf"^1 of 2 .*{folder}/captions\.jsonl, line 3: {message}"):
        prepared(str(folder), encode)


def test_no_lines_at_all(folder, encode):
    write(folder, "\n  \n")
    with pytest.raises(InputError, match=r"captions\.jsonl has no rows"):
        prepared(str(folder), encode)
