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
    """What ``visproj answer`` is asked for; the command line says the same of each.

    Attributes:
        projector: The checkpoint's directory, or the ``--out`` of ``visproj train`` around it.
        data: A data set, as ``visproj train`` takes it; answers in it are references.
        out: A ``.jsonl`` or ``.csv`` file; answers that are in it are not made again.
        images: Folder that image paths are relative to; ``None`` is that of the data.
        columns: Names of columns that are not the usual ones.
        split: Split to answer.
        prompt: What is asked about images that come with captions; ``None`` is the projector's.
        encoder: Where the encoder is; ``None`` is where it was in training.
        language_model: Where the language model is; ``None`` as for ``encoder``.
        batch: Questions per call of ``generate``.
        max_new_tokens: The longest answer.
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
            raise InputError(f"answers are written as .jsonl or .csv, not as {self.out.name}")
        for name in ("batch", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")


class AnswerReport(NamedTuple):
    """What came of it: answers that are in the file, those of this call, questions without one."""

    total: int
    written: int
    faults: int


class _Question(NamedTuple):
    """The last question of a row.

    Attributes:
        record: What is written of it, by the names of :data:`FIELDS`.
        ids: Tokens up to where the answer begins; empty if there is a fault.
        images: In their order.
    """

    record: dict[str, Any]
    ids: list[int]
    images: list[Image.Image]


def run_answer(options: AnswerOptions, *, progress: Progress = SILENT) -> AnswerReport:
    """Answer the last question of every row, greedily, in batches with padding on the left.

    Earlier turns are read with the answers that the data has. A row that cannot be used gets an
    ``error`` in the place of an answer. The file has as many rows as the data, in its order; a run
    that was stopped goes on after the last whole row.

    Args:
        options: Checkpoint, data and file.
        progress: Receives each stage and every question.

    Raises:
        InputError: The data, a model or the file cannot be used; the file may be of other data.
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
    """Rows as they are stored, with images as bytes or paths."""
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
    """Turn a row into tokens and decoded images, or into a record with what is wrong with it."""
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
    """Questions and answers of a row; images alone are asked the prompt.

    Raises:
        InputError: What is wrong with it.
    """
    if row.fault or row.values is None:
        raise InputError(row.fault or "it is empty")
    columns = options.columns.found_in(list(row.values), "it", needs_text=False)
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
    """What is written of each question, with its answer."""
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
    """Rows that are in the file; a last one that was not written to its end is cut off.

    Raises:
        InputError: The file holds something else.
    """
    if not out.exists():
        return []
    content = out.read_bytes()
    end = len(content)
    while True:  # a text in a CSV file may have line ends of its own
        end = content.rfind(b"\n", 0, end) + 1
        try:
            done = _parsed(content[:end].decode(), out.suffix)
            break
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            if out.suffix != ".csv" or not isinstance(error, csv.Error) or not end:
                raise InputError(f"{out} holds something else than answers: {error}") from error
            end -= 1
    if end < len(content):
        with out.open("r+b") as file:
            file.truncate(end)
    return done


def _parsed(text: str, suffix: str) -> list[dict[str, Any]]:
    """Rows of answers.

    Raises:
        csv.Error: A text is not ended.
        ValueError, KeyError, TypeError: They are something else.
    """
    if suffix == ".csv":
        done = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    else:
        done = [json.loads(line) for line in text.splitlines()]
    numbers = [int(row["index"]) for row in done]
    if numbers != list(range(len(numbers))) or any(set(row) != set(FIELDS) for row in done):
        raise ValueError("its rows are not answers in their order")
    return done


def _skip(
    rows: Iterator[tuple[int, Row]], done: Sequence[Mapping[str, Any]], options: AnswerOptions
) -> None:
    """Pass over rows that are answered.

    Raises:
        InputError: The answers are of other data: there are more of them, or the last one's
            question is another.
    """
    skipped = list(islice(rows, len(done)))
    if len(skipped) < len(done):
        raise InputError(f"{options.out} has more answers than {options.data} has rows")
    if not done:
        return
    try:
        question = _sample(skipped[-1][1], options)[0].questions[-1]
    except InputError:
        question = None
    if (done[-1]["question"] or None) != question:
        raise InputError(
            f"{options.out} has answers to other questions than those of {options.data}: choose "
            "another --out"
        )


class _Writer:
    """Appends rows to a JSONL or CSV file."""

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
        """Append a row; in a CSV file references are a JSON list."""
        if not self._is_csv:
            self._file.write(f"{json.dumps(record, ensure_ascii=False)}\n")
            return
        reference = record["reference"]
        text = None if reference is None else json.dumps(reference, ensure_ascii=False)
        self._table.writerow({**record, "reference": text})

    def flush(self) -> None:
        """Have what was written so far on disk."""
        self._file.flush()
