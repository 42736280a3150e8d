"""Preparation of a data set: rows are read once, checked, and kept in a memory-mapped table."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from visproj.errors import InputError
from visproj.files import cache_folder
from visproj.vlm.bundled import bundled_image
from visproj.vlm.compose import IGNORE_INDEX
from visproj.vlm.model import VisualLanguageModel
from visproj.vlm.prompts import Dialogue
from visproj.vlm.run_folder import is_writable
from visproj.vlm.samples import Columns, Sample, image_paths, read_sample
from visproj.vlm.sources import Row, Source, stamp

FAULTS_SHOWN = 10
FAULTS_ALLOWED = 0.01  # as a fraction of the samples
VERSION = 1  # of the table; raised when rows are read differently, so that tables are made anew

logger = logging.getLogger("visproj")


@dataclass(frozen=True)
class DialogueEncoder:
    """A callable that turns a sample into tokens and cuts them at a limit.

    Attributes:
        model: Model whose tokenizer and number of tokens per image are used.
        limit: Largest number of tokens, visual tokens included; ``None`` sets no limit.
    """

    model: VisualLanguageModel
    limit: int | None

    def __call__(self, sample: Sample, images: int) -> tuple[Dialogue, bool]:
        """Return the tokens of a sample, and whether some of them were cut off.

        Raises:
            InputError: As in :meth:`~visproj.vlm.model.VisualLanguageModel.dialogue`, or images and
                questions leave no room for an answer.
        """
        dialogue = self.model.dialogue(sample.questions, sample.answers, images)
        if self.limit is None or self.length(dialogue, images) <= self.limit:
            return dialogue, False
        positions = self._positions(dialogue)
        if max(positions) < self.limit:  # each alternative fits by itself
            return dialogue, False
        kept = [index for index, position in enumerate(positions) if position < self.limit]
        cut = Dialogue(*([row[index] for index in kept] for row in dialogue))
        if cut.ids.count(self.model.image_token_id) < images:
            raise InputError(f"its images do not fit into {self.limit} tokens")
        if all(label == IGNORE_INDEX for label in cut.labels):
            raise InputError(
                f"its images and questions leave no room for an answer in {self.limit} tokens"
            )
        return cut, True

    def length(self, dialogue: Dialogue, images: int) -> int:
        """Return the number of tokens in the sequence, visual tokens included."""
        return len(dialogue.ids) + images * (self.model.tokens_per_image - 1)

    def _positions(self, dialogue: Dialogue) -> list[int]:
        """Return each token's position, of an image the last one; alternatives share positions."""
        positions = []
        ends = {1: 0}
        image, per_image = self.model.image_token_id, self.model.tokens_per_image
        for token, branch in zip(dialogue.ids, dialogue.branches, strict=True):
            start = ends.get(branch, ends[1])
            size = per_image if token == image else 1
            positions.append(start + size - 1)
            ends[branch] = start + size
        return positions


@dataclass(frozen=True)
class Prepared:
    """A split of a data set that is ready for training.

    Attributes:
        table: Memory-mapped ``datasets.Dataset`` with the columns of :func:`_schema`.
        embedded: Rows of the data set if the images are in it; ``None`` if images are files.
        image_column: Column of ``embedded`` that holds the images.
        folder: Folder that paths in ``embedded`` are relative to.
    """

    table: Any
    embedded: Any
    image_column: str | None
    folder: Path

    @property
    def cut(self) -> int:
        """Number of samples that were cut because they were longer than the limit."""
        return sum(self.table["cut"][:])

    def select(self, indices: Sequence[int]) -> Prepared:
        """Return the samples with these indices."""
        return replace(self, table=self.table.select(indices))

    def images(self, number: int) -> list[Path | bytes]:
        """Return the files of a sample's images, or their bytes.

        Args:
            number: Index of the sample.

        Raises:
            InputError: An image has neither bytes nor a path.
        """
        row = self.table[number]
        if self.embedded is None or not row["images"]:
            return [Path(path) for path in row["paths"]]
        found = self.embedded[row["row"]][self.image_column]
        entries = found if isinstance(found, list) else [found]
        return [stored_image(entry, self.folder) for entry in entries]


def stored_image(entry: Any, folder: Path) -> Path | bytes:
    """Return the bytes or the file of an image that the library ``datasets`` has stored.

    Args:
        entry: The bytes, a path, or a mapping with ``bytes`` or a ``path``.
        folder: Folder that the path is relative to.

    Raises:
        InputError: There are neither bytes nor a path.
    """
    if isinstance(entry, bytes):
        return entry
    if isinstance(entry, Mapping) and entry.get("bytes") is not None:
        return entry["bytes"]
    path = entry.get("path") if isinstance(entry, Mapping) else entry
    return folder / image_paths(path if path is not None else "")[0]


def prepare(
    source: Source,
    split: str,
    columns: Columns,
    prompt: str,
    encode: DialogueEncoder,
    *,
    alternatives: bool = True,
    strict: bool = False,
) -> Prepared:
    """Read each row of a split once and store its texts, number of tokens and image paths.

    The table is kept below ``VISPROJ_CACHE_DIR`` and used again until the data, an argument or the
    tokenizer changes. Rows that cannot be used are left out and named in a warning.

    Args:
        source: The opened data set.
        split: Name of the split; a JSON file has only one.
        columns: Column names that the user chose.
        prompt: The question that captions answer.
        encode: Encoder of samples for the model that is trained.
        alternatives: Whether a sample may have several answers to its last question; otherwise it
            becomes one sample per answer.
        strict: Stop at the first row that cannot be used.

    Raises:
        InputError: There are no rows, a needed column is missing, a row cannot be used and
            ``strict`` is true, or more than 1 % of the rows cannot be used; the message lists the
            first ten of them.
    """
    rows: Any = None if source.file else undecoded(source.split(split))
    if rows is not None:
        columns = columns.found_in(rows.column_names, source.name)
    reader = _Reader(source, rows, columns, prompt, encode, alternatives, strict)
    decisive = [VERSION, source.name, str(source.images), split, asdict(columns)]
    decisive += [prompt, alternatives, encode.limit, encode.model.tokens_digest]
    decisive += [stamp(source.file) if source.file else rows._fingerprint]
    table = _table(reader, hashlib.sha256(json.dumps(decisive).encode()).hexdigest())
    faulty = [index for index, fault in enumerate(table["fault"][:]) if fault]
    shown = [_named(table[index]) for index in faulty[:FAULTS_SHOWN]]
    check_faults(shown, len(faulty), len(table), strict)
    if faulty:
        left = set(faulty)
        table = table.select([index for index in range(len(table)) if index not in left])
    if not len(table):
        raise InputError(f"{source.name} has no rows")
    column = columns.image if rows is not None and _holds_images(rows, columns.image) else None
    return Prepared(table, rows if column else None, column, source.images)


def check_faults(shown: Sequence[str], faulty: int, total: int, strict: bool) -> None:
    """Warn about samples that cannot be used, or raise if there are too many.

    Args:
        shown: Messages about the first of them.
        faulty: Number of samples that cannot be used.
        total: Number of all samples.
        strict: Whether a single one is too many.

    Raises:
        InputError: More than 1 % of all samples cannot be used, or any if ``strict``.
    """
    if not faulty:
        return
    listed = "; ".join(shown) + (f"; and {faulty - len(shown)} more" if faulty > len(shown) else "")
    if strict or faulty > FAULTS_ALLOWED * total:
        raise InputError(f"{faulty} of {total} samples cannot be used: {listed}")
    logger.warning("%d of %d samples cannot be used and are left out: %s", faulty, total, listed)


def _table(reader: _Reader, digest: str) -> Any:
    """Return the table of all samples from the cache, or make it; in memory without a cache."""
    import datasets

    def build(folder: Path, in_memory: bool) -> Any:
        return datasets.Dataset.from_generator(
            reader.__iter__,
            features=_schema(datasets),
            cache_dir=str(folder),
            keep_in_memory=in_memory,
            fingerprint=digest,
        )

    folder = cache_folder()
    try:
        if folder is None or not is_writable(folder):
            with tempfile.TemporaryDirectory() as scratch:
                return build(Path(scratch), True)
        table = build(folder / "data", False)
        if _has_images_now(table):
            shutil.rmtree(Path(table.cache_files[0]["filename"]).parent)
            table = build(folder / "data", False)
        return table
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _has_images_now(table: Any) -> bool:
    """Return whether an image is there that was missing when the table was made."""
    faulty = (index for index, fault in enumerate(table["fault"][:]) if fault)
    return any(Path(path).is_file() for index in faulty for path in table[index]["paths"])


class _MissingImageError(InputError):
    def __init__(self, file: Path) -> None:
        super().__init__(f"no such image: {file}")
        self.file = file


@dataclass(frozen=True)
class _Reader:
    source: Source
    embedded: Any
    columns: Columns
    prompt: str
    encode: DialogueEncoder
    alternatives: bool
    strict: bool

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number = -1
        for number, row in enumerate(self._rows()):
            yield from self._samples(row.where, number, row.values, row.fault)
        if number < 0:
            raise InputError(f"{self.source.name} has no rows")

    def _rows(self) -> Iterator[Row]:
        if self.embedded is None:
            yield from self.source.rows()
            return
        for number, values in enumerate(_without_images(self.embedded, self.columns)):
            yield Row(f"{self.source.name}, row {number}", values)

    def _samples(
        self, where: str, number: int, values: Mapping[str, Any] | None, fault: str | None
    ) -> Iterator[dict[str, Any]]:
        blank = {"where": where, "row": number, "images": 0, "paths": [], "questions": []}
        blank |= {"answers": [], "length": 0, "cut": False, "fault": fault}
        try:
            found = [] if values is None else list(self._read(values))
        except (InputError, OSError) as error:
            missing = [_storable(error.file)] if isinstance(error, _MissingImageError) else []
            found, blank["fault"], blank["paths"] = [], _storable(error), missing
        if blank["fault"] and self.strict:
            raise InputError(_named(blank))
        for changes in found or [{}]:
            yield {**blank, **changes}

    def _read(self, values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the sample, or one sample per alternative answer."""
        columns = self.columns
        if self.embedded is None:  # a row without images need not have their column
            columns = columns.found_in([*values, *filter(None, [columns.image])], "it")
        sample = read_sample(values, columns, self.prompt)
        if not sample.is_complete:
            sample = Sample(sample.questions[:-1], sample.answers)
        if not sample.questions:
            raise InputError(f"it has no answer, only {', '.join(values)}")
        image = values.get(columns.image) if columns.image else None
        counted = self.embedded is not None and _holds_images(self.embedded, columns.image)
        paths = [] if counted else [self._existing(path) for path in image_paths(image)]
        count = int(image or 0) if counted else len(paths)
        for one in [sample] if self.alternatives else _apart(sample):
            dialogue, cut = self.encode(one, count)
            yield {
                "images": count,
                "paths": paths,
                "questions": one.questions,
                "answers": one.answers,
                "length": self.encode.length(dialogue, count),
                "cut": cut,
            }

    def _existing(self, name: str) -> str:
        if self.source.bundled:
            return str(bundled_image(name))
        file = self.source.images / name
        if not file.is_file():
            raise _MissingImageError(file)
        return str(file)


def _storable(value: Any) -> str:
    """Return the text of a value, with unpaired surrogates escaped: Arrow stores UTF-8."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def _apart(sample: Sample) -> list[Sample]:
    *earlier, last = sample.answers
    return [Sample(sample.questions, [*earlier, [answer]]) for answer in last]


def _named(row: Mapping[str, Any]) -> str:
    return f"{row['where']}: {row['fault']}"


@cache
def _schema(datasets: Any) -> Any:
    value = datasets.Value
    return datasets.Features(
        {
            "where": value("string"),
            "row": value("int64"),
            "images": value("int32"),
            "paths": datasets.List(value("string")),
            "questions": datasets.List(value("string")),
            "answers": datasets.List(datasets.List(value("string"))),
            "length": value("int32"),
            "cut": value("bool"),
            "fault": value("string"),
        }
    )


def undecoded(rows: Any) -> Any:
    """Return the rows with images as bytes or paths, for loader workers to decode."""
    import datasets

    for name, feature in rows.features.items():
        changed = _as_stored(feature)
        if getattr(feature, "dtype", None) == "large_binary":  # datasets before 5 needs both casts
            rows = rows.cast_column(name, datasets.Value("binary"))
        if changed != feature:
            rows = rows.cast_column(name, changed)
    return rows


def _as_stored(feature: Any) -> Any:
    """Return the feature without decoding; bytes, with or without a path, count as an image."""
    import datasets

    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return datasets.List(_as_stored(feature.feature))
    is_struct = isinstance(feature, dict) and feature.keys() == {"bytes", "path"}
    is_binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
    if is_struct or is_binary or isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    return feature


def _holds_images(rows: Any, column: str | None) -> bool:
    """Return whether a column holds images rather than paths."""
    import datasets

    feature = rows.features[column] if column else None
    return isinstance(getattr(feature, "feature", feature), datasets.Image)


def _without_images(rows: Any, columns: Columns) -> Iterator[dict[str, Any]]:
    """Yield the texts of each row, with the number of its images in place of stored images."""
    import pyarrow.compute as compute

    image = columns.image
    wanted = {name for name in asdict(columns).values() if name is not None}
    if image is None or not _holds_images(rows, image):
        yield from rows.select_columns(sorted(wanted))
        return
    images = rows.data[image]
    is_list = hasattr(rows.features[image], "feature")
    counts = compute.list_value_length(images) if is_list else compute.is_valid(images)
    if rows._indices is not None:
        counts = counts.take(rows._indices.column(0))
    texts = rows.select_columns(sorted(wanted - {image}))
    for row, count in zip(texts, counts, strict=True):
        yield {**row, image: int(count.as_py() or 0)}
