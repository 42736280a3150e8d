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
    """A vision-language model that answers prompts about images; only its projector is trained.

    Prompts are formatted with the tokenizer's chat template if it has one. ``<image>`` in a prompt
    places an image; in a prompt without it, the images come first. Encoder and language model are
    frozen and stay in eval mode, whatever :meth:`train` sets.

    The constructor runs the language model and its tokenizer on a few tokens. If answers cannot
    share the language model's cache (Mamba, RWKV, LFM2), every answer is computed with its whole
    sequence, which takes longer and gives the same numbers.

    The state dict holds only the projector.

    Args:
        encoder: Frozen encoder with features ``[N, 1 + S, C]``.
        projector: Module ``[N, 1 + S, C] -> [N, K, D]``; see :func:`visproj.build_projector`.
        language_model: transformers causal language model of width ``D``, which is frozen here.
        tokenizer: The language model's tokenizer. It gets ``<image>`` as a special token and the
            model's end-of-text token if it lacks them.

    Raises:
        InputError: The widths of encoder and projector, or of projector and language model, differ;
            the message has both. Or the language model or its tokenizer cannot be used; the message
            says why.
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
        # A model that ZeRO-3 has partitioned cannot run before DeepSpeed's engine holds it.
        self._shares_cache = not is_partitioned and check_language_model(language_model)
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_ignore_frozen)

    def _check_widths(self) -> int:
        """Check the widths and return the number of visual tokens per image."""
        with torch.no_grad():
            visual = self.project(self.no_features(1))
        wanted = embedding_shape(self.language_model)[1]
        if visual.shape[-1] != wanted:
            raise InputError(
                f"the projector's tokens have width {visual.shape[-1]}, but the language model's "
                f"embeddings have width {wanted}"
            )
        return visual.shape[1]

    def features(self, images: Iterable[Image.Image]) -> Tensor:
        """Compute features fp32 ``[N, S, C]`` of RGB images."""
        return encode_images(self.encoder, images)

    def no_features(self, images: int = 0) -> Tensor:
        """Return zeros ``[images, S, C]`` in the shape of the encoder's features."""
        return torch.zeros(images, self.encoder.tokens, self.encoder.config.hidden_size)

    def train(self, mode: bool = True) -> VisualLanguageModel:
        """Set the projector's mode; the language model stays in eval mode."""
        super().train(mode)
        self.language_model.eval()
        return self

    def checkpoint_activations(self) -> None:
        """Recompute the decoder layers' activations in the backward pass instead of keeping them.

        transformers' own switch needs training mode, and the frozen model stays in eval mode.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        apply_activation_checkpointing(
            self.language_model, check_fn=lambda m: isinstance(m, GradientCheckpointingLayer)
        )
        self.language_model.eval()

    @property
    def device(self) -> torch.device:
        """Device of the language model."""
        return self.language_model.get_input_embeddings().weight.device

    @property
    def image_token_id(self) -> int:
        """Id of ``<image>``."""
        return self._prompts.image_token_id

    @property
    def tokens_digest(self) -> str:
        """Digest of the tokenizer, its template and the tokens per image."""
        return f"{self._prompts.digest} {self.tokens_per_image}"

    @property
    def context_limit(self) -> int | None:
        """Longest sequence of the language model: visual tokens, prompt and answer together."""
        return context_limit(self.language_model.config)

    def project(self, features: Tensor) -> Tensor:
        """Project features ``[N, 1 + S, C]`` to visual tokens ``[N, K, D]`` on the model's device.

        Raises:
            InputError: The features' width is not the one that the projector takes.
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
        """Embed prompts with their images in place of ``<image>``, padded on the left.

        Args:
            features: ``[N, 1 + S, C]``, the images of all samples in order.
            prompts: ``B`` prompts.
            images_per_sample: ``B`` counts that add up to ``N``; ``None`` means one per prompt.

        Raises:
            InputError: A prompt's placeholders do not match its number of images, the counts do not
                match the prompts or the images, or the features' rank or width is not the one that
                the projector takes.
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
        """Embed token ids ``[B, T]`` and replace every ``<image>`` by its projected image.

        Args:
            features: ``[N, S, C]``, the images of all rows in order.
            ids: Token ids; every ``<image>`` is one image.
            mask: Mask ``[B, T]``: 0 at padding and positive elsewhere.
            images_per_sample: ``B`` counts that add up to ``N``.
            labels: Labels ``[B, T]``, as in :func:`insert_visual_tokens`.
            left: Whether rows are padded on the left, as ``generate`` needs it.
        """
        ids, mask = ids.to(self.device), mask.to(self.device)
        # The id of <image> may be outside the table. Its embedding is replaced anyway.
        text = self.language_model.get_input_embeddings()(ids.masked_fill(self._is_image(ids), 0))
        # Every process has to run the projector, even if its samples have no image.
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
        """Return the token ids of a prompt, up to where the answer begins."""
        return self._prompts.prompt_ids(prompt, images)

    def history_ids(
        self, questions: Sequence[str], answers: Sequence[str], images: int = 1
    ) -> list[int]:
        """Return the token ids up to where the answer to the last question begins.

        Args:
            questions: ``Q`` questions.
            answers: Answers to the first ``Q - 1`` questions.
            images: Number of images, as in :meth:`prompt_ids`.

        Raises:
            InputError: The numbers of ``<image>`` and of images differ, or the template cannot be
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
            raise InputError(f"{found} {IMAGE_TOKEN} placeholders in the text of {images} images")

    def dialogue(
        self, questions: Sequence[str], answers: Sequence[Sequence[str]], images: int = 1
    ) -> Dialogue:
        """Tokenize questions and answers; arguments as in :meth:`PromptTokenizer.dialogue`.

        Raises:
            InputError: An answer contains ``<image>`` or has no tokens, the numbers of ``<image>``
                and of images differ, or the template cannot be used for several turns.
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
        """Run the language model once over images and prompts; arguments as in :meth:`compose`.

        Raises:
            InputError: As in :meth:`compose`, or the sequence exceeds :attr:`context_limit`.
        """
        sequence = self.compose(features, prompts, images_per_sample)
        return read_prefix(self.language_model, sequence, self._shares_cache)

    def answer_log_probs(
        self, prefix: Prefix, answers: Sequence[Sequence[str]]
    ) -> tuple[Tensor, Tensor]:
        """Compute the log-probability of every token of every answer, end of text included.

        Args:
            prefix: Prefix of ``B`` samples from :meth:`read`. It is not changed and can be reused.
            answers: ``A`` answers for each of the samples.

        Returns:
            Log-probabilities, fp32 ``[B, A, T]``, zero after an answer's end, and the number of
            tokens of each answer, ``[B, A]``.

        Raises:
            InputError: The samples have different numbers of answers, or a sequence exceeds
                :attr:`context_limit`.
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
        """Return the token ids of an answer, followed by the end of text.

        Raises:
            InputError: The answer contains ``<image>``, which the language model cannot write.
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
            attention_mask: Int64 ``[B, T]``: 0 at padding, elsewhere the token's branch in
                :class:`~visproj.vlm.prompts.Dialogue`.
            labels: Int64 ``[B, T]``: ids of answer tokens, -100 elsewhere.
            images_per_sample: ``B`` counts that add up to ``N``.
            num_items_in_batch: Number of answer tokens in all batches of the optimiser step, over
                all processes; ``None`` counts those of this batch.

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
        """Answer each prompt about its images with the language model's ``generate``.

        Args:
            images: RGB images of all samples in order.
            prompts: ``B`` prompts.
            images_per_sample: ``B`` counts; ``None`` means one image per prompt.
            **options: Options of ``language_model.generate``, such as ``max_new_tokens``,
                ``do_sample`` or a ``streamer``.

        Raises:
            InputError: As in :meth:`compose`, or images, prompt and the longest answer together
                exceed :attr:`context_limit`.
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
        """Generate answers to rows of token ids, such as those of :meth:`history_ids`.

        Args:
            features: ``[N, S, C]``, the images of all rows in order.
            rows: ``B`` rows of token ids, padded here on the left; every ``<image>`` is one image.
            images_per_sample: ``B`` counts that add up to ``N``.
            **options: As in :meth:`generate`.

        Raises:
            InputError: As in :meth:`generate`.
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
        """Return the largest answer length in tokens that ``options`` allow; 1 without a limit."""
        config = options.get("generation_config") or self.language_model.generation_config
        given = {**config.to_diff_dict(), **options}
        if given.get("max_new_tokens") is not None:
            return given["max_new_tokens"]
        return max(1, (given.get("max_length") or 0) - before)

    def _generated_together(
        self, sequence: VisualSequence, lengths: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return one batch, or unpadded single rows if padding might change the model's output."""
        embeds, mask = sequence.inputs_embeds, sequence.attention_mask
        if not lengths:
            return []
        if self._shares_cache or min(lengths) == max(lengths):
            return [(embeds, mask)]
        rows = zip(embeds.split(1), mask.split(1), lengths, strict=True)
        return [(row[:, -length:], row_mask[:, -length:]) for row, row_mask, length in rows]


def default_device() -> torch.device:
    """Return the device of training and chat: the current CUDA device, or the CPU without one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_backend() -> None:
    """Raise ``InputError`` if the chosen backend cannot run on :func:`default_device`."""
    try:
        runs_triton(torch.empty(0, device=default_device()))
    except RuntimeError as error:
        raise InputError(str(error)) from error


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if _is_frozen(key)]:
        del state[key]


def _ignore_frozen(module: nn.Module, incompatible: Any) -> None:
    # DeepSpeed does not save what is not trained, such as a Perceiver's position table.
    fixed = {name for name, p in module.named_parameters() if not p.requires_grad}
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if key not in fixed and not _is_frozen(key)]


def _is_frozen(key: str) -> bool:
    return "language_model" in key.split(".")


def _counts(
    prompts: Sequence[str], images_per_sample: Sequence[int] | None, images: int
) -> list[int]:
    """Return the image count of each sample, checked against the prompts and the images."""
    check_texts(prompts, "prompts")
    given = [1] * len(prompts) if images_per_sample is None else images_per_sample
    counts = [operator.index(count) for count in given]
    if len(counts) != len(prompts):
        raise InputError(f"images_per_sample has {len(counts)} entries for {len(prompts)} prompts")
    if sum(counts) != images or min(counts, default=0) < 0:
        raise InputError(f"images per prompt must be >= 0 and add up to {images}, got {counts}")
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
