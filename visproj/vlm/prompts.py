"""Prompts and answers as token ids, with the tokenizer's chat template if it has one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken

from visproj.errors import InputError
from visproj.vlm.compose import IGNORE_INDEX
from visproj.vlm.language import IMAGE_TOKEN, embedding_shape, one_line

SAMPLE = f"red {IMAGE_TOKEN} dog"


class Dialogue(NamedTuple):
    """Questions and answers as one sequence of ``T`` tokens, with ``T`` labels and branches.

    Attributes:
        ids: Token ids; every image is one ``<image>``.
        labels: Ids at the tokens of answers and at the end of text after each, -100 elsewhere.
        branches: Branch of each token: 1, except at several alternatives for the last answer. These
            have branches 2, 3, ..., follow one another and do not attend to each other.
    """

    ids: list[int]
    labels: list[int]
    branches: list[int]


class PromptTokenizer:
    """A tokenizer that has ``<image>`` as one token, with its chat template if it has one.

    The constructor tries it on a prompt and an answer. If the tokenizer adds a beginning of text to
    a prompt, this token stays. If it adds an end of text, this token is removed. An answer ends
    with exactly one end of text.

    Args:
        tokenizer: A language model's tokenizer. It gets ``<image>`` as a special token and the
            model's end-of-text token if it lacks them.
        language_model: The language model.

    Attributes:
        image_token_id: Id of ``<image>``; it may be the first id after the embedding table.

    Raises:
        InputError: The tokenizer or its template changes prompts or ``<image>``, there is no
            end-of-text token, or the tokenizer has tokens without an embedding.
    """

    def __init__(self, tokenizer: Any, language_model: Any) -> None:
        self.tokenizer = tokenizer
        self._check_vocabulary(embedding_shape(language_model)[0])
        if IMAGE_TOKEN not in tokenizer.get_added_vocab():
            tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False)], special_tokens=True)
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._set_end_of_text(language_model)
        self._has_template = getattr(tokenizer, "chat_template", None) is not None
        self._takes_parts = self._has_template and self._find_content()
        self._check_round_trip()

    @property
    def digest(self) -> str:
        """SHA-256 of the vocabulary, the chat template and the end of text."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        decisive = vocabulary, self.tokenizer.chat_template, self.tokenizer.eos_token
        return hashlib.sha256(repr(decisive).encode("utf-8", "replace")).hexdigest()

    def prompt_ids(self, prompt: str, images: int = 1) -> list[int]:
        """Return the token ids of a prompt, up to where the answer begins."""
        (ids,) = self.question_ids([prompt], [], images)
        return ids

    def question_ids(
        self, questions: Sequence[str], answers: Sequence[str], images: int = 1
    ) -> list[list[int]]:
        """Return the token ids before each answer: a question, and the template's text around it.

        Args:
            questions: ``Q`` questions.
            answers: Answers to at least the first ``Q - 1`` questions.
            images: Number of images; they come before the first question unless ``<image>`` in a
                question places them.

        Raises:
            InputError: The chat template changes earlier turns when further ones follow.
        """
        if not any(IMAGE_TOKEN in question for question in questions):
            questions = [f"{IMAGE_TOKEN}\n" * images + questions[0], *questions[1:]]
        if not self._has_template:
            rows = [self._ids(f"{question}\n") for question in questions]
            return [[*self._beginning(rows[0], f"{questions[0]}\n"), *rows[0]], *rows[1:]]
        texts = []
        before = ""
        for turn in range(len(questions)):
            rendered = self._render(questions[: turn + 1], answers[:turn], self._takes_parts)
            texts.append(self._after(rendered, before, answers[turn - 1]) if turn else rendered)
            before = rendered
        return [self._ids(text) for text in texts]

    def _after(self, rendered: str, before: str, answer: str) -> str:
        """Return the text between an answer's end of text and the beginning of the next answer."""
        rest = rendered.removeprefix(before)
        blank, found, after = rest.partition(answer)
        if rest == rendered or not found or blank.strip():
            raise InputError(
                "the tokenizer's chat template changes earlier turns when further ones follow: "
                "it cannot be used for several turns"
            )
        end = self.tokenizer.eos_token
        return after.lstrip().removeprefix(end) if after.lstrip().startswith(end) else after

    def dialogue(
        self, questions: Sequence[str], answers: Sequence[Sequence[str]], images: int = 1
    ) -> Dialogue:
        """Tokenize a whole dialogue.

        Args:
            questions: ``Q`` questions.
            answers: ``Q`` lists with one answer each; the last may have several alternatives.
            images: Number of images, as in :meth:`question_ids`.

        Raises:
            InputError: As in :meth:`question_ids` and :meth:`answer_ids`.
        """
        first = [alternatives[0] for alternatives in answers]
        ids: list[int] = []
        labels: list[int] = []
        branches: list[int] = []

        def append(row: list[int], row_labels: list[int], branch: int) -> None:
            ids.extend(row)
            labels.extend(row_labels)
            branches.extend([branch] * len(row))

        for turn, before in enumerate(self.question_ids(questions, first, images)):
            append(before, [IGNORE_INDEX] * len(before), 1)
            last = turn == len(questions) - 1
            for number, alternative in enumerate(answers[turn]):
                row = self.answer_ids(alternative)
                append(row, row, number + 2 if last and len(answers[turn]) > 1 else 1)
        return Dialogue(ids, labels, branches)

    def _beginning(self, ids: list[int], text: str) -> list[int]:
        """Return the ids that the tokenizer adds before a text whose own ids are ``ids``."""
        whole = list(self.tokenizer(text).input_ids)
        starts = range(len(whole) - len(ids) + 1)
        return next((whole[:n] for n in starts if whole[n : n + len(ids)] == ids), [])

    def answer_ids(self, answer: str) -> list[int]:
        """Return the token ids of an answer, followed by the end of text.

        Raises:
            InputError: The answer contains ``<image>``, which the language model cannot write.
        """
        if IMAGE_TOKEN in answer:
            raise InputError(f"the answer {answer!r} has {IMAGE_TOKEN} in it")
        end = self.tokenizer.eos_token_id
        ids = self._ids(answer)
        while ids and ids[-1] == end:
            ids.pop()
        return [*ids, end]

    def _ids(self, text: str) -> list[int]:
        """Return the ids of a text, without a beginning or end of text that the tokenizer adds."""
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        begin, end = self.tokenizer.bos_token, self.tokenizer.eos_token
        if begin and ids[:1] == [self.tokenizer.bos_token_id] and not text.startswith(begin):
            ids = ids[1:]
        if ids[-1:] == [self.tokenizer.eos_token_id] and not text.rstrip().endswith(end):
            ids = ids[:-1]
        return ids

    def _render(self, questions: Sequence[str], answers: Sequence[str], in_parts: bool) -> str:
        """Render questions and answers with the template, up to where the next answer begins."""
        messages: list[dict[str, Any]] = []
        for turn, question in enumerate(questions):
            messages.append({"role": "user", "content": question})
            if turn < len(answers):
                messages.append({"role": "assistant", "content": answers[turn]})
        if in_parts:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                for message in messages
            ]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    def _find_content(self) -> bool:
        """Return whether the template takes a message's content as a list of parts, not as text."""
        reasons = []
        for in_parts in (False, True):
            try:
                text = self._render([SAMPLE], [], in_parts)
            except Exception as error:  # a template can raise anything
                reasons.append(one_line(error))
                continue
            if SAMPLE in text and text.count(IMAGE_TOKEN) == 1:
                return in_parts
            reasons.append(f"it renders {SAMPLE!r} as {text!r:.80}")
        raise InputError(f"the tokenizer's chat template cannot be used: {reasons[0]}")

    def _check_vocabulary(self, rows: int) -> None:
        unused = (IMAGE_TOKEN, getattr(self.tokenizer, "pad_token", None))
        beyond = [
            (index, token)
            for token, index in self.tokenizer.get_vocab().items()
            if index >= rows and token not in unused
        ]
        if beyond:
            index, token = min(beyond)
            raise InputError(
                f"the tokenizer is not the language model's: its token {token!r} has the id "
                f"{index}, but the model has {rows} embeddings"
            )

    def _set_end_of_text(self, language_model: Any) -> None:
        if self.tokenizer.eos_token_id is not None:
            return
        ids = end_of_text_ids(language_model)
        if not ids:
            raise InputError("neither the language model nor its tokenizer has an end of text")
        self.tokenizer.eos_token = self.tokenizer.convert_ids_to_tokens(ids[0])

    def _check_round_trip(self) -> None:
        image, end = self.image_token_id, self.tokenizer.eos_token_id
        prompt, answer = self.prompt_ids(SAMPLE), self.answer_ids("red dog")
        other = self.prompt_ids(f"dog {IMAGE_TOKEN} red")
        fault = None
        if self.tokenizer.convert_ids_to_tokens(image) != IMAGE_TOKEN:
            fault = f"{IMAGE_TOKEN} cannot be added to it"
        elif prompt.count(image) != 1 or image in self.prompt_ids("red dog", 0):
            fault = f"it encodes {SAMPLE!r} with {prompt.count(image)} {IMAGE_TOKEN} tokens, not 1"
        elif prompt == other or len(answer) < 2:
            fault = "it cannot encode the words of a prompt"
        elif end in answer[:-1]:
            fault = "it puts the end-of-text token inside an answer"
        if fault:
            raise InputError(f"the language model's tokenizer cannot be used: {fault}")


def end_of_text_ids(language_model: Any) -> list[int]:
    """Return the ids of the end-of-text tokens in the model's configuration, which may be none."""
    for config in (getattr(language_model, "generation_config", None), language_model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def check_texts(texts: Sequence[str], what: str) -> None:
    """Raise ``InputError`` unless ``texts`` is a sequence of strings, and not a string itself."""
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{what} must be a list of texts, got {texts!r:.60}")
