"""Opening the data set that ``--data`` names, by its format and with the library ``datasets``."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from visproj.errors import InputError
from visproj.files import cache_folder
from visproj.vlm.bundled import bundled_file, bundled_image
from visproj.vlm.run_folder import is_writable

CAPTIONS = "captions.jsonl"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SAVED = ("state.json", "dataset_dict.json")  # save_to_disk writes one or the other
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
SHARDS = ".tar"
LINES = (".json", ".jsonl")
# JSON files that describe a data set on the hub and have no samples.
DESCRIPTIONS = (*SAVED, "dataset_info.json", "dataset_infos.json")
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}
FAULT = "__fault__"  # field of a shard's sample that says why it cannot be used
PIECE = 2**20  # characters of a JSON file that are read at a time
SPACE = re.compile(r"[ \t\r\n]*")
FORMATS = (
    f"a folder with {CAPTIONS}; JSON or JSONL with conversations, captions, or questions and "
    "answers; a folder of images with metadata.jsonl or metadata.csv; Parquet, Arrow or CSV files; "
    "a folder that datasets' save_to_disk wrote; WebDataset shards (*.tar); a data set's name on "
    "the hub"
)


class Row(NamedTuple):
    """An entry of a JSON file, or the reason why it cannot be used.

    Attributes:
        where: The file, and the line or the number of the entry.
        values: Values by column name; ``None`` if there is a fault.
        fault: Reason why the entry cannot be used; ``None`` if it can.
    """

    where: str
    values: dict[str, Any] | None
    fault: str | None = None


@dataclass(frozen=True)
class Source:
    """An opened data set: either a JSON file, or what the library ``datasets`` has loaded.

    Attributes:
        name: Name of the data set in messages.
        images: Folder that image paths are relative to.
        file: The JSON or JSONL file; ``None`` if ``splits`` is given.
        splits: Splits by name, ``datasets.Dataset`` or, if streamed, ``IterableDataset``.
        bundled: Whether image paths begin with the name of the installed package that has them.
    """

    name: str
    images: Path
    file: Path | None = None
    splits: dict[str, Any] | None = None
    bundled: bool = False

    @property
    def is_stream(self) -> bool:
        """True if rows can only be read in sequence and their number is not known."""
        return self.splits is not None and not hasattr(next(iter(self.splits.values())), "__len__")

    def rows(self) -> Iterator[Row]:
        """Return an iterator over the rows of the JSON file, which is read piece by piece."""
        assert self.file is not None
        return _array(self.file) if _is_array(self.file) else _lines(self.file)

    def split(self, name: str) -> Any:
        """Return the rows of a split.

        Raises:
            InputError: There is no such split; the message lists the splits that exist.
        """
        assert self.splits is not None
        if name not in self.splits:
            raise InputError(f"{self.name} has no split {name}: it has {', '.join(self.splits)}")
        return self.splits[name]


def open_source(data: str | None, images: Path | None = None, *, streaming: bool = False) -> Source:
    """Open a data set, in the format that its files or its name show.

    Args:
        data: A file, a folder, a pattern of files or a name on the hub; ``None`` is the set of 15
            photographs that comes with scikit-image and scikit-learn.
        images: Folder that image paths are relative to; the file's own if ``None``.
        streaming: Stream a data set from the hub, without a copy on disk.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: The format is not supported; the message lists the supported ones.
        ConnectionError: It is not a local path and could not be downloaded from the hub.
        ModuleNotFoundError: The built-in set needs a package that is not installed.
    """
    if data is None:
        file = bundled_file("visproj", f"vlm/{CAPTIONS}")
        source = Source("the built-in photographs", file.parent, file, bundled=True)
        for row in source.rows():  # raises for a missing package before models are loaded
            bundled_image((row.values or {})["image"])
        return source
    path = Path(data)
    if any((path / name).is_file() for name in SAVED):
        return Source(data, images or path, splits=_splits(_saved(path), data))
    found = _json_file(path)
    if found is not None:
        return Source(str(found), images or found.parent, found)
    if _is_image_folder(path):
        loaded = _load(data, "imagefolder", data_dir=data)
        return Source(data, images or path, splits=_splits(loaded, data))
    files = _files(path)
    if files:
        return _from_files(data, files, images)
    if path.exists():
        raise InputError(
            f"{data} is not a data set of a supported format{_reason(path)}. Supported: {FORMATS}"
        )
    if path.suffix in (*LINES, *BUILDERS, SHARDS) or path.is_absolute():
        raise FileNotFoundError(f"no such data: {data}")
    loaded = _load(data, data, streaming=streaming)
    return Source(data, images or Path(), splits=_splits(loaded, data))


def _json_file(path: Path) -> Path | None:
    """Return the JSON file that ``path`` is or, if it is a folder, the only one in it."""
    if path.is_file() and path.suffix in LINES:
        return path
    if (path / CAPTIONS).is_file():
        return path / CAPTIONS
    files = [] if _is_image_folder(path) else _json_files(path)
    return files[0] if len(files) == 1 else None


def _json_files(path: Path) -> list[Path]:
    files = sorted(path.iterdir()) if path.is_dir() else []
    return [file for file in files if file.suffix in LINES and file.name not in DESCRIPTIONS]


def _is_image_folder(path: Path) -> bool:
    """Return whether a folder, or those of its splits, has the metadata of ``imagefolder``."""
    return any(any(path.glob(pattern)) for name in METADATA for pattern in (name, f"*/{name}"))


def _files(path: Path) -> list[Path]:
    """Return the files with rows that a path, a folder or a pattern names."""
    found = [path] if path.is_file() else []
    if path.is_dir():
        found = sorted(path.rglob("*"))
    elif "*" in path.name and path.parent.is_dir():
        found = sorted(path.parent.glob(path.name))
    return [file for file in found if file.suffix in (*BUILDERS, SHARDS)]


def _reason(path: Path) -> str:
    files = _json_files(path)
    if files:
        return f": it has several JSON files ({', '.join(file.name for file in files)}), name one"
    return "" if path.is_file() else ": it has no file of a supported format"


def _from_files(data: str, files: list[Path], images: Path | None) -> Source:
    kinds = sorted({file.suffix for file in files})
    if len(kinds) > 1:
        raise InputError(f"{data} has files of several formats ({', '.join(kinds)}): name one")
    folder = Path(data) if Path(data).is_dir() else files[0].parent
    groups = _by_split(files, Path(data))
    if kinds == [SHARDS]:
        splits = {name: _streamed(group) for name, group in groups.items()}
        return Source(data, images or folder, splits=splits)
    # "none" and "NA" can be answers: they are not read as missing values.
    options = {"keep_default_na": False, "na_values": [""]} if kinds == [".csv"] else {}
    loaded = _load(data, BUILDERS[kinds[0]], data_files=groups, **options)
    return Source(data, images or folder, splits=_splits(loaded, data))


def _by_split(files: list[Path], folder: Path) -> dict[str, list[str]]:
    """Group files by the split in their paths below ``folder``; a single group is ``train``."""
    groups: dict[str, list[str]] = {}
    for file in files:
        below = file.relative_to(folder) if folder.is_dir() else file
        words = re.split("[^a-z]+", str(below).lower()) if folder.is_dir() else []
        split = next((SPLITS[word] for word in words if word in SPLITS), "train")
        groups.setdefault(split, []).append(str(file))
    return groups if len(groups) > 1 else {"train": [str(file) for file in files]}


def _streamed(shards: list[str]) -> Any:
    import datasets

    return datasets.IterableDataset.from_generator(shard_samples, gen_kwargs={"shards": shards})


def shard_samples(shards: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the samples of WebDataset shards.

    Files whose names are equal up to the first dot are one sample. It has ``__key__`` and one entry
    per file, under its lower-case suffix: the text of a ``txt``, the object of a ``json``, or else
    bytes. If a file or a shard cannot be read, the sample has ``__fault__`` with the reason.
    """
    for shard in shards:
        sample: dict[str, Any] = {}
        try:
            for key, suffix, content in _members(shard):
                if sample and sample["__key__"] != key:
                    yield sample
                    sample = {}
                sample |= {"__key__": key, **_field(suffix, content)}
        except (OSError, EOFError, tarfile.TarError) as error:
            yield {"__key__": shard, FAULT: f"cannot be read further ({error})"}
            continue
        if sample:
            yield sample


def _members(shard: str) -> Iterator[tuple[str, str, bytes]]:
    """Yield the key of the sample, the suffix and the content of each file in a shard."""
    with tarfile.open(shard, encoding="utf-8") as archive:
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            content = archive.extractfile(member) if member.isfile() and stem else None
            if content is not None:
                yield f"{shard}, {folder}{'/' * bool(folder)}{stem}", suffix.lower(), content.read()


def _field(suffix: str, content: bytes) -> dict[str, Any]:
    """Return the content of a sample's file under its suffix, or the fault."""
    if suffix not in ("json", "txt"):
        return {suffix: content}
    try:
        text = content.decode("utf-8-sig")
        return {suffix: json.loads(text) if suffix == "json" else text}
    except (ValueError, RecursionError) as error:
        return {FAULT: f"its {suffix} cannot be read ({error})"}


def _load(data: str, builder: str, **options: Any) -> Any:
    """Call ``datasets.load_dataset``, with errors shortened to one line."""
    import datasets

    cache = cache_folder()
    streaming = options.get("streaming", False)
    if cache is not None and not streaming and is_writable(cache):
        options["cache_dir"] = str(cache / "datasets")
    try:
        return datasets.load_dataset(builder, **options)
    except Exception as error:  # the builders raise anything
        reason = " ".join(str(error.__cause__ or error).split())[:240]
        if builder == data:
            raise ConnectionError(
                f"{data} is not a local file or folder and could not be downloaded from the hub "
                f"({reason}). Supported: {FORMATS}"
            ) from error
        raise InputError(f"cannot read {data} as {builder}: {reason}") from error


def _saved(path: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())[:240]}") from error


def _splits(loaded: Any, data: str) -> dict[str, Any]:
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    if not splits:
        raise InputError(f"{data} has no rows")
    return splits


def _is_array(file: Path) -> bool:
    """Return whether a JSON file is one list instead of one object per line."""
    with file.open("rb") as stream:
        start = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    return start.startswith(b"[")


def _array(file: Path) -> Iterator[Row]:
    number = 0
    try:
        for number, entry in enumerate(_entries(file)):
            where = f"{file}, entry {number}"
            if isinstance(entry, dict):
                yield Row(where, entry)
            else:
                yield Row(where, None, f"not a JSON object but {entry!r:.40}")
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise InputError(f"{file} is not JSON after entry {number} ({reason})") from error


def _entries(file: Path) -> Iterator[Any]:
    """Yield the entries of a JSON list; the file is read in pieces.

    Raises:
        ValueError: The file is not JSON, or not UTF-8.
        RecursionError: An entry is nested too deeply.
    """
    decode = json.JSONDecoder().raw_decode
    with file.open(encoding="utf-8-sig") as stream:
        text, place, end = stream.read(PIECE).lstrip(), 1, "["
        while end != "]":
            place = _after_space(text, place)
            if text[place : place + 1] == "]" and end == "[":
                return
            try:
                entry, after = decode(text, place)
                after = _after_space(text, after)
                end = text[after : after + 1]
                if end not in (",", "]"):
                    raise json.JSONDecodeError("expected ',' or ']'", text, after)
            except ValueError:
                piece = stream.read(max(PIECE, len(text)))
                if not piece:
                    raise
                text, place = text[place:] + piece, 0
                continue
            yield entry
            place = after + 1


def _after_space(text: str, place: int) -> int:
    found = SPACE.match(text, place)
    return found.end() if found else place


def _lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                entry = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                yield Row(where, None, f"not UTF-8 ({error})")
            except (ValueError, RecursionError) as error:
                if number == 1 and line.rstrip().endswith((b"{", b"[", b",")):
                    raise InputError(
                        f"{file} is a JSON object over several lines: expected a list of samples, "
                        "or one sample per line"
                    ) from error
                yield Row(where, None, f"not JSON ({error})")
            else:
                if isinstance(entry, dict):
                    yield Row(where, entry)
                else:
                    yield Row(where, None, f"not a JSON object but {entry!r:.40}")


def stamp(file: Path) -> str:
    """Return a file's path, size and modification time, which change if the file does."""
    status = os.stat(file)
    return f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
