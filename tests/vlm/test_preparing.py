import json
import logging
import os
from io import BytesIO

import datasets
import numpy as np
import pytest
from PIL import Image
from vlm.tiny import TEMPLATE, tiny_model, tiny_photograph
from vlm.training_models import write_captions, write_dialogues

from visproj.errors import InputError
from visproj.vlm import preparing
from visproj.vlm.preparing import DialogueEncoder, check_faults, prepare
from visproj.vlm.samples import Columns
from visproj.vlm.sources import Source, open_source

PROMPT = "What is it?"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISPROJ_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def encode(model):
    return DialogueEncoder(model, None)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    tiny_photograph().save(tmp_path / "data/a.png")
    return tmp_path / "data"


@pytest.fixture
def read(monkeypatch):
    """The rows that were read, by their numbers."""
    seen = []
    samples = preparing._Reader._samples

    def watched(reader, where, number, *arguments):
        seen.append(number)
        return samples(reader, where, number, *arguments)

    monkeypatch.setattr(preparing._Reader, "_samples", watched)
    return seen


def prepared(data, encode, columns=None, split="train", **options):
    source = data if isinstance(data, Source) else open_source(str(data))
    return prepare(source, split, columns or Columns(), PROMPT, encode, **options)


def write(folder, *rows, name="rows.jsonl"):
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("".join(f"{text}\n" for text in texts))
    return folder / name


def caption(text="a cat", image="a.png"):
    return {"image": image, "caption": text}


def dialogue(question, answer, **row):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {**row, "conversations": turns}


# What is prepared


def test_captions(tmp_path, encode):
    folder = write_captions(tmp_path / "captions")
    found = prepared(folder, encode)
    assert len(found.table) == 6
    row = found.table[1]
    assert row["questions"] == [PROMPT]
    assert row["answers"] == [["a dog sat", "dog"]]
    assert (row["images"], row["paths"]) == (1, [str(folder / "1.png")])
    assert row["where"] == f"{folder / 'captions.jsonl'}, line 2"
    assert found.images(1) == [folder / "1.png"]
    assert found.embedded is None
    assert found.cut == 0


def test_dialogues(tmp_path, encode):
    file = write_dialogues(tmp_path / "llava")
    found = prepared(file, encode)
    assert found.table["images"][:] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [len(row) for row in found.table["questions"]] == [1, 2] * 4
    assert found.images(2) == [file.parent / "2-0.png", file.parent / "2-1.png"]
    assert found.images(0) == []
    assert found.table["where"][7] == f"{file}, entry 7"


def test_lengths_are_those_of_the_dialogues(tmp_path, encode, model):
    found = prepared(write_dialogues(tmp_path / "llava"), encode)
    for row in found.table:
        ids = model.dialogue(row["questions"], row["answers"], row["images"]).ids
        places = ids.count(model.image_token_id)
        assert places == row["images"]
        assert row["length"] == len(ids) + places * (model.tokens_per_image - 1)


def test_rows_of_llavas_mix(folder, encode):
    file = write(
        folder,
        dialogue("<image>\nWhat?", " A cat. ", id="1", image="a.png", model="x"),
        dialogue("What?\n<image>", "A cat.", id=2, image="a.png"),
        dialogue("What?", "A cat.", id=3),
        dialogue("What?", "A cat.", id=4, image="a.png"),
        dialogue("What?", "A cat.", id=5, image=None),
    )
    found = prepared(file, encode)
    assert found.table["images"][:] == [1, 1, 0, 1, 0]
    assert found.table["answers"][:] == [[["A cat."]]] * 5


def test_a_last_question_without_answer_is_left_out(folder, encode):
    row = dialogue("<image>\nWhat?", "A cat.", image="a.png")
    row["conversations"].append({"from": "human", "value": "Sure?"})
    found = prepared(write(folder, row), encode)
    assert found.table["questions"][:] == [["<image>\nWhat?"]]


@pytest.mark.parametrize("alternatives", [True, False])
def test_alternatives(folder, encode, alternatives):
    file = write(folder, {"image": "a.png", "captions": list("abcde")}, caption("x"))
    found = prepared(file, encode, alternatives=alternatives)
    together = [[list("abcde")], [["x"]]]
    apart = [[[text]] for text in "abcdex"]
    assert found.table["answers"][:] == (together if alternatives else apart)
    assert found.table["row"][:] == ([0, 1] if alternatives else [0] * 5 + [1])


def test_the_image_column_may_be_missing_in_a_row(folder, encode):
    file = write(
        folder, dialogue("<image>\na", "b", photo="a.png"), dialogue("What?", "c"), name="a.json"
    )
    assert prepared(file, encode, Columns(image="photo")).table["images"][:] == [1, 0]


def test_images_are_relative_to_a_folder(folder, tmp_path, encode):
    file = write(tmp_path, caption())
    found = prepared(open_source(str(file), folder), encode)
    assert found.images(0) == [folder / "a.png"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_with_paths(folder, encode, kind):
    rows = datasets.Dataset.from_dict(
        {
            "image": ["a.png", None],
            "question": ["Who?", "What?"],
            "answer": ["none", "2 cats"],
        }
    )
    getattr(rows, f"to_{kind}")(folder / f"rows.{kind}")
    found = prepared(folder, encode)
    assert found.table["images"][:] == [1, 0]
    assert found.images(0) == [folder / "a.png"]
    assert found.table["answers"][:] == [[["none"]], [["2 cats"]]]


def test_columns_of_a_table_are_checked_before_its_rows(folder, encode, read):
    datasets.Dataset.from_dict({"img": ["a"], "label": [1]}).to_parquet(folder / "a.parquet")
    with pytest.raises(InputError, match=r"has no column with texts: it has img, label\."):
        prepared(folder, encode)
    with pytest.raises(InputError, match=r"has no column says: it has img, label$"):
        prepared(folder, encode, Columns(caption="says"))
    with pytest.raises(InputError, match=r"has no split dev: it has train$"):
        prepared(folder, encode, split="dev")
    assert read == []


# Images that lie in the data set


def png(grey):
    file = BytesIO()
    Image.new("RGB", (8, 8), (grey,) * 3).save(file, "png")
    return file.getvalue()


def greys(found, number):
    return [np.asarray(Image.open(BytesIO(image))).max() for image in found.images(number)]


def texts(count):
    return [f"cat {number}" for number in range(count)]


def stored(kind, count):
    """Rows whose ``image`` has pixels of 10 times the row's number."""
    images = [png(10 * number) for number in range(count)]
    features = {"caption": datasets.Value("string")}
    if kind == "image":
        features["image"] = datasets.Image()
    elif kind in ("struct", "large struct"):
        size = kind.removesuffix("struct").strip() and "large_"
        part = {"bytes": f"{size}binary", "path": f"{size}string"}
        features["image"] = {name: datasets.Value(dtype) for name, dtype in part.items()}
        images = [{"bytes": image, "path": "x.png"} for image in images]
    else:
        features["image"] = datasets.Value(kind)
    rows = {"caption": texts(count), "image": images}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.mark.parametrize("kind", ["image", "struct", "large struct", "binary", "large_binary"])
def test_embedded_images_are_found_by_their_rows(folder, encode, kind):
    stored(kind, 6).to_parquet(folder / "a.parquet")
    found = prepared(folder / "a.parquet", encode)
    assert found.table["images"][:] == [1] * 6
    assert [greys(found, number) for number in range(6)] == [[0], [10], [20], [30], [40], [50]]
    some = found.select([4, 1]).select([1])
    assert greys(some, 0) == [10]
    assert some.table["answers"][:] == [[["cat 1"]]]


@pytest.mark.parametrize("kind", [datasets.Image(), {"bytes": "binary", "path": "string"}])
def test_lists_of_embedded_images(folder, encode, kind):
    if isinstance(kind, dict):
        kind = {name: datasets.Value(dtype) for name, dtype in kind.items()}
    images = [[{"bytes": png(10 * n + m), "path": None} for m in range(n)] for n in range(4)]
    features = {
        "images": datasets.List(kind),
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
    }
    rows = {"images": images, "question": texts(4), "answer": texts(4)}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(
        folder / "a.parquet"
    )
    found = prepared(folder / "a.parquet", encode)
    assert found.table["images"][:] == [0, 1, 2, 3]
    assert [greys(found, number) for number in range(4)] == [[], [10], [20, 21], [30, 31, 32]]


def test_alternatives_of_one_row_have_its_image(folder, encode):
    rows = {"image": [png(0), png(90)], "captions": [["a", "b"], ["c", "d"]]}
    features = {"image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(folder / "a.parquet")
    found = prepared(folder, encode, alternatives=False)
    assert [greys(found, number) for number in range(4)] == [[0], [0], [90], [90]]


def test_rows_left_out_do_not_shift_the_images(folder, encode, monkeypatch):
    monkeypatch.setattr(preparing, "FAULTS_ALLOWED", 0.5)
    rows = stored("image", 4).to_dict()
    rows["caption"][1] = " "
    datasets.Dataset.from_dict(rows).to_parquet(folder / "a.parquet")
    found = prepared(folder, encode)
    assert [greys(found, number) for number in range(3)] == [[0], [20], [30]]


def test_rows_that_were_rearranged(encode):
    rows = stored("image", 5).select([3, 0, 4])
    source = Source("x", None, splits={"train": rows})
    found = prepared(source, encode)
    assert [greys(found, number) for number in range(3)] == [[30], [0], [40]]


def test_embedded_images_are_not_copied(folder, encode, cache):
    rng = np.random.default_rng(0)
    rows = {"image": [rng.bytes(50_000) for _ in range(20)], "caption": texts(20)}
    datasets.Dataset.from_dict(rows).save_to_disk(folder / "saved")
    found = prepared(folder / "saved", encode)
    assert found.images(3) == [rows["image"][3]]
    written = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    assert 0 < written < 50_000


def test_embedded_paths_are_relative_to_the_folder(folder, encode):
    part = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    images = [
        {"bytes": None, "path": "a.png"},
        {"bytes": None, "path": None},
        {"bytes": None, "path": str(folder / "b.png")},
    ]
    datasets.Dataset.from_dict(
        {"image": images, "caption": texts(3)},
        features=datasets.Features({"image": part, "caption": datasets.Value("string")}),
    ).to_parquet(folder / "a.parquet")
    found = prepared(folder / "a.parquet", encode)
    assert found.images(0) == [folder / "a.png"]
    assert found.images(2) == [folder / "b.png"]
    with pytest.raises(InputError, match="its image is '', not a path"):
        found.images(1)


def test_an_image_folder(folder, encode):
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(10 * number))
    (folder / "a.png").unlink()
    write(
        folder,
        *({"file_name": f"{number}.png", "text": f"cat {number}"} for number in (2, 0, 1)),
        name="metadata.jsonl",
    )
    found = prepared(folder, encode)
    pairs = []
    for number in range(3):
        (file,) = found.images(number)
        grey = np.asarray(Image.open(BytesIO(file) if isinstance(file, bytes) else file)).max()
        pairs.append((found.table[number]["answers"], grey))
    assert sorted(pairs) == [([[f"cat {number}"]], 10 * number) for number in range(3)]


# The cache


def test_a_table_is_found_again_while_nothing_changes(folder, encode, model, read, cache):
    file = write(folder, caption(), caption("dog"))
    assert len(prepared(file, encode).table) == 2
    assert read == [0, 1]
    again = prepared(file, encode)
    assert read == [0, 1]
    assert again.table.cache_files
    assert all(str(cache) in entry["filename"] for entry in again.table.cache_files)
    assert prepared(file, DialogueEncoder(model, None)).table[:] == again.table[:]
    assert read == [0, 1]


def changed_file(file):
    write(file.parent, caption(), caption("cat"))


def touched_file(file):
    os.utime(file, ns=(1, 1))


def other_version(file):
    preparing.VERSION += 1


CHANGES = {
    "limit": lambda model: {"encode": DialogueEncoder(model, 900)},
    "tokenizer": lambda _: {"encode": DialogueEncoder(tiny_model(template=f"a{TEMPLATE}"), None)},
    "prompt": lambda _: {"prompt": "Who?"},
    "columns": lambda _: {"columns": Columns(caption="caption")},
    "alternatives": lambda _: {"alternatives": False},
}


@pytest.mark.parametrize("change", [changed_file, touched_file, other_version, *CHANGES])
def test_a_table_is_made_anew(folder, encode, model, read, monkeypatch, change):
    monkeypatch.setattr(preparing, "VERSION", preparing.VERSION)
    options = {"columns": Columns(), "prompt": PROMPT, "encode": encode}
    file = write(folder, caption(), caption("dog"))
    prepare(open_source(str(file)), "train", **options)
    if callable(change):
        change(file)
    else:
        options |= CHANGES[change](model)
    found = prepare(open_source(str(file)), "train", **options)
    assert read == [0, 1, 0, 1]
    assert len(found.table) == 2


@pytest.mark.parametrize("kind", ["csv", "parquet", "imagefolder"])
def test_tables_are_found_again_until_their_file_changes(folder, encode, read, kind):
    def save(text):
        rows = datasets.Dataset.from_dict({"image": ["a.png"], "caption": [text]})
        if kind == "imagefolder":
            write(folder, {"file_name": "a.png", "caption": text}, name="metadata.jsonl")
        else:
            getattr(rows, f"to_{kind}")(folder / f"rows.{kind}")

    for text, count in (("cat", 1), ("dogs", 2)):
        save(text)
        for _ in range(2):
            assert prepared(folder, encode).table["answers"][:] == [[[text]]]
            assert len(read) == count


def test_an_image_that_has_come_is_no_fault_any_more(folder, encode, read):
    file = write(folder, caption(), caption(image="late.png"))
    for _ in range(2):
        with pytest.raises(InputError, match=r"1 of 2 .*line 2: no such image: .*late\.png"):
            prepared(file, encode)
    assert len(read) == 2
    tiny_photograph().save(folder / "late.png")
    for _ in range(2):
        assert len(prepared(file, encode).table) == 2
        assert len(read) == 4


def test_without_a_cache_the_table_is_in_memory(folder, encode, read, tmp_path, monkeypatch):
    file = write(folder, caption())
    (tmp_path / "taken").write_text("mine")
    monkeypatch.setenv("VISPROJ_CACHE_DIR", str(tmp_path / "taken"))
    for _ in range(2):
        found = prepared(file, encode)
        assert found.images(0) == [folder / "a.png"]
        assert not found.table.cache_files
    assert read == [0, 0]


# Faults


FAULTS = {
    "not JSON": ("{'image'}", "not JSON"),
    "a list": ("[1]", r"not a JSON object but \[1\]"),
    "no texts": ({"image": "a.png"}, "it has no column with texts: it has image"),
    "no image": ({"caption": "x"}, "it has a caption and no image"),
    "missing": (caption(image="b.png"), r"no such image: .*data/b\.png"),
    "a folder": (caption(image="."), "no such image"),
    "half a pair in a path": (caption(image="\ud83d.png"), r"no such image: .*\\ud83d\.png"),
    "half a pair in a name": ({"\ud83d": 1}, r"it has no column .* it has \\ud83d"),
    "a long path": (caption(image="a" * 300), "File name too long|no such image"),
    "a number": (caption(image=3), "its image is 3, not a path"),
    "true": (caption(image=True), "its image is True, not a path"),
    "blank": (caption(" "), "its caption is ' ', expected a text "),
    "only an end": (caption("<|end|>"), "an answer has no tokens"),
    "an image too few": (dialogue("<image>", "b"), "1 <image> placeholders in the text of 0"),
    "an image too many": (
        dialogue("<image> and <image>", "b", image="a.png"),
        "2 <image> placeholders in the text of 1 images",
    ),
    "no answer": ({"question": "a", "reply": "b"}, "it has no answer, only question, reply"),
}


@pytest.mark.parametrize(("row", "message"), FAULTS.values(), ids=FAULTS)
def test_a_damaged_row_is_left_out_and_named(folder, encode, caplog, row, message):
    file = write(folder, *[caption()] * 60, row, *[caption("dog")] * 60)
    with caplog.at_level(logging.WARNING, "visproj"):
        found = prepared(file, encode)
    assert len(found.table) == 120
    assert found.table["row"][58:62] == [58, 59, 61, 62]
    (record,) = caplog.records
    start = f"^1 of 121 samples cannot be used and are left out: {file}, line 61: .*"
    with pytest.raises(AssertionError, match=start + message):
        raise AssertionError(record.getMessage())


@pytest.mark.parametrize("cached", [False, True])
def test_strict_stops_at_the_first(folder, encode, read, cached):
    file = write(folder, *[caption()] * 150, caption(" "), *[caption()] * 2000)
    if cached:
        prepared(file, encode)
    seen = len(read)
    with pytest.raises(InputError, match=rf"{file}, line 151: its caption is ' '"):
        prepared(file, encode, strict=True)
    assert len(read) == (seen if cached else 151)


def test_too_many_faults_stop_with_the_first_ten(folder, encode):
    rows = [caption(), *[caption("")] * 12]
    with pytest.raises(InputError, match=r"^12 of 13 .*line 2: .*line 11: .*; and 2 more$") as stop:
        prepared(write(folder, *rows), encode)
    assert "line 12" not in str(stop.value)


@pytest.mark.parametrize("faulty", [0, 1, 2])
def test_one_in_a_hundred_is_the_limit(caplog, faulty):
    if faulty == 2:
        with pytest.raises(InputError, match=r"^2 of 100 samples cannot be used: a; b$"):
            check_faults(["a", "b"], 2, 100, strict=False)
        return
    check_faults(["a"] * faulty, faulty, 100, strict=False)
    assert len(caplog.records) == faulty
    if faulty:
        with pytest.raises(InputError, match=r"^1 of 100 samples cannot be used: a$"):
            check_faults(["a"], 1, 100, strict=True)


@pytest.mark.parametrize("text", ["", "\n", "[]"])
def test_no_rows(folder, encode, text):
    (folder / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"a\.json has no rows$"):
        prepared(folder / "a.json", encode)


def test_a_damaged_list_is_named(folder, encode):
    (folder / "a.json").write_text(json.dumps([caption()] * 3)[:-1])
    for _ in range(2):
        with pytest.raises(InputError, match=r"a\.json is not JSON after entry"):
            prepared(folder / "a.json", encode)


def test_cut_samples_are_counted(folder, model):
    file = write(folder, caption("c"), caption("c" * 50), caption("c" * 60))
    encode = DialogueEncoder(model, 65)
    found = prepared(file, encode)
    assert found.cut == 2
    assert found.select([0, 2]).cut == 1
    assert max(found.table["length"]) <= encode.limit
