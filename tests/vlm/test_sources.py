import io
import json
import tarfile

import datasets
import pytest
from vlm.tiny import tiny_photograph

from visproj.errors import InputError
from visproj.vlm import sources
from visproj.vlm.sources import FAULT, open_source, shard_samples

ROW = {"image": "a.png", "caption": "a cat"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISPROJ_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    tiny_photograph().save(tmp_path / "data/a.png")
    return tmp_path / "data"


def lines(*rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def values(source):
    return [row.values for row in source.rows()]


@pytest.mark.parametrize("name", ["captions.jsonl", "llava.json", "any.jsonl"])
def test_a_json_file_and_the_folder_that_has_it(folder, name):
    file = write(folder / name, lines(ROW))
    write(folder / "dataset_infos.json", "{}")
    for data in (file, folder):
        source = open_source(str(data))
        assert (source.file, source.images, source.name) == (file, folder, str(file))
        assert values(source) == [ROW]
        assert not source.is_stream
    assert open_source(str(file), folder / "images").images == folder / "images"


LAYOUTS = {
    "a list": json.dumps([ROW, ROW]),
    "a list on many lines": json.dumps([ROW, ROW], indent=2),
    "a list after blank lines": "\n \n" + json.dumps([ROW, ROW]) + "\n\n",
    "lines": lines(ROW, ROW),
    "blank lines": "\n" + lines(ROW) + "  \n\n" + lines(ROW).strip(),
    "a byte order mark": ("\ufeff" + lines(ROW, ROW)).encode(),
    "a list after a byte order mark": ("\ufeff" + json.dumps([ROW, ROW])).encode(),
    "ends of lines of Windows": lines(ROW, ROW).replace("\n", "\r\n").encode(),
}


@pytest.mark.parametrize("text", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_json(folder, text):
    assert values(open_source(str(write(folder / "a.json", text)))) == [ROW, ROW]


@pytest.mark.parametrize("text", ["", "\n \n", "[]", " [ ]\n"])
def test_no_rows(folder, text):
    assert values(open_source(str(write(folder / "a.json", text)))) == []


def test_ids_of_mixed_types(folder):
    rows = [{"id": 1}, {"id": "0001"}, {"id": None}]
    assert values(open_source(str(write(folder / "a.json", json.dumps(rows))))) == rows


@pytest.mark.parametrize("piece", [1, 2, 7, 64])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_is_read_piece_by_piece(folder, monkeypatch, piece, indent):
    monkeypatch.setattr(sources, "PIECE", piece)
    rows = [{"a": 'é "]}, {[" \\'}, {}, {"b": [1, [2]], "c": -1.5e3}, 17, "x", 1234, True, None]
    file = write(folder / "a.json", json.dumps(rows, indent=indent, ensure_ascii=False))
    read = [row.values or row.fault for row in open_source(str(file)).rows()]
    assert read[0] == rows[0]
    assert read[2:4] == [rows[2], "not a JSON object but 17"]
    assert len(read) == len(rows)


def test_a_long_list_is_not_held(folder, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 100)
    file = write(folder / "a.json", json.dumps([ROW] * 50) + "damaged")
    rows = open_source(str(file)).rows()
    with file.open("r+b") as stream:
        stream.seek(1000)
        stream.write(b"!" * 3000)
    assert [next(rows).values for _ in range(20)] == [ROW] * 20
    with pytest.raises(InputError, match=r"a\.json is not JSON after entry \d+ \("):
        list(rows)


@pytest.mark.parametrize(
    "text",
    [
        b'[{"a": 1}',
        b'[{"a": 1},',
        b'[{"a": 1} {"a": 2}]',
        b'[{"a": 1}, {"a": ]',
        b"[{'a': 1}]",
        b"[" * 100_000,
        b'[{"a": "\xe9"}]',
    ],
)
def test_a_damaged_list(folder, text):
    file = write(folder / "a.json", text)
    with pytest.raises(InputError, match=rf"^{file} is not JSON after entry \d \("):
        list(open_source(str(file)).rows())


LINES = {
    "not JSON": ("{'image': 'a.png'}", r"not JSON \(.+\)"),
    "nested without end": ("[" * 100_000, "not JSON"),
    "a list": ('["a.png", "A dot."]', r"not a JSON object but \['a\.png', 'A dot\.'\]"),
    "null": ("null", "not a JSON object but None"),
    "not UTF-8": ('{"image": "café"}'.encode("latin-1"), "not UTF-8"),
}


@pytest.mark.parametrize(("line", "message"), LINES.values(), ids=LINES)
def test_a_fault_is_named_with_its_line(folder, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    file = write(
        folder / "a.jsonl", lines(ROW).encode() + b"\n" + line + b"\n" + lines(ROW).encode()
    )
    first, second, third = open_source(str(file)).rows()
    assert (first.values, third.values) == (ROW, ROW)
    assert second.values is None
    assert second.where == f"{file}, line 3"
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(second.fault)


@pytest.mark.parametrize("wrapper", [{"data": [ROW]}, ROW, [ROW]])
def test_one_object_over_several_lines(folder, wrapper):
    file = write(folder / "a.json", json.dumps(wrapper, indent=2))
    if isinstance(wrapper, list):
        assert values(open_source(str(file))) == wrapper
        return
    with pytest.raises(InputError, match=rf"^{file} is a JSON object over several lines"):
        list(open_source(str(file)).rows())


def table(rows=2):
    return datasets.Dataset.from_dict(
        {"image": ["a.png"] * rows, "caption": [f"cat {row}" for row in range(rows)]}
    )


def captions(source, split="train"):
    return source.split(split)["caption"][:]


@pytest.mark.parametrize("kind", ["parquet", "csv", "arrow"])
def test_tables(folder, kind):
    file = folder / f"rows.{kind}"
    if kind == "arrow":
        table().save_to_disk(folder / "saved")
        next((folder / "saved").glob("*.arrow")).rename(file)
        (folder / "saved/state.json").unlink()
    else:
        getattr(table(), f"to_{kind}")(file)
    for data in (file, folder, folder / f"*.{kind}"):
        source = open_source(str(data))
        assert captions(source) == ["cat 0", "cat 1"]
        assert source.images == folder
        assert not source.is_stream


def test_words_in_a_csv_are_no_missing_values(folder):
    file = write(folder / "a.csv", "image,question,answer\na.png,What?,none\n,Who?,NA\n")
    rows = open_source(str(file)).split("train")
    assert rows["answer"][:] == ["none", "NA"]
    assert rows["image"][:] == ["a.png", None]


def test_splits_of_a_folder_are_kept_apart(folder):
    for name, rows in {"train-00-of-01": 3, "val-00-of-01": 2, "test": 1}.items():
        table(rows).to_parquet(folder / f"{name}.parquet")
    source = open_source(str(folder))
    sizes = {name: len(rows) for name, rows in source.splits.items()}
    assert sizes == {"train": 3, "validation": 2, "test": 1}
    with pytest.raises(InputError, match=r"has no split dev: it has .*train.*validation"):
        source.split("dev")
    assert len(captions(open_source(str(folder / "val-00-of-01.parquet")))) == 2
    assert len(captions(open_source(str(folder / "*.parquet")))) == 6


def test_what_save_to_disk_wrote(folder):
    table(1).save_to_disk(folder / "one")
    datasets.DatasetDict(train=table(2), validation=table(3)).save_to_disk(folder / "several")
    assert captions(open_source(str(folder / "one"))) == ["cat 0"]
    several = open_source(str(folder / "several"))
    assert len(captions(several)) == 2
    assert len(captions(several, "validation")) == 3


@pytest.mark.parametrize("split", ["", "train/"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_image_folders(folder, name, split):
    (folder / "a.png").unlink()
    inside = folder / split
    inside.mkdir(exist_ok=True)
    for number in range(2):
        tiny_photograph(number).save(inside / f"{number}.png")
    rows = [{"file_name": f"{number}.png", "text": f"cat {number}"} for number in range(2)]
    if name.endswith("csv"):
        text = "file_name,text\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    else:
        text = lines(*rows)
    write(inside / name, text)
    rows = open_source(str(folder)).split("train")
    assert rows["text"][:] == ["cat 0", "cat 1"]
    assert isinstance(rows.features["image"], datasets.Image)


def test_the_built_in_set_needs_no_path():
    source = open_source(None)
    assert source.bundled
    assert len(values(source)) == 15


@pytest.mark.parametrize("name", ["nowhere.json", "nowhere.parquet", "x/nowhere.tar", "x"])
def test_files_that_are_missing(tmp_path, monkeypatch, name):
    with pytest.raises(FileNotFoundError, match=r"^no such data: "):
        open_source(str(tmp_path / name))
    if "." in name:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match=f"^no such data: {name}"):
            open_source(name)


def test_formats_that_are_not_known_are_named_with_those_that_are(folder):
    with pytest.raises(InputError, match=r"^.*a\.png is not a data set .* Parquet, Arrow or CSV"):
        open_source(str(folder / "a.png"))
    with pytest.raises(InputError, match=r"data is not .* it has no file .* captions\.jsonl"):
        open_source(str(folder))
    for name in ("a.json", "b.jsonl"):
        write(folder / name, lines(ROW))
    with pytest.raises(InputError, match=r"has several JSON files \(a\.json, b\.jsonl\), name one"):
        open_source(str(folder))
    table().to_parquet(folder / "a.parquet")
    table().to_csv(folder / "a.csv")
    with pytest.raises(InputError, match=r"several formats \(\.csv, \.parquet\): name one"):
        open_source(str(folder))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.csv"])
def test_damaged_tables(folder, name):
    write(folder / name, b"")
    with pytest.raises(InputError, match=f"^cannot read .*{name} as {name[2:]}: .+"):
        open_source(str(folder / name))
    write(folder / "saved/state.json", "{}")
    with pytest.raises(InputError, match=r"^cannot read .*saved: .+"):
        open_source(str(folder / "saved"))


def test_a_name_that_the_hub_does_not_give(monkeypatch):
    def unreachable(*names, **options):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ConnectionError, match=r"^a/b is not a local file .*\(no network\)\. .*JSONL"
    ):
        open_source("a/b")


def test_a_hub_data_set(monkeypatch):
    calls = []

    def load(name, **options):
        calls.append((name, options["streaming"]))
        rows = table()
        return {"train": rows.to_iterable_dataset() if options["streaming"] else rows}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert not open_source("a/b").is_stream
    assert open_source("a/b", streaming=True).is_stream
    assert calls == [("a/b", False), ("a/b", True)]


def test_a_cache_that_cannot_be_written(folder, tmp_path, monkeypatch):
    table().to_parquet(folder / "a.parquet")
    write(tmp_path / "file", "mine")
    monkeypatch.setenv("VISPROJ_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "other"))
    assert len(captions(open_source(str(folder)))) == 2


def shard(path, **files):
    """A tar of files; two underscores are a dot, three a slash."""
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name.replace("___", "/").replace("__", "."))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return str(path)


def test_samples_of_shards(tmp_path):
    first = shard(
        tmp_path / "a.tar",
        x___1__JPG=b"one",
        x___1__txt="é".encode(),
        x___2__png=b"two",
        x___2__json=b'{"id": "2"}',
    )
    second = shard(tmp_path / "b.tar", x___2__jpg=b"three", x___2__json=b'{"id": 2}')
    assert list(shard_samples([first, second])) == [
        {"__key__": f"{first}, x/1", "jpg": b"one", "txt": "é"},
        {"__key__": f"{first}, x/2", "png": b"two", "json": {"id": "2"}},
        {"__key__": f"{second}, x/2", "jpg": b"three", "json": {"id": 2}},
    ]
    source = open_source(str(tmp_path))
    assert source.is_stream
    assert len(list(source.split("train"))) == 3
    assert source.split("train").num_shards == 2


def test_damaged_shards(tmp_path):
    good = shard(tmp_path / "a.tar", a__txt=b"a")
    damaged = shard(
        tmp_path / "b.tar", a__txt=b"\xff", b__json=b"{", c__txt=b"c", d__bin=bytes(9000)
    )
    cut = (tmp_path / "b.tar").read_bytes()[:8000]
    (tmp_path / "b.tar").write_bytes(cut)
    (tmp_path / "c.tar").write_bytes(b"no shard at all")
    found = list(shard_samples([damaged, str(tmp_path / "c.tar"), good]))
    faults = [sample.get(FAULT, "")[:24] for sample in found]
    assert faults == [
        "its txt cannot be read (",
        "its json cannot be read ",
        "cannot be read further (",  # and c may have had more files
        "cannot be read further (",
        "",
    ]
    assert found[-1] == {"__key__": f"{good}, a", "txt": "a"}
