"""A conversation of several turns, whose history stays in the language model's cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation.streamers import BaseStreamer

from visproj.errors import InputError
from visproj.vlm.decoding import check_context
from visproj.vlm.language import IMAGE_TOKEN
from visproj.vlm.model import VisualLanguageModel
from visproj.vlm.prompts import end_of_text_ids

# The chat template needs an answer between two questions. What it writes after the answer does not
# depend on the answer, and the answer's own tokens are those that were generated.
STAND_IN = "answer"


class ConversationFullError(InputError):
    """A further question does not fit after the history; :meth:`Conversation.clear` makes room."""


class Answer(BaseStreamer):
    """What ``generate`` writes, handed on token by token, characters whole.

    Args:
        tokenizer: Turns ids into text.
        write: Called with each new piece of text.

    Attributes:
        ids: The tokens so far.
        pieces: What each of them added to the text; empty for a special token and for a part of a
            character.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None] = lambda piece: None) -> None:
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self._tokenizer = tokenizer
        self._write = write

    @property
    def text(self) -> str:
        """All pieces together."""
        return "".join(self.pieces)

    def put(self, value: Tensor) -> None:
        """Take new tokens; the first call's are the prompt's, none where embeddings came in."""
        for token in value.flatten().tolist():
            self.ids.append(token)
            # Bytes of an unfinished character decode to U+FFFD, until the rest of them is in.
            self.pieces.append(self._new().rstrip("\ufffd"))
            self._write(self.pieces[-1])

    def end(self) -> None:
        """Hand on what is left of a character that was never finished."""
        if self.ids:
            rest = self._new()
            self.pieces[-1] += rest
            self._write(rest)

    def _new(self) -> str:
        """What the tokens so far add to the text so far."""
        text = self._tokenizer.decode(
            self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text[len(self.text) :]


class _History(NamedTuple):
    """The finished turns.

    Attributes:
        questions: With ``<image>`` wherever an image is.
        embeds: ``[1, T, D]``, the embeddings of everything, each answer with its end of text.
        cache: Keys and values of the first of these ``T`` tokens; the last tokens of an answer may
            be missing. ``None`` where the language model's cache cannot be continued.
    """

    questions: tuple[str, ...]
    embeds: Tensor | None
    cache: Any


class Conversation:
    """Questions about images and greedy answers, each of which sees the turns before it.

    The language model's key-value cache holds the history: a further turn runs only the new images
    and the new question through the model. Models whose cache cannot be continued (Mamba, RWKV)
    read the whole conversation again in every turn. The tokens are those of
    :meth:`PromptTokenizer.question_ids`, as in training, and the answers as they were generated.

    A turn that an error or Ctrl-C ends leaves the conversation as it was before the question.

    Args:
        model: In eval mode; is not changed.
    """

    def __init__(self, model: VisualLanguageModel) -> None:
        self.model = model
        self.clear()

    @property
    def tokens(self) -> int:
        """Visual tokens and tokens of text in the history."""
        return 0 if self._history.embeds is None else self._history.embeds.shape[1]

    def clear(self) -> None:
        """Forget all turns."""
        cache = None
        if self.model._shares_cache:
            cache = DynamicCache(config=self.model.language_model.config.get_text_config())
        self._history = _History((), None, cache)

    @torch.inference_mode()
    def ask(
        self,
        question: str,
        images: Sequence[Image.Image] = (),
        *,
        max_new_tokens: int = 64,
        write: Callable[[str], None] = lambda piece: None,
    ) -> str:
        """Answer the next question.

        Args:
            question: ``<image>`` in it places an image; without any, the images come first.
            images: RGB images for this question; those of earlier turns are still seen.
            max_new_tokens: The longest answer.
            write: Called with every piece of the answer as it is generated.

        Returns:
            The answer.

        Raises:
            ConversationFullError: Question and longest answer do not fit after the history.
            InputError: They do not even fit without a history, ``<image>`` is in the question
                another number of times than there are images, or the chat template cannot be used
                for several turns.
        """
        if isinstance(images, Image.Image):
            raise InputError("images must be a list of images, got one image")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        check_prompt(question, len(images))
        if IMAGE_TOKEN not in question:
            question = f"{IMAGE_TOKEN}\n" * len(images) + question
        questions = (*self._history.questions, question)
        ids = self._new_ids(questions)
        self._check_room(len(ids), len(images), max_new_tokens)
        embeds = self._embed(ids, images)
        cache = _copied(self._history.cache)
        answer = Answer(self.model.tokenizer, write)
        self._generate(embeds, cache, answer, max_new_tokens)
        written = torch.tensor([self._finished(answer.ids)], device=embeds.device)
        embeds = torch.cat([embeds, self._table(written).to(embeds.dtype)], 1)
        self._history = _History(questions, embeds, cache)
        return answer.text

    def _new_ids(self, questions: Sequence[str]) -> list[int]:
        """Token ids from the end of the last answer to where the next one begins."""
        answers = [STAND_IN] * (len(questions) - 1)
        ids = self.model._prompts.question_ids(questions, answers, 0)[-1]
        if not ids:
            raise InputError(f"the question {questions[-1]!r} has no tokens and no images")
        return ids

    def _check_room(self, ids: int, images: int, answer: int) -> None:
        new = ids + images * (self.model.tokens_per_image - 1)
        try:
            check_context(self.model.context_limit, self.tokens + new, answer)
        except InputError as error:
            if not self.tokens:
                raise
            raise ConversationFullError(f"the conversation is full: {error}") from error

    def _embed(self, ids: list[int], images: Sequence[Image.Image]) -> Tensor:
        """Embeddings ``[1, T, D]`` of the history and of a question with its images."""
        row = torch.tensor([ids])
        features = self.model.features(images)
        sequence = self.model.place(features, row, torch.ones_like(row), [len(images)])
        if self._history.embeds is None:
            return sequence.inputs_embeds
        return torch.cat([self._history.embeds, sequence.inputs_embeds], 1)

    def _generate(self, embeds: Tensor, cache: Any, answer: Answer, longest: int) -> None:
        """Write the answer to ``embeds``, of which the model reads what ``cache`` lacks."""
        language_model, end = self.model.language_model, self.model.tokenizer.eos_token_id
        cached = {} if cache is None else {"past_key_values": cache, "cache_implementation": None}
        language_model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
            streamer=answer,
            max_new_tokens=longest,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=end,
            eos_token_id=sorted(self._ends()),
            **cached,
        )

    def _ends(self) -> set[int]:
        return {self.model.tokenizer.eos_token_id, *end_of_text_ids(self.model.language_model)}

    def _finished(self, ids: list[int]) -> list[int]:
        """The tokens of an answer and the one end of text that answers have in training."""
        cut = ids[:-1] if ids and ids[-1] in self._ends() else ids
        return [*cut, self.model.tokenizer.eos_token_id]

    def _table(self, ids: Tensor) -> Tensor:
        return self.model.language_model.get_input_embeddings()(ids)


def check_prompt(prompt: str, images: int) -> None:
    """Raise ``InputError`` unless a prompt places all of its images or none."""
    found = prompt.count(IMAGE_TOKEN)
    if found not in (0, images):
        raise InputError(
            f"{IMAGE_TOKEN} is in the prompt {found} times, the number of images is {images}"
        )


def _copied(cache: Any) -> Any:
    """Return a cache to add to; both share their tensors, which an addition replaces."""
    if cache is None:
        return None
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied
