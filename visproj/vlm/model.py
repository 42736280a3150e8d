"""A frozen vision encoder, a projector to train and a frozen language model."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

from visproj.backend import runs_triton
from visproj.errors import InputError
from visproj.vlm.compose import VisualSequence, insert_visual_tokens
from visproj.vlm.decoding import (
    Prefix,
    answer_logits,
    check_context,
    check_language_model,
    context_limit,
    read_prefix,
    token_log_probs,
)
from visproj.vlm.encoders import VisionEncoder
from visproj.vlm.features import encode_images
from visproj.vlm.language import IMAGE_TOKEN, embedding_shape
from visproj.vlm.objective import answer_losses
from visproj.vlm.prompts import Dialogue, PromptTokenizer, check_texts, end_of_text_ids


class VisualLanguageModel(nn.Module):
    """Photographs and a prompt in, text out; nothing but the projector learns.

    Prompts go through the tokenizer's chat template if it has one. ``<image>`` in a prompt places
    an image; a prompt without any gets its images in front. Encoder and language model are frozen
    and stay in eval mode, whatever :meth:`train` sets.

    The language model and its tokenizer are tried on a few tokens when this is put together. Where
    answers cannot share the language model's cache (Mamba, RWKV, LFM2), every answer is computed
    with its whole sequence, which takes longer and gives the same numbers.

    The state dict holds the projector and nothing that is frozen.

    Args:
        encoder: The frozen encoder, whose features are ``[N, 1 + S, C]``.
        projector: ``[N, 1 + S, C] -> [N, K, D]``, such as :func:`visproj.build_projector` gives.
        language_model: A transformers causal language model of width ``D``; is frozen.
        tokenizer: Its tokenizer; gets ``<image>`` as a special token if it has none, and the
            model's end of text if it names none.

    Raises:
        InputError: The encoder's width is not the projector's, or the projector's is not the
            language model's; the message has both. Or the language model or its tokenizer cannot
            be used; the message says why.
    """

    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch

    def __init__(
        self,
        encoder: VisionEncoder,
        projector: nn.Module,
        language_model: Any,
        tokenizer: Any,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.language_model = language_model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.tokens_per_image = self._check_widths()
        self._prompts = PromptTokenizer(tokenizer, language_model)
        is_partitioned = hasattr(language_model.get_input_embeddings().weight, "ds_id")
        # Weights that ZeRO-3 has partitioned cannot be tried before its engine holds the model.
        self._shares_cache = not is_partitioned and check_language_model(language_model)
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_ignore_frozen)

    def _check_widths(self) -> int:
        """Visual tokens of an image."""
        with torch.no_grad():
            visual = self.project(self.no_features(1))
        wanted = embedding_shape(self.language_model)[1]
        if visual.shape[-1] != wanted:
            raise InputError(
                f"the projector's tokens are {visual.shape[-1]} wide, the language model's "
                f"embeddings {wanted}"
            )
        return visual.shape[1]

    def features(self, images: Iterable[Image.Image]) -> Tensor:
        """Features fp32 ``[N, S, C]`` of RGB images."""
        return encode_images(self.encoder, images)

    def no_features(self, images: int = 0) -> Tensor:
        """Zeros in the place of an encoder's features, ``[images, S, C]``."""
        return torch.zeros(images, self.encoder.tokens, self.encoder.config.hidden_size)

    def train(self, mode: bool = True) -> VisualLanguageModel:
        """Set the projector's mode; the language model stays in eval mode."""
        super().train(mode)
        self.language_model.eval()
        return self

    def checkpoint_activations(self) -> None:
        """Compute the decoder layers' activations again in the backward pass.

        transformers' own switch acts in training mode alone, and the frozen model stays in eval.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        apply_activation_checkpointing(
            self.language_model, check_fn=lambda m: isinstance(m, GradientCheckpointingLayer)
        )
        self.language_model.eval()

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        return self.language_model.get_input_embeddings().weight.device

    @property
    def image_token_id(self) -> int:
        """Id of ``<image>``."""
        return self._prompts.image_token_id

    @property
    def tokens_digest(self) -> str:
        """Digest of what decides the tokens of a sample: tokenizer, template, tokens per image."""
        return f"{self._prompts.digest} {self.tokens_per_image}"

    @property
    def context_limit(self) -> int | None:
        """Tokens that the language model reads at most: visual ones, prompt and answer together."""
        return context_limit(self.language_model.config)

    def project(self, features: Tensor) -> Tensor:
        """Visual tokens ``[N, K, D]`` of features ``[N, 1 + S, C]``, on the model's device.

        Raises:
            InputError: The features have another width than the projector takes.
        """
        tensors = chain(self.projector.parameters(), self.projector.buffers())
        dtype = next((x.dtype for x in tensors if x.is_floating_point()), torch.float32)
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
            InputError: A prompt has placeholders for another number of images than it gets, or
                there are other numbers of images and prompts than counted, or the features have
                another rank or width than the projector takes.
        """
        if features.ndim != 3:
            raise InputError(f"features must be [N, 1 + S, C], got shape {list(features.shape)}")
        counts = _counts(prompts, images_per_sample, len(features))
        rows = [
            self.prompt_ids(prompt, count) for prompt, count in zip(prompts, counts, strict=True)
        ]
        if [] in rows:
            raise InputError(f"the prompt {prompts[rows.index([])]!r} has no tokens and no images")
        return self.place(features, *pad_rows(rows, left=True), counts, left=True)

    def place(
        self,
        features: Tensor,
        ids: Tensor,
        mask: Tensor,
        images_per_sample: Sequence[int],
        labels: Tensor | None = None,
        *,
        left: bool = False,
    ) -> VisualSequence:
        """Embed token ids ``[B, T]`` and put the projected images in the places of ``<image>``.

        Args:
            features: ``[N, S, C]``, the images of all rows in order.
            ids: Token ids; every ``<image>`` is one image.
            mask: 0 at padding and positive elsewhere.
            images_per_sample: ``B`` counts that add up to ``N``.
            labels: As :func:`insert_visual_tokens` takes them.
            left: Whether rows are padded on the left, as ``generate`` needs it.
        """
        ids, mask = ids.to(self.device), mask.to(self.device)
        # <image> may lie after the last row of the table; what stands there is replaced anyway.
        text = self.language_model.get_input_embeddings()(ids.masked_fill(self._is_image(ids), 0))
        # Every process has to run the projector, also one whose samples have no image.
        visual = self.project(features if len(features) else self.no_features(1))
        text = text + 0 * visual.sum().to(text.dtype) if not len(features) else text
        return insert_visual_tokens(
            text,
            ids,
            visual[: len(features)],
            images_per_sample,
            self.image_token_id,
            attention_mask=mask,
            labels=None if labels is None else labels.to(self.device),
            padding_side="left" if left else "right",
        )

    def _is_image(self, ids: Tensor) -> Tensor:
        return ids == self.image_token_id

    def prompt_ids(self, prompt: str, images: int = 1) -> list[int]:
        """Token ids of a prompt up to where the answer begins."""
        return self._prompts.prompt_ids(prompt, images)

    def history_ids(
        self, questions: Sequence[str], answers: Sequence[str], images: int = 1
    ) -> list[int]:
        """Token ids up to where the answer to the last question begins.

        Args:
            questions: ``Q`` of them.
            answers: To the first ``Q - 1``.
            images: Number of images, as in :meth:`prompt_ids`.

        Raises:
            InputError: There are other numbers of ``<image>`` and images, or the template cannot be
                used for several turns.
        """
        before = self._prompts.question_ids(questions, answers, images)
        after = [self.answer_ids(answer) for answer in answers]
        ids = [token for row in chain(*zip(before, [*after, []], strict=True)) for token in row]
        self._check_images(ids, images)
        return ids

    def _check_images(self, ids: Sequence[int], images: int) -> None:
        found = ids.count(self.image_token_id)
        if found != images:
            raise InputError(f"{found} of {IMAGE_TOKEN} in the text of {images} images")

    def dialogue(
        self, questions: Sequence[str], answers: Sequence[Sequence[str]], images: int = 1
    ) -> Dialogue:
        """Tokens of questions and answers; arguments as :meth:`PromptTokenizer.dialogue`.

        Raises:
            InputError: An answer has ``<image>`` in it or no tokens, there are other numbers of
                ``<image>`` and images, or the template cannot be used for several turns.
        """
        dialogue = self._prompts.dialogue(questions, answers, images)
        self._check_images(dialogue.ids, images)
        if any(len(self.answer_ids(text)) == 1 for texts in answers for text in texts):
            raise InputError("an answer has no tokens")
        return dialogue

    def read(
        self,
        features: Tensor,
        prompts: Sequence[str],
        images_per_sample: Sequence[int] | None = None,
    ) -> Prefix:
        """Run the language model over images and prompts once; arguments as :meth:`compose`.

        Raises:
            InputError: As :meth:`compose`, or they are more than the language model reads.
        """
        sequence = self.compose(features, prompts, images_per_sample)
        return read_prefix(self.language_model, sequence, self._shares_cache)

    def answer_log_probs(
        self, prefix: Prefix, answers: Sequence[Sequence[str]]
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of every token of every answer, end of text included.

        Args:
            prefix: Of ``B`` samples; it is not changed, and further answers may follow.
            answers: ``A`` answers for each of the samples.

        Returns:
            Log-probabilities, fp32 ``[B, A, T]``, zero after an answer's end, and the number of
            tokens of each answer, ``[B, A]``.

        Raises:
            InputError: The samples have different numbers of answers, or an answer does not fit
                into what the language model reads.
        """
        count = _answers_per_sample(answers, len(prefix.lengths))
        rows = [self.answer_ids(answer) for row in answers for answer in row]
        before = [length for length in prefix.lengths for _ in range(count)]
        for length, row in zip(before, rows, strict=True):
            check_context(self.context_limit, length, len(row))
        ids, mask = (padded.to(self.device) for padded in pad_rows(rows, left=False))
        log_probs = torch.zeros(ids.shape, device=self.device)
        if rows:
            logits = answer_logits(self.language_model, prefix, ids, mask, count)
            log_probs = token_log_probs(logits, ids, mask)
        shape = (len(prefix.lengths), count)
        return log_probs.unflatten(0, shape), mask.sum(1).unflatten(0, shape)

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of an answer and the end of text.

        Raises:
            InputError: The answer has ``<image>`` in it, which the language model cannot write.
        """
        return self._prompts.answer_ids(answer)

    def forward(
        self,
        features: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        images_per_sample: Sequence[int],
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Compute the negative log-likelihood of the answers in a batch of dialogues.

        ``loss = sum of losses / num_items_in_batch``, over answer tokens.

        Args:
            features: ``[N, S, C]``, the images of all samples in order.
            input_ids: Int64 ``[B, T]``; every ``<image>`` is one image.
            attention_mask: Int64 ``[B, T]``: 0 at padding, elsewhere the branch of
                :class:`~visproj.vlm.prompts.Dialogue`.
            labels: Int64 ``[B, T]``: ids of answer tokens, -100 elsewhere.
            images_per_sample: ``B`` counts that add up to ``N``.
            num_items_in_batch: Answer tokens over all batches of the optimiser step and all
                processes; those of this batch if ``None``.

        Returns:
            ``loss``, fp32 scalar; ``losses``, fp32 ``[B]``, sums in nats; ``tokens``, int64
            ``[B]``, numbers of answer tokens.
        """
        sequence = self.place(features, input_ids, attention_mask, images_per_sample, labels)
        losses, tokens = answer_losses(self.language_model, sequence)
        count = tokens.sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": losses.sum() / count, "losses": losses, "tokens": tokens}

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

        Raises:
            InputError: As :meth:`compose`, or images, prompt and the longest answer are more than
                the language model reads.
        """
        if isinstance(images, Image.Image):
            raise InputError("images must be a list of images, got one image")
        _counts(prompts, images_per_sample, len(images))
        sequence = self.compose(self.features(images), prompts, images_per_sample)
        return self._generate(sequence, options)

    @torch.inference_mode()
    def generate_after(
        self,
        features: Tensor,
        rows: Sequence[Sequence[int]],
        images_per_sample: Sequence[int],
        **options: Any,
    ) -> list[str]:
        """Answer token ids, such as :meth:`history_ids` gives, that are padded on the left here.

        Args:
            features: ``[N, S, C]``, the images of all rows in order.
            rows: ``B`` rows of token ids; every ``<image>`` is one image.
            images_per_sample: ``B`` counts that add up to ``N``.
            **options: As for :meth:`generate`.

        Raises:
            InputError: As :meth:`generate`.
        """
        ids = pad_rows(rows, left=True)
        return self._generate(self.place(features, *ids, images_per_sample, left=True), options)

    def _generate(self, sequence: VisualSequence, options: dict[str, Any]) -> list[str]:
        lengths = (sequence.attention_mask != 0).sum(1).tolist()
        for length in lengths:
            check_context(self.context_limit, length, self._longest_answer(length, options))
        ends = {self.tokenizer.eos_token_id, *end_of_text_ids(self.language_model)}
        options = {
            "pad_token_id": self.tokenizer.eos_token_id,
            "eos_token_id": sorted(ends),
            **options,
        }
        answers: list[str] = []
        for embeds, mask in self._generated_together(sequence, lengths):
            out = self.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **options)
            ids = getattr(out, "sequences", out)  # with return_dict_in_generate
            answers += self.tokenizer.batch_decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return answers

    def _longest_answer(self, before: int, options: dict[str, Any]) -> int:
        """Tokens of the longest answer that ``options`` allow; 1 where they set no limit."""
        config = options.get("generation_config") or self.language_model.generation_config
        given = {**config.to_diff_dict(), **options}
        if given.get("max_new_tokens") is not None:
            return given["max_new_tokens"]
        return max(1, (given.get("max_length") or 0) - before)

    def _generated_together(
        self, sequence: VisualSequence, lengths: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """Embeddings and masks: all in one, or without padding where the model might notice it."""
        embeds, mask = sequence.inputs_embeds, sequence.attention_mask
        if not lengths:
            return []
        if self._shares_cache or min(lengths) == max(lengths):
            return [(embeds, mask)]
        rows = zip(embeds.split(1), mask.split(1), lengths, strict=True)
        return [(row[:, -length:], row_mask[:, -length:]) for row, row_mask, length in rows]


def default_device() -> torch.device:
    """Where training and chat run: the current CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_backend() -> None:
    """Raise ``ValueError`` if the backend asked for cannot run on the default device."""
    try:
        runs_triton(torch.empty(0, device=default_device()))
    except RuntimeError as error:
        raise InputError(str(error)) from error


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if _is_frozen(key)]:
        del state[key]


def _ignore_frozen(module: nn.Module, incompatible: Any) -> None:
    # DeepSpeed leaves out what does not learn, a Perceiver's position table among it.
    fixed = {name for name, p in module.named_parameters() if not p.requires_grad}
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if key not in fixed and not _is_frozen(key)]


def _is_frozen(key: str) -> bool:
    return "language_model" in key.split(".")


def _counts(
    prompts: Sequence[str], images_per_sample: Sequence[int] | None, images: int
) -> list[int]:
    """Images of each sample, checked against the numbers of prompts and images."""
    check_texts(prompts, "prompts")
    given = [1] * len(prompts) if images_per_sample is None else images_per_sample
    counts = [operator.index(count) for count in given]
    if len(counts) != len(prompts):
        raise InputError(f"images_per_sample has {len(counts)} entries for {len(prompts)} prompts")
    if sum(counts) != images or min(counts, default=0) < 0:
        raise InputError(f"{len(prompts)} prompts with {counts} images each, got {images} images")
    return counts


def _answers_per_sample(answers: Sequence[Sequence[str]], samples: int) -> int:
    if isinstance(answers, str) or len(answers) != samples:
        raise InputError(f"answers must be {samples} lists of texts, got {answers!r:.60}")
    for row in answers:
        check_texts(row, "the answers of a sample")
    counts = sorted({len(row) for row in answers})
    if len(counts) > 1:
        raise InputError(f"every sample needs the same number of answers, got {counts}")
    return counts[0] if counts else 0


def pad_rows(rows: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Return ids ``[B, T]``, zero at padding, and their mask."""
    longest = max(map(len, rows), default=0)
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for row, row_mask, tokens in zip(ids, mask, rows, strict=True):
        where = slice(longest - len(tokens), None) if left else slice(len(tokens))
        row[where] = torch.tensor(tokens)
        row_mask[where] = 1
    return ids, mask
