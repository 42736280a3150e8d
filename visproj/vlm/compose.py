"""Insertion of visual tokens at their placeholders in a text."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from visproj.errors import InputError

IGNORE_INDEX = -100


class VisualSequence(NamedTuple):
    """Inputs of a causal language model: one row per sample, text and visual tokens in order.

    Attributes:
        inputs_embeds: ``[B, T', D]``, zero at padding.
        attention_mask: ``[B, T']``: 0 at padding, ``visual_mask_value`` at visual tokens, and the
            given mask elsewhere.
        labels: ``[B, T']`` with -100 at visual tokens and padding, or ``None``.
        position_ids: Int64 ``[B, T']``: index of each token among the attended tokens of its row.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    position_ids: Tensor


def insert_visual_tokens(
    text_embeds: Tensor,
    input_ids: Tensor,
    visual_tokens: Tensor | Sequence[Tensor],
    images_per_sample: Sequence[int] | Tensor,
    image_token_id: int,
    *,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    pad_to_multiple_of: int | None = None,
    padding_side: Literal["left", "right"] | None = None,
    visual_mask_value: int = 1,
) -> VisualSequence:
    """Replace every image placeholder by its image's visual tokens.

    The images of the batch come in reading order: sample by sample, and within a sample in the
    order of the placeholders. Padding (masked positions at either end of a row) is removed. Then
    all rows are padded on one side to the length of the longest row. The result is differentiable
    in ``text_embeds`` and ``visual_tokens``.

    Args:
        text_embeds: ``[B, T, D]`` embeddings of ``input_ids``; those of placeholders are ignored.
        input_ids: Token ids ``[B, T]``, integer.
        visual_tokens: ``[N, K, D]``, ``K`` tokens for each of the ``N`` images, or a list of
            ``[K_i, D]``; cast to the dtype of ``text_embeds``.
        images_per_sample: ``B`` counts that add up to ``N``; 0 for a sample without images.
        image_token_id: Id of the placeholder token in ``input_ids``.
        attention_mask: ``[B, T]``, 0 or False at padding and positive elsewhere; all ones when
            ``None``.
        labels: Target ids ``[B, T]``, signed integer.
        pad_to_multiple_of: Round the row length up to a multiple of this.
        padding_side: ``"left"``, which ``generate`` needs, or ``"right"``. ``None`` keeps the side
            on which ``attention_mask`` has padding, and means the right if it has none. It must be
            given if the mask has padding on both sides.
        visual_mask_value: Value of the attention mask at visual tokens. DeepSpeed-VisualChat trains
            with 2, and with ``pad_to_multiple_of=8``.

    Returns:
        A :class:`VisualSequence`.

    Raises:
        TypeError: If ids, labels or counts are not integer, or embeddings not floating point.
        InputError: If shapes, devices or padding options do not fit, if the mask has padding on
            both sides and ``padding_side`` is not given, or if the number of placeholders in a
            sample differs from ``images_per_sample``; the message names the sample.

    Source: DeepSpeed-VisualChat ``utils/model/modeling_dsvl.py``, ``concat``, which drops samples
    without images and gives a sample's images to its placeholders in reverse order.
    """
    visual_tokens, counts = _rows(visual_tokens)
    _check(text_embeds, input_ids, visual_tokens, attention_mask, labels)
    _check_padding(pad_to_multiple_of, padding_side)
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    _check_mask(attention_mask, visual_mask_value)
    kept = _without_padding(attention_mask != 0)
    padding_side = padding_side or _shown_side(kept)
    placeholder = (input_ids == image_token_id) & kept
    _check_counts(placeholder.sum(1), images_per_sample, len(counts))

    device = input_ids.device
    per_image = torch.tensor(counts, dtype=torch.int64, device=device)  # [N]
    slots = kept.to(torch.int64)
    slots[placeholder] = per_image
    lengths = slots.sum(1)
    longest = int(lengths.max()) if lengths.numel() else 0
    if pad_to_multiple_of:
        longest = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    start = slots.cumsum(1) - slots
    if padding_side == "left":
        start = start + (longest - lengths)[:, None]

    text_row, text_column = (kept & ~placeholder).nonzero(as_tuple=True)
    text_at = (text_row, start[text_row, text_column])
    image_row, image_column = placeholder.nonzero(as_tuple=True)
    # Column of visual token i of the batch: its image's start + i - tokens of earlier images.
    ahead = start[image_row, image_column] - (per_image.cumsum(0) - per_image)
    total = len(visual_tokens)
    image_row, ahead = (
        t.repeat_interleave(per_image, output_size=total) for t in (image_row, ahead)
    )
    visual_at = (image_row, ahead + torch.arange(total, device=device))

    shape = (input_ids.shape[0], longest)
    embeds = text_embeds.new_zeros(*shape, text_embeds.shape[-1])
    embeds = embeds.index_put(text_at, text_embeds[text_row, text_column])
    embeds = embeds.index_put(visual_at, visual_tokens.to(text_embeds.dtype))
    mask = attention_mask.new_zeros(shape)
    mask[text_at] = attention_mask[text_row, text_column]
    mask[visual_at] = visual_mask_value
    if labels is not None:
        text_labels = labels[text_row, text_column]
        labels = labels.new_full(shape, IGNORE_INDEX)
        labels[text_at] = text_labels
    position_ids = ((mask != 0).cumsum(1) - 1).clamp(min=0)
    return VisualSequence(embeds, mask, labels, position_ids)


def _rows(visual_tokens: Tensor | Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Return the visual tokens of all images ``[sum K, D]``, and how many each image has."""
    if isinstance(visual_tokens, Tensor):
        if visual_tokens.ndim != 3:
            raise InputError(
                "visual_tokens must have 3 dimensions or be a list of [K, D], got shape "
                f"{list(visual_tokens.shape)}"
            )
        images, each, _ = visual_tokens.shape
        return visual_tokens.flatten(0, 1), [each] * images
    tokens = list(visual_tokens)
    for index, image in enumerate(tokens):
        if not isinstance(image, Tensor) or image.ndim != 2:
            got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise InputError(f"visual_tokens[{index}] must be [K, D], got {got}")
        if image.shape[1] != tokens[0].shape[1]:
            raise InputError(
                f"visual_tokens[{index}] has width {image.shape[1]}, but visual_tokens[0] has "
                f"width {tokens[0].shape[1]}"
            )
    if not tokens:
        raise InputError("visual_tokens is an empty list: without images pass a tensor [0, K, D]")
    return torch.cat(tokens), [len(image) for image in tokens]


def _without_padding(attended: Tensor) -> Tensor:
    """Return a mask that is True from the first attended position of each row to its last."""
    seen = attended.cumsum(1) > 0
    still_to_come = attended.flip(1).cumsum(1).flip(1) > 0
    return seen & still_to_come


def _shown_side(kept: Tensor) -> Literal["left", "right"]:
    """Return the side that has padding, or the right; rows of padding alone do not count."""
    some = kept.any(1)
    left = bool((some & ~kept[:, :1].any(1)).any())
    right = bool((some & ~kept[:, -1:].any(1)).any())
    if left and right:
        raise InputError(
            "attention_mask has padding on the left and on the right: pass padding_side"
        )
    return "left" if left else "right"


def _check_mask(attention_mask: Tensor, visual_mask_value: int) -> None:
    dtype = attention_mask.dtype
    if dtype.is_floating_point:
        largest = int(2 / torch.finfo(dtype).eps)  # every integer up to here is exact
    else:
        largest = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    if not 1 <= visual_mask_value <= largest:
        raise InputError(
            f"visual_mask_value must be from 1 to {largest} in an attention_mask of {dtype}, got "
            f"{visual_mask_value}"
        )
    if dtype != torch.bool and not bool((attention_mask >= 0).all()):
        raise InputError(
            "attention_mask must be 0 at padding and positive elsewhere, got "
            f"{attention_mask.min().item()}: additive masks are not supported"
        )


def _check(
    text_embeds: Tensor,
    input_ids: Tensor,
    visual_tokens: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
) -> None:
    if input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(
            f"input_ids must be integer [B, T], got {input_ids.dtype} {list(input_ids.shape)}"
        )
    for name, embeds in (("text_embeds", text_embeds), ("visual_tokens", visual_tokens)):
        if not embeds.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {embeds.dtype}")
    if text_embeds.ndim != 3:
        raise InputError(f"text_embeds must have 3 dimensions, got shape {list(text_embeds.shape)}")
    if text_embeds.shape[:2] != input_ids.shape:
        raise InputError(
            f"text_embeds must be [B, T, D] with [B, T] = {list(input_ids.shape)}, "
            f"got {list(text_embeds.shape)}"
        )
    if visual_tokens.shape[1] != text_embeds.shape[2]:
        raise InputError(
            f"visual_tokens have width {visual_tokens.shape[1]}, but text_embeds have width "
            f"{text_embeds.shape[2]}"
        )
    for name, extra in (("attention_mask", attention_mask), ("labels", labels)):
        if extra is not None and extra.shape != input_ids.shape:
            raise InputError(
                f"{name} must be [B, T] = {list(input_ids.shape)}, got {list(extra.shape)}"
            )
    if labels is not None and (labels.is_floating_point() or not labels.dtype.is_signed):
        raise TypeError(f"labels must be integer and signed, got {labels.dtype}")
    given = (text_embeds, input_ids, visual_tokens, attention_mask, labels)
    devices = {tensor.device for tensor in given if tensor is not None}
    if len(devices) > 1:
        raise InputError(
            "embeddings, ids, mask and labels must be on one device, got "
            + ", ".join(sorted(map(str, devices)))
        )


def _check_padding(pad_to_multiple_of: int | None, padding_side: str | None) -> None:
    if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
        raise InputError(f"pad_to_multiple_of must be positive, got {pad_to_multiple_of}")
    if padding_side not in ("left", "right", None):
        raise InputError(f"padding_side must be 'left', 'right' or None, got {padding_side!r}")


def _check_counts(
    found: Tensor, images_per_sample: Sequence[int] | Tensor, num_images: int
) -> None:
    if isinstance(images_per_sample, Tensor):
        if images_per_sample.ndim != 1:
            raise InputError(
                f"images_per_sample must be [B], got shape {list(images_per_sample.shape)}"
            )
        images_per_sample = images_per_sample.tolist()
    counts = [operator.index(count) for count in images_per_sample]  # TypeError unless integers
    if len(counts) != found.numel():
        raise InputError(
            f"images_per_sample has {len(counts)} entries for a batch of {found.numel()}"
        )
    for sample, (placeholders, count) in enumerate(zip(found.tolist(), counts, strict=True)):
        if placeholders != count:
            raise InputError(
                f"sample {sample} holds {placeholders} image placeholders, but images_per_sample "
                f"says {count}"
            )
    if sum(counts) != num_images:
        raise InputError(
            f"images_per_sample adds up to {sum(counts)}, but visual_tokens holds {num_images} "
            "images"
        )
