"""Samples of a data set in one form: questions, answers and images, read from any kind of row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from visproj.errors import InputError
from visproj.vlm.language import IMAGE_TOKEN

USERS = ("human", "user")
ASSISTANTS = ("gpt", "assistant")
SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Columns:
    """Names of a data set's columns; ``None`` takes the first usual name that it has.

    Attributes:
        image: Column with a path, an image, or a list of them.
        caption: Column with a description of the image, or a list of them.
        question: Column with a question.
        answer: Column with the answer to the question, or a list of alternatives.
        conversation: Column with turns that have ``from`` and ``value``, as LLaVA writes them, or
            ``role`` and ``content``.
    """

    image: str | None = None
    caption: str | None = None
    question: str | None = None
    answer: str | None = None
    conversation: str | None = None

    def found_in(self, names: Sequence[str], where: str, *, needs_text: bool = True) -> Columns:
        """Find these columns among those of a data set.

        Args:
            names: Names of the data set's columns.
            where: Name of the data set for messages.
            needs_text: Whether a column with texts is required; otherwise one with images is
                enough.

        Raises:
            InputError: A chosen column or a required one is missing; the message lists the columns
                of the data set.
        """
        spelled = {name.lower(): name for name in reversed(names)}
        found = {}
        for entry in fields(self):
            chosen = getattr(self, entry.name)
            if chosen is not None and chosen not in names:
                raise InputError(f"{where} has no column {chosen}: it has {_listed(names)}")
            usual = USUAL[entry.name] if self._is_free(entry.name) else ()
            first = next((spelled[name] for name in usual if name in spelled), None)
            found[entry.name] = chosen or first
        columns = Columns(**found)
        if not columns.has_text and (needs_text or columns.image is None):
            raise InputError(
                f"{where} has no column with texts: it has {_listed(names)}. Name yours with "
                "--conversation-column, --caption-column, or --question-column and --answer-column"
            )
        return columns

    @property
    def has_text(self) -> bool:
        """True if there is a column with questions, captions or conversations."""
        return any((self.conversation, self.caption, self.question))

    def _is_free(self, name: str) -> bool:
        """Return whether a column's usual names may be tried: not if another kind is chosen."""
        kinds = (("caption",), ("question", "answer"), ("conversation",))
        chosen = [kind for kind in kinds if any(getattr(self, part) for part in kind)]
        return name == "image" or not chosen or any(name in kind for kind in chosen)


USUAL = {
    "image": ("image", "images", "jpg", "jpeg", "png", "webp", "file_name"),
    "caption": ("captions", "caption", "text", "txt"),
    "question": ("question",),
    "answer": ("answer", "answers"),
    "conversation": ("conversations", "messages"),
}


class Sample(NamedTuple):
    """Questions and answers about images.

    Attributes:
        questions: ``Q`` questions.
        answers: List with one answer per question. The last question may have several alternatives,
            or no list.
    """

    questions: list[str]
    answers: list[list[str]]

    @property
    def is_complete(self) -> bool:
        """True if the last question has an answer."""
        return len(self.answers) == len(self.questions)


def read_sample(row: Mapping[str, Any], columns: Columns, prompt: str) -> Sample:
    """Read questions and answers from a row.

    Args:
        row: Row of the data set.
        columns: Columns from :meth:`Columns.found_in`.
        prompt: The question that captions answer.

    Raises:
        InputError: The row cannot be used; the message says why.
    """
    turns = row.get(columns.conversation) if columns.conversation else None
    caption = row.get(columns.caption) if columns.caption else None
    question = row.get(columns.question) if columns.question else None
    if turns is not None:
        return _read_turns(_as_list(turns))
    if question is not None:
        answer = row.get(columns.answer) if columns.answer else None
        texts = [] if answer is None else [_texts(answer, "answer")]
        return Sample([_text(question, "question")], texts)
    if caption is None:
        raise InputError(f"it has no {columns.conversation or columns.question or columns.caption}")
    if columns.image is None or not row.get(columns.image):
        raise InputError("it has a caption and no image")
    return Sample([prompt], [_texts(caption, "caption")])


def _read_turns(turns: Sequence[Any]) -> Sample:
    questions: list[str] = []
    answers: list[list[str]] = []
    system = ""
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise InputError(f"turn {number} of the conversation is {turn!r:.40}, not an object")
        role = turn.get("from") or turn.get("role")
        text = _content(turn.get("value") or turn.get("content"), number)
        if role == "system" and number == 1:
            system = f"{text}\n"
        elif role in USERS and len(questions) == len(answers):
            questions.append(system + _text(text, f"turn {number}"))
            system = ""
        elif role in ASSISTANTS and len(questions) == len(answers) + 1:
            answers.append([_answer(text, f"turn {number}")])
        else:
            expected = " or ".join(USERS if len(questions) == len(answers) else ASSISTANTS)
            raise InputError(
                f"turn {number} of the conversation is from {role!r}, expected {expected}"
            )
    if not questions:
        raise InputError("the conversation has no questions")
    return Sample(questions, answers)


def _content(content: Any, number: int) -> str:
    """Return the text of a turn; images among its parts become ``<image>``."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"turn {number} of the conversation has no text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image"):
            raise InputError(f"turn {number} of the conversation has a part of type {kind!r}")
        texts.append(str(part.get("text")) if kind == "text" else IMAGE_TOKEN)
    return "\n".join(texts)


def _texts(value: Any, what: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise InputError(f"its list of {what}s is empty")
    return list(dict.fromkeys(_answer(text, what) for text in values))


def _answer(value: Any, what: str) -> str:
    text = _text(value, what)
    if IMAGE_TOKEN in text:
        raise InputError(f"its {what} {text!r:.60} has {IMAGE_TOKEN} in it")
    return text


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"its {what} is {value!r:.60}, expected a text that is not blank")
    if SURROGATES.search(value):
        raise InputError(f"its {what} {value!r:.60} has an unpaired surrogate in it")
    return value.strip()


def image_paths(value: Any) -> list[str]:
    """Return the paths in an image column, which holds a path, a list of them, or nothing.

    Raises:
        InputError: The column holds something else.
    """
    values = [] if value is None else value if isinstance(value, list) else [value]
    for path in values:
        if not isinstance(path, str) or not path.strip():
            raise InputError(f"its image is {path!r:.60}, not a path")
    return values


def _as_list(turns: Any) -> list[Any]:
    """Return turns as a list, even if ``datasets`` has stored them as a dictionary of columns."""
    if isinstance(turns, Mapping):
        return [
            dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)
        ]
    if not isinstance(turns, list):
        raise InputError(f"its conversation is {turns!r:.60}, not a list of turns")
    return turns


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"
