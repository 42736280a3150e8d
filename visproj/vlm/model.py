"""A frozen vision encoder and a frozen language model, with a projector to train between them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor, nn

from visproj.backend import runs_triton
from visproj.errors import InputError
from visproj.vlm.compose import VisualSequence, insert_visual_tokens
from visproj.vlm.encoders import VisionEncoder
from visproj.vlm.features import FeatureCache
from visproj.vlm.language import IMAGE_TOKEN


class Prefix(NamedTuple):
    """What the language model keeps of images and prompts, to be continued by any answers.

    Attributes:
        cache: Its key-value cache, a transformers ``Cache``.
        logits: ``[B, 1, V]``, for the first token of an answer.
        attention_mask: ``[B, P]``, 0 at padding, which is on the left.
    """

    cache: Any
    logits: Tensor
    attention_mask: Tensor


class VisualLanguageModel(nn.Module):
    """Photographs and a prompt in, text out; nothing but the projector learns.

    Prompts go through the tokenizer's chat template if it has one. ``<image>`` in a prompt places
    an image; a prompt without any gets its images in front. Encoder and language model are frozen
    and stay in eval mode whatever :meth:`train` is told.

    Args:
        encoder: The frozen encoder, whose features are ``[N, 1 + S, C]``.
        projector: ``[N, 1 + S, C] -> [N, K, D]``, such as :func:`visproj.build_projector` gives.
        language_model: A transformers causal language model of width ``D``; is frozen.
        tokenizer: Its tokenizer; gets ``<image>`` as a special token if it has none.
        cache_dir: Folder that keeps the encoder's features; ``None`` computes them each time.

    Raises:
        ValueError: The encoder's width is not the projector's, or the projector's is not the
            language model's; the message has both.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        projector: nn.Module,
        language_model: Any,
        tokenizer: Any,
        *,
        cache_dir: Path | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.language_model = language_model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.features = FeatureCache(encoder, cache_dir)
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False)], special_tokens=True)
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._check_widths()

    def _check_widths(self) -> None:
        tokens = 1 + self.encoder.grid[0] * self.encoder.grid[1]
        with torch.no_grad():
            visual = self.project(torch.zeros(1, tokens, self.encoder.config.hidden_size))
        wanted = self.language_model.get_input_embeddings().weight.shape[1]
        if visual.shape[-1] != wanted:
            raise InputError(
                f"the projector's tokens are {visual.shape[-1]} wide, the language model's "
                f"embeddings {wanted}"
            )

    def train(self, mode: bool = True) -> VisualLanguageModel:
        """Set the projector's mode; the language model stays in eval mode."""
        super().train(mode)
        self.language_model.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        return self.language_model.get_input_embeddings().weight.device

    def project(self, features: Tensor) -> Tensor:
        """Visual tokens ``[N, K, D]`` of features ``[N, 1 + S, C]``, on the model's device.

        Raises:
            ValueError: The features have another width than the projector takes.
        """
        dtype = next(self.projector.parameters()).dtype
        return self.projector(features.to(self.device, dtype))

    def compose(
        self,
        features: Tensor,
        prompts: Sequence[str],
        images_per_sample: Sequence[int] | None = None,
    ) -> VisualSequence:
        """Embeddings of each prompt with its images in their places, padded on the left.

        Args:
            features: ``[N, 1 + S, C]``, the images of all samples in order.
            prompts: ``B`` of them.
            images_per_sample: ``B`` counts that add up to ``N``; ``None`` means one each.

        Raises:
            ValueError: A prompt has placeholders for another number of images than it gets.
        """
        counts = [1] * len(prompts) if images_per_sample is None else images_per_sample
        rows = [
            self.prompt_ids(prompt, count) for prompt, count in zip(prompts, counts, strict=True)
        ]
        ids, mask = _pad(rows, left=True)
        ids, mask = ids.to(self.device), mask.to(self.device)
        # <image> may lie behind the last row of the table; what stands there is replaced anyway.
        text = self.language_model.get_input_embeddings()(ids.masked_fill(self._is_image(ids), 0))
        return insert_visual_tokens(
            text,
            ids,
            self.project(features),
            counts,
            self.image_token_id,
            attention_mask=mask,
            padding_side="left",
        )

    def _is_image(self, ids: Tensor) -> Tensor:
        return ids == self.image_token_id

    def prompt_ids(self, prompt: str, images: int = 1) -> list[int]:
        """Token ids of a prompt up to where the answer begins."""
        if IMAGE_TOKEN not in prompt:
            prompt = f"{IMAGE_TOKEN}\n" * images + prompt
        if self.tokenizer.chat_template is None:
            return self.tokenizer(f"{prompt}\n").input_ids
        turn = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def read(
        self,
        features: Tensor,
        prompts: Sequence[str],
        images_per_sample: Sequence[int] | None = None,
    ) -> Prefix:
        """Run the language model over images and prompts once; arguments as :meth:`compose`."""
        sequence = self.compose(features, prompts, images_per_sample)
        out = self.language_model(
            inputs_embeds=sequence.inputs_embeds,
            attention_mask=sequence.attention_mask,
            position_ids=sequence.position_ids,
            use_cache=True,
            logits_to_keep=1,
        )
        return Prefix(out.past_key_values, out.logits, sequence.attention_mask)

    def answer_log_probs(
        self, prefix: Prefix, answers: Sequence[Sequence[str]]
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of every token of every answer, end of text included.

        Args:
            prefix: Of ``B`` samples; it is not changed, and further answers may follow.
            answers: ``A`` answers for each of the samples.

        Returns:
            Log-probabilities, fp32 ``[B, A, T]``, zero behind an answer's end, and the number of
            tokens of each answer, ``[B, A]``. Logits are computed for the answers alone.
        """
        (count,) = {len(row) for row in answers}
        rows = [self.answer_ids(answer) for row in answers for answer in row]
        ids, mask = (padded.to(self.device) for padded in _pad(rows, left=False))
        cache = _repeated(prefix.cache, count)
        before = prefix.attention_mask.repeat_interleave(count, 0)
        attended = torch.cat([before, mask[:, :-1]], 1)
        rest = self.language_model(
            input_ids=ids[:, :-1],
            attention_mask=attended,
            position_ids=(attended.cumsum(1) - 1)[:, before.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        ).logits
        logits = torch.cat([prefix.logits.repeat_interleave(count, 0), rest], 1)
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none")
        log_probs = -(losses.view_as(ids) * mask)
        return log_probs.unflatten(0, (-1, count)), mask.sum(1).unflatten(0, (-1, count))

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of an answer and the end of text.

        Raises:
            ValueError: The answer has ``<image>`` in it, which the language model cannot write.
        """
        if IMAGE_TOKEN in answer:
            raise InputError(f"the answer {answer!r} has {IMAGE_TOKEN} in it")
        ids = self.tokenizer(answer, add_special_tokens=False).input_ids
        return [*ids, self.tokenizer.eos_token_id]

    def forward(
        self,
        features: Tensor,
        prompts: Sequence[str],
        answers: Sequence[Sequence[str]],
        images_per_sample: Sequence[int] | None = None,
    ) -> Tensor:
        """Mean negative log-likelihood of a token of the answers, given images and prompts.

        The images and the prompt of a sample pass through the language model once, however many
        answers it has. Arguments as :meth:`compose` and :meth:`answer_log_probs`.
        """
        log_probs, lengths = self.answer_log_probs(
            self.read(features, prompts, images_per_sample), answers
        )
        return -log_probs.sum() / lengths.sum()

    @torch.inference_mode()
    def generate(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        images_per_sample: Sequence[int] | None = None,
        **options: Any,
    ) -> list[str]:
        """Answer each prompt about its images; transformers' ``generate`` with its cache.

        Args:
            images: RGB images of all samples in order.
            prompts: ``B`` of them.
            images_per_sample: ``B`` counts; ``None`` means one image each.
            **options: For ``language_model.generate``, such as ``max_new_tokens``, ``do_sample`` or
                a ``streamer``.
        """
        sequence = self.compose(self.features(images), prompts, images_per_sample)
        ids = self.language_model.generate(
            inputs_embeds=sequence.inputs_embeds,
            attention_mask=sequence.attention_mask,
            pad_token_id=self.tokenizer.eos_token_id,
            **options,
        )
        return self.tokenizer.batch_decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def default_device() -> torch.device:
    """Where training and chat run: the current CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_backend() -> None:
    """Raise ``ValueError`` if the backend asked for cannot run on the default device."""
    try:
        runs_triton(torch.empty(0, device=default_device()))
    except RuntimeError as error:
        raise InputError(str(error)) from error


def _pad(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids ``[B, T]``, zero at padding, and their mask."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for row, row_mask, tokens in zip(ids, mask, rows, strict=True):
        where = slice(longest - len(tokens), None) if left else slice(len(tokens))
        row[where] = torch.tensor(tokens)
        row_mask[where] = 1
    return ids, mask


def _repeated(cache: Any, count: int) -> Any:
    """A cache with every row ``count`` times; the tensors of ``cache`` stay as they are."""
    repeated = copy.copy(cache)
    repeated.layers = [copy.copy(layer) for layer in cache.layers]
    repeated.batch_repeat_interleave(count)
    return repeated
