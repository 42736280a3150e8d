"""Conversation of several turns, whose history stays in the language model's key-value cache."""

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

# Text of earlier answers when the chat template is rendered. What the template writes after an
# answer does not depend on its text, and the history keeps the token ids that were generated.
STAND_IN = "answer"


class ConversationFullError(InputError):
    """Error for a question that does not fit after the history; ``clear()`` makes room."""


class Answer(BaseStreamer):
    """Streamer for ``generate`` that passes text on token by token, and never half a character.

    Args:
        tokenizer: Tokenizer that decodes the ids.
        write: Called with each new piece of text.

    Attributes:
        ids: Token ids so far.
        pieces: Text that each token added; empty for a special token and for part of a character.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None] = lambda piece: None) -> None:
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self._tokenizer = tokenizer
        self._write = write

    @property
    def text(self) -> str:
        """Text so far: all pieces joined."""
        return "".join(self.pieces)

    def put(self, value: Tensor) -> None:
        """Receive new token ids; the first are the prompt's, or none if it came as embeddings."""
        for token in value.flatten().tolist():
            self.ids.append(token)
            # Bytes of an unfinished character decode to U+FFFD, until the rest of them arrive.
            self.pieces.append(self._new().rstrip("\ufffd"))
            self._write(self.pieces[-1])

    def end(self) -> None:
        """Pass on the rest of a character that was never completed."""
        if self.ids:
            rest = self._new()
            self.pieces[-1] += rest
            self._write(rest)

    def _new(self) -> str:
        """Return the text that the ids add to the pieces so far."""
        text = self._tokenizer.decode(
            self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text[len(self.text) :]


class _History(NamedTuple):
    """Completed turns of a conversation.

    Attributes:
        questions: Questions, with ``<image>`` at the place of each image.
        embeds: Embeddings of all turns, ``[1, T, D]``; each answer includes its end of text.
        cache: Key-value cache of these ``T`` tokens, which may lack the last tokens of the last
            answer. ``None`` if the language model's cache cannot be continued.
    """

    questions: tuple[str, ...]
    embeds: Tensor | None
    cache: Any


class Conversation:
    """Conversation about images with greedy answers, in which each turn sees the turns before it.

    The language model's key-value cache holds the history: a further turn runs only the new images
    and the new question through the model. Models whose cache cannot be continued (Mamba, RWKV)
    read the whole conversation again in every turn. :meth:`PromptTokenizer.question_ids` turns
    questions into token ids, as in training. Answers keep the token ids that were generated.

    If an error or Ctrl-C ends a turn, the conversation stays as it was before the question.

    Args:
        model: Model in eval mode; it is not changed.
    """

    def __init__(self, model: VisualLanguageModel) -> None:
        self.model = model
        self.clear()

    @property
    def tokens(self) -> int:
        """Number of tokens in the history, visual tokens included."""
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
            question: Question, in which ``<image>`` marks the place of an image; without any, the
                images come first.
            images: RGB images of this question; the model still sees those of earlier turns.
            max_new_tokens: Maximum length of the answer in tokens.
            write: Called with every piece of the answer as it is generated.

        Returns:
            The answer.

        Raises:
            ConversationFullError: The question and the longest answer do not fit after the history.
            InputError: They do not fit even without a history, the question has ``<image>`` but not
                once per image, or the chat template cannot be used for several turns.
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
        """Return the token ids from the end of the last answer to where the next one begins."""
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
        """Return the embeddings ``[1, T, D]`` of the history and of a question with its images."""
        row = torch.tensor([ids])
        features = self.model.features(images)
        sequence = self.model.place(features, row, torch.ones_like(row), [len(images)])
        if self._history.embeds is None:
            return sequence.inputs_embeds
        return torch.cat([self._history.embeds, sequence.inputs_embeds], 1)

    def _generate(self, embeds: Tensor, cache: Any, answer: Answer, longest: int) -> None:
        """Generate the answer; the model reads only the part of ``embeds`` that ``cache`` lacks."""
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
        """Return the ids of an answer with exactly one end of text, as in training."""
        cut = ids[:-1] if ids and ids[-1] in self._ends() else ids
        return [*cut, self.model.tokenizer.eos_token_id]

    def _table(self, ids: Tensor) -> Tensor:
        return self.model.language_model.get_input_embeddings()(ids)


def check_prompt(prompt: str, images: int) -> None:
    """Raise ``InputError`` unless a prompt has one ``<image>`` per image, or none."""
    found = prompt.count(IMAGE_TOKEN)
    if found not in (0, images):
        raise InputError(
            f"the prompt has {found} of {IMAGE_TOKEN} for {images} images: write one per image, or "
            "none"
        )


def _copied(cache: Any) -> Any:
    """Return a copy of a cache that shares its tensors; new tokens do not change the original."""
    if cache is None:
        return None
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied
