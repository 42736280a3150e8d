"""Prompts and answers as token ids, whatever a tokenizer or a chat template does unasked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken

from visproj.errors import InputError
from visproj.vlm.language import IMAGE_TOKEN, one_line

SAMPLE = f"red {IMAGE_TOKEN} dog"


class PromptTokenizer:
    """A tokenizer, its chat template if it has one, and ``<image>`` as one token of it.

    Tried once with a prompt and an answer. A beginning of text that the tokenizer adds to a prompt
    stays, an end of text that it adds is removed, and an answer has exactly one.

    Args:
        tokenizer: Of a language model; gets ``<image>`` as a special token if it has none, and the
            model's end of text if it names none.
        language_model: Whose tokens these are.

    Attributes:
        image_token_id: Of ``<image>``; may be the first id that the model has no embedding for.

    Raises:
        InputError: Prompts or ``<image>`` do not reach the model as they are, there is no end of
            text, or the tokenizer has tokens that the model does not have.
    """

    def __init__(self, tokenizer: Any, language_model: Any) -> None:
        self.tokenizer = tokenizer
        self._check_vocabulary(language_model.get_input_embeddings().weight.shape[0])
        if IMAGE_TOKEN not in tokenizer.get_added_vocab():
            tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False)], special_tokens=True)
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._set_end_of_text(language_model)
        self._has_template = getattr(tokenizer, "chat_template", None) is not None
        self._takes_parts = self._has_template and self._find_content()
        self._check_round_trip()

    def prompt_ids(self, prompt: str, images: int = 1) -> list[int]:
        """Token ids of a prompt up to where the answer begins."""
        if IMAGE_TOKEN not in prompt:
            prompt = f"{IMAGE_TOKEN}\n" * images + prompt
        if self._has_template:
            return self._ids(self._render(prompt, self._takes_parts))
        ids = self._ids(f"{prompt}\n")
        return [*self._beginning(ids, f"{prompt}\n"), *ids]

    def _beginning(self, ids: list[int], text: str) -> list[int]:
        """What the tokenizer puts before a text whose own ids are these."""
        whole = list(self.tokenizer(text).input_ids)
        starts = range(len(whole) - len(ids) + 1)
        return next((whole[:n] for n in starts if whole[n : n + len(ids)] == ids), [])

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of an answer and the end of text.

        Raises:
            InputError: The answer has ``<image>`` in it, which the language model cannot write.
        """
        if IMAGE_TOKEN in answer:
            raise InputError(f"the answer {answer!r} has {IMAGE_TOKEN} in it")
        end = self.tokenizer.eos_token_id
        ids = self._ids(answer)
        while ids and ids[-1] == end:
            ids.pop()
        return [*ids, end]

    def _ids(self, text: str) -> list[int]:
        """Ids of a text without a beginning or an end that is not written in it."""
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        begin, end = self.tokenizer.bos_token, self.tokenizer.eos_token
        if begin and ids[:1] == [self.tokenizer.bos_token_id] and not text.startswith(begin):
            ids = ids[1:]
        if ids[-1:] == [self.tokenizer.eos_token_id] and not text.rstrip().endswith(end):
            ids = ids[:-1]
        return ids

    def _render(self, prompt: str, in_parts: bool) -> str:
        content = [{"type": "text", "text": prompt}] if in_parts else prompt
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def _find_content(self) -> bool:
        """Return whether the template takes a list of parts instead of a text."""
        reasons = []
        for in_parts in (False, True):
            try:
                text = self._render(SAMPLE, in_parts)
            except Exception as error:  # templates are programs
                reasons.append(one_line(error))
                continue
            if SAMPLE in text and text.count(IMAGE_TOKEN) == 1:
                return in_parts
            reasons.append(f"it makes {text!r:.80} of {SAMPLE!r}")
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
                f"{index}, the model has {rows} embeddings"
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
            fault = f"it has no token {IMAGE_TOKEN} and takes none"
        elif prompt.count(image) != 1 or image in self.prompt_ids("red dog", 0):
            fault = f"{prompt.count(image)} of its tokens are {IMAGE_TOKEN} in {SAMPLE!r}"
        elif prompt == other or len(answer) < 2:
            fault = "it does not know the words of a prompt"
        elif end in answer[:-1]:
            fault = "it puts the end of text into an answer"
        if fault:
            raise InputError(f"the language model's tokenizer cannot be used: {fault}")


def end_of_text_ids(language_model: Any) -> list[int]:
    """Ids that end the model's text, as it is configured."""
    for config in (getattr(language_model, "generation_config", None), language_model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def check_texts(texts: Sequence[str], what: str) -> None:
    """Raise ``InputError`` unless ``texts`` is a sequence of texts, and not a text itself."""
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{what} must be a list of texts, got {texts!r:.60}")
