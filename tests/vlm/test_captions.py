import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from vlm.tiny import PROMPT, tiny_model

from visproj.errors import InputError
from visproj.vlm.bundled import bundled_file
from visproj.vlm.captions import check_captions, load_captions

GOOD = {"image": "a.png", "captions": ["A red dot.", "One red pixel."]}


@pytest.fixture
def folder(tmp_path):
    """Two small images, and beside the folder one that no line may reach."""
    inside = tmp_path / "set"
    (inside / "more").mkdir(parents=True)
    for path in (inside / "a.png", inside / "more/a.png", tmp_path / "outside.png"):
        Image.new("RGB", (2, 1), "red").save(path)
    return inside


def write(folder, *lines):
    """Write lines, dicts as JSON, and return the file."""
    file = folder / "captions.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def built_in():
    return load_captions()


def test_the_built_in_set_is_large_enough(built_in):
    assert len(built_in) >= 12
    assert len({photograph.name for photograph in built_in}) == len(built_in)
    assert all(photograph.image.mode == "RGB" for photograph in built_in)
    assert all(len(photograph.captions) >= 3 for photograph in built_in)


def test_no_two_built_in_captions_are_the_same(built_in):
    captions = [caption.lower() for photograph in built_in for caption in photograph.captions]
    assert len(captions) == len(set(captions)) == 45
    assert all(6 <= len(caption.split()) <= 14 for caption in captions)


def test_built_in_captions_stay_true_in_a_mirror(built_in):
    words = " ".join(caption.lower() for photograph in built_in for caption in photograph.captions)
    assert not {"left", "right", "leftmost", "rightmost"} & set(words.replace(".", "").split())


def test_built_in_names_are_those_of_the_files(built_in):
    lines = bundled_file("visproj", "vlm/captions.jsonl").read_text().splitlines()
    assert [photograph.name for photograph in built_in] == [
        Path(json.loads(line)["image"]).stem for line in lines
    ]


def test_a_folder_with_both_forms_of_a_line(folder):
    write(folder, GOOD, "", {"image": "more/a.png", "caption": " Ein röter Punkt. "})
    first, second = load_captions(folder)
    assert (first.name, first.captions) == ("a", ("A red dot.", "One red pixel."))
    assert (second.name, second.captions) == ("a-2", ("Ein röter Punkt.",))
    assert np.asarray(second.image).tolist() == [[[255, 0, 0], [255, 0, 0]]]


def test_windows_line_ends_and_a_byte_order_mark(folder):
    text = json.dumps(GOOD) + "\r\n\r\n"
    (folder / "captions.jsonl").write_bytes(text.encode("utf-8-sig"))
    assert [photograph.name for photograph in load_captions(folder)] == ["a"]


FAULTS = {
    "not JSON": ("{'image': 'a.png'}", r"not JSON \(.+\)"),
    "nested without end": ("[" * 100_000, "not JSON"),
    "not an object": ('["a.png", "A dot."]', r'not a JSON object but \["a\.png", "A dot\."\]'),
    "null": ("null", "not a JSON object but null"),
    "no image": ({"captions": ["x"]}, "the key image is missing"),
    "no captions": ({"image": "a.png"}, "one of the keys caption and captions is needed"),
    "both keys": ({**GOOD, "caption": "x"}, "one of the keys .* is needed, not both"),
    "unknown key": ({**GOOD, "text": "x"}, r"unknown keys \['text'\]"),
    "image is a number": ({**GOOD, "image": 3}, "image is 3, not a path"),
    "image is blank": ({**GOOD, "image": " "}, "image is ' ', not a path"),
    "captions is a text": ({**GOOD, "captions": "A dot."}, "captions is 'A dot.', not a list"),
    "captions is null": ({**GOOD, "captions": None}, "captions is None, not a list"),
    "captions is empty": ({**GOOD, "captions": []}, r"captions is \[\], not a list"),
    "a caption is a number": ({**GOOD, "captions": ["x", 1]}, "the caption 1 is not a text"),
    "a caption is blank": ({**GOOD, "captions": ["x", " \t"]}, r"the caption ' \\t' .*is blank"),
    "caption is empty": ({"image": "a.png", "caption": ""}, "the caption '' .*is blank"),
    "caption is a list": ({"image": "a.png", "caption": ["x"]}, r"the caption \['x'\] is not"),
    "placeholder": (
        {**GOOD, "captions": ["x", "a <image>"]},
        "the caption 'a <image>' has <image>",
    ),
    "half a pair": (
        {**GOOD, "captions": ["\ud83d"]},
        r"the caption '\\ud83d' has half",
    ),
    "parent folder": ({**GOOD, "image": "../outside.png"}, r"image \.\./outside\.png leaves"),
    "parent in between": ({**GOOD, "image": "more/../a.png"}, "leaves the folder"),
    "absolute path": ({**GOOD, "image": "/tmp/a.png"}, "the image /tmp/a.png leaves the folder"),
    "image is a folder": ({**GOOD, "image": "more"}, "cannot read .*more as an image"),
    "image is a text file": ({**GOOD, "image": "captions.jsonl"}, "cannot read .*jsonl as an"),
    "name too long": ({**GOOD, "image": "a" * 300}, "File name too long"),
}


@pytest.mark.parametrize(("line", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_told_with_its_line(folder, line, message):
    file = write(folder, {"image": "more/a.png", "caption": "A dot."}, "", line)
    with pytest.raises(ValueError, match=f"^{file}, line 3: .*{message}"):
        load_captions(folder)


def test_bytes_that_are_not_utf_8(folder):
    file = write(folder, GOOD)
    file.write_bytes(file.read_bytes() + '{"image": "café"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=f"^{file}, line 2: not UTF-8"):
        load_captions(folder)


@pytest.mark.parametrize("again", ["a.png", "./a.png"])
def test_the_same_image_twice(folder, again):
    file = write(
        folder, "", GOOD, {"image": "more/a.png", "caption": "x"}, {**GOOD, "image": again}
    )
    with pytest.raises(ValueError, match=rf"^{file}, line 4: the image a\.png was on line 2"):
        load_captions(folder)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".bmp", ".tiff", ".webp"])
def test_a_truncated_image(folder, suffix):
    damaged = folder / f"half{suffix}"
    Image.effect_noise((64, 64), 50).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    file = write(folder, GOOD, {"image": damaged.name, "caption": "Noise."})
    with pytest.raises(ValueError, match=f"^{file}, line 2: cannot read {damaged} as an image"):
        load_captions(folder)


def test_an_image_that_is_missing(folder):
    file = write(folder, GOOD, {"image": "b.png", "caption": "x"})
    with pytest.raises(FileNotFoundError, match=rf"^{file}, line 2: no such image: .*b\.png"):
        load_captions(folder)


@pytest.mark.parametrize("lines", [(), ("", "  ")])
def test_no_lines_at_all(folder, lines):
    file = write(folder, *lines)
    with pytest.raises(ValueError, match=f"^{file} has no lines"):
        load_captions(folder)


@pytest.mark.parametrize("name", ["more", "nowhere", "a.png"])
def test_no_captions_file(folder, name):
    with pytest.raises(FileNotFoundError, match=rf"^no such captions file: .*{name}/captions"):
        load_captions(folder / name)


def photograph(name, *captions):
    return SimpleNamespace(name=name, captions=captions)


def test_captions_that_only_a_tokenizer_can_refuse():
    model = tiny_model()
    model.language_model.config.max_position_embeddings = 60
    room = 60 - 17 - len(model.prompt_ids(PROMPT)) + 1
    fits, long = "c" * room, "c" * (room + 1)  # the end of text needs no room
    photographs = [photograph("a", "x", fits)]
    check_captions(photographs, PROMPT, model)
    with pytest.raises(InputError, match=r"^the caption 'c+\'? of b: .* do not fit into the 60 "):
        check_captions([*photographs, photograph("b", "x", long)], PROMPT, model)
    with pytest.raises(InputError, match=r"^the caption '<.end.>' of b: it has no tokens"):
        check_captions([photograph("b", "<|end|>")], PROMPT, model)
