"""``visproj answer``: a file of questions about images, answered in batches."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from visproj.errors import InputError
from visproj.progress import SILENT, Progress
from visproj.vlm.decoding import check_context
from visproj.vlm.model import VisualLanguageModel, check_backend
from visproj.vlm.photographs import read_rgb
from visproj.vlm.preparing import stored_image, undecoded
from visproj.vlm.pretrained import find_projector, load_pretrained
from visproj.vlm.run_folder import check_writable
from visproj.vlm.samples import Columns, Sample, read_sample
from visproj.vlm.sources import FAULT, Row, Source, open_source
from visproj.vlm.trained import encoder_of, model_of

FIELDS = ("index", "id", "question", "answer", "reference", "error")


@dataclass(frozen=True)
class AnswerOptions:
    """Options of ``visproj answer``.

    Attributes:
        projector: Directory of a trained projector, or the ``--out`` of its ``visproj train``.
        data: Data set in a format that ``visproj train`` reads; its answers become references.
        out: Output file, ``.jsonl`` or ``.csv``; rows that are already in it are skipped.
        images: Folder that image paths are relative to; ``None`` takes that of the data.
        columns: Names of columns that differ from the usual ones.
        split: Split whose questions are answered.
        prompt: Question for images that come without one; ``None`` takes that of the training.
        encoder: Directory or hub name of the encoder; ``None`` takes that of the training.
        language_model: Directory, hub name or GGUF file; ``None`` takes that of the training.
        batch: Questions per call of ``generate``.
        max_new_tokens: Maximum length of an answer in tokens.
    """

    projector: Path
    data: str
    out: Path
    images: Path | None = None
    columns: Columns = field(default_factory=Columns)
    split: str = "train"
    prompt: str | None = None
    encoder: str | None = None
    language_model: str | None = None
    batch: int = 8
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if self.out.suffix not in (".jsonl", ".csv"):
            raise InputError(f"out must be a .jsonl or .csv file, got {self.out.name}")
        for name in ("batch", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")


class AnswerReport(NamedTuple):
    """Numbers of rows after :func:`run_answer`.

    Attributes:
        total: Rows in the file.
        written: Rows that this call added.
        faults: Added rows that have an error instead of an answer.
    """

    total: int
    written: int
    faults: int


class _Question(NamedTuple):
    """The last question of a row.

    Attributes:
        record: Row of the output file, by the names of :data:`FIELDS`.
        ids: Token ids up to where the answer begins; empty if the row has an error.
        images: Images in the order of their placeholders.
    """

    record: dict[str, Any]
    ids: list[int]
    images: list[Image.Image]


def run_answer(options: AnswerOptions, *, progress: Progress = SILENT) -> AnswerReport:
    """Answer the last question of every row by greedy decoding, in batches padded on the left.

    Earlier turns of a conversation keep the answers that the data has. A row that cannot be used
    gets an ``error`` instead of an answer. The file has one row per row of the data, in the same
    order. A run that was stopped continues after the last complete row.

    Args:
        options: Projector, data and output file.
        progress: Receives each stage and every question.

    Returns:
        The numbers of rows in the file, of new rows, and of new rows with an error.

    Raises:
        InputError: The data, a model or the file cannot be used, or the file answers other data.
        FileNotFoundError: A file is missing.
        ConnectionError, ModuleNotFoundError: A model or package is missing.
        OSError: The file cannot be written.
    """
    check_backend()
    check_writable(options.out.parent)
    done = _read_done(options.out)
    source = open_source(options.data, options.images)
    projector = load_pretrained(find_projector(options.projector))
    progress.stage("loading the models")
    encoder = encoder_of(projector, options.encoder)
    model = model_of(projector, encoder, options.language_model)
    if options.prompt is None:
        options = replace(options, prompt=projector.prompt)
    rows = enumerate(_rows(source, options.split))
    _skip(rows, done, options)
    progress.stage("answering")
    written = faults = 0
    with _Writer(options.out, resumes=bool(done)) as writer:
        while batch := list(islice(rows, options.batch)):
            questions = [_read(index, row, model, source.images, options) for index, row in batch]
            for record in _answered(model, questions, options.max_new_tokens):
                writer.write(record)
                written += 1
                faults += record["error"] is not None
                progress.advance(f"{len(done) + written} answers")
            writer.flush()
    if not done and not written:
        raise InputError(f"{source.name} has no rows")
    return AnswerReport(len(done) + written, written, faults)


def _rows(source: Source, split: str) -> Iterator[Row]:
    """Yield the rows as they are stored, with images as bytes or paths."""
    if source.file is not None:
        yield from source.rows()
        return
    rows = source.split(split)
    for number, values in enumerate(undecoded(rows) if rows.features else rows):
        where = values.get("__key__", f"{source.name}, row {number}")
        yield Row(where, values, values.get(FAULT))


def _read(
    index: int, row: Row, model: VisualLanguageModel, images: Path, options: AnswerOptions
) -> _Question:
    """Turn a row into token ids and decoded images, or into a record that holds its error."""
    values = row.values or {}
    record = dict.fromkeys(FIELDS)
    record |= {"index": index, "id": values.get("id", values.get("question_id"))}
    try:
        sample, columns = _sample(row, options)
        *earlier, question = sample.questions
        record["question"] = question
        record["reference"] = sample.answers[-1] if sample.is_complete else None
        pictures = [read_rgb(found) for found in _images(values, columns, images)]
        answers = [alternatives[0] for alternatives in sample.answers[: len(earlier)]]
        ids = model.history_ids(sample.questions, answers, len(pictures))
        before = len(ids) + len(pictures) * (model.tokens_per_image - 1)
        check_context(model.context_limit, before, options.max_new_tokens)
        return _Question(record, ids, pictures)
    except (InputError, OSError) as error:
        record["error"] = str(error)
        return _Question(record, [], [])


def _sample(row: Row, options: AnswerOptions) -> tuple[Sample, Columns]:
    """Return the questions and answers of a row, and its columns.

    Images without any text get the prompt as their question.

    Raises:
        InputError: The row cannot be used; the message says why.
    """
    if row.fault or row.values is None:
        raise InputError(row.fault or "the row is empty")
    columns = options.columns.found_in(list(row.values), "the row", needs_text=False)
    prompt = options.prompt or ""
    if not columns.has_text:
        return Sample([prompt], []), columns
    return read_sample(row.values, columns, prompt), columns


def _images(values: Mapping[str, Any], columns: Columns, folder: Path) -> list[Path | bytes]:
    found = values.get(columns.image) if columns.image else None
    entries = [] if found is None else found if isinstance(found, list) else [found]
    return [stored_image(entry, folder) for entry in entries]


def _answered(
    model: VisualLanguageModel, questions: Sequence[_Question], longest: int
) -> Iterator[dict[str, Any]]:
    """Answer the questions of a batch and yield the output row of each."""
    asked = [question for question in questions if question.ids]
    answers = iter(
        model.generate_after(
            model.features(image for question in asked for image in question.images),
            [question.ids for question in asked],
            [len(question.images) for question in asked],
            max_new_tokens=longest,
            do_sample=False,
            num_beams=1,
        )
    )
    for question in questions:
        yield (
            {**question.record, "answer": next(answers).strip()}
            if question.ids
            else question.record
        )


def _read_done(out: Path) -> list[dict[str, Any]]:
    """Return the rows that are in the file, and cut off a last row that is incomplete.

    Raises:
        InputError: The file does not hold answers.
    """
    if not out.exists():
        return []
    content = out.read_bytes()
    end = len(content)
    while True:  # a quoted field of a CSV file may contain line breaks
        end = content.rfind(b"\n", 0, end) + 1
        try:
            done = _parsed(content[:end].decode(), out.suffix)
            break
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            if out.suffix != ".csv" or not isinstance(error, csv.Error) or not end:
                raise InputError(
                    f"{out} does not hold answers ({error}): choose another --out"
                ) from error
            end -= 1
    if end < len(content):
        with out.open("r+b") as file:
            file.truncate(end)
    return done


def _parsed(text: str, suffix: str) -> list[dict[str, Any]]:
    """Parse rows of answers.

    Raises:
        csv.Error: A quoted field of a CSV file is not closed.
        ValueError, KeyError, TypeError: The text does not hold answers.
    """
    if suffix == ".csv":
        done = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    else:
        done = [json.loads(line) for line in text.splitlines()]
    numbers = [int(row["index"]) for row in done]
    if numbers != list(range(len(numbers))) or any(set(row) != set(FIELDS) for row in done):
        raise ValueError("its rows are not answers numbered from 0")
    return done


def _skip(
    rows: Iterator[tuple[int, Row]], done: Sequence[Mapping[str, Any]], options: AnswerOptions
) -> None:
    """Skip the rows of the data that the file already answers.

    Raises:
        InputError: The file answers other data: it has more rows than the data, or its last row
            has another question.
    """
    skipped = list(islice(rows, len(done)))
    if len(skipped) < len(done):
        raise InputError(
            f"{options.out} has more answers than {options.data} has rows: choose another --out"
        )
    if not done:
        return
    try:
        question = _sample(skipped[-1][1], options)[0].questions[-1]
    except InputError:
        question = None
    if (done[-1]["question"] or None) != question:
        raise InputError(
            f"{options.out} answers other questions than {options.data} asks: choose another --out"
        )


class _Writer:
    """Writer that appends rows to a JSONL or CSV file."""

    def __init__(self, out: Path, *, resumes: bool) -> None:
        self._file = out.open("a", encoding="utf-8", newline="")
        self._table = csv.DictWriter(self._file, FIELDS, lineterminator="\n")
        self._is_csv = out.suffix == ".csv"
        if self._is_csv and not resumes and not out.stat().st_size:
            self._table.writeheader()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a row; a CSV file holds its references as a JSON list."""
        if not self._is_csv:
            self._file.write(f"{json.dumps(record, ensure_ascii=False)}\n")
            return
        reference = record["reference"]
        text = None if reference is None else json.dumps(reference, ensure_ascii=False)
        self._table.writerow({**record, "reference": text})

    def flush(self) -> None:
        """Write all rows so far to the file."""
        self._file.flush()
