"""Calls of a causal language model: reading a prefix once, logits of answers, context length."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visproj.errors import InputError
from visproj.vlm.compose import VisualSequence
from visproj.vlm.language import one_line

LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len")  # names in transformers' configs


class Prefix(NamedTuple):
    """Images and prompts as input of the language model, to be continued by any answers.

    Attributes:
        inputs_embeds: ``[B, P, D]``, zero at padding, which is on the left.
        attention_mask: ``[B, P]``, 0 at padding.
        cache: The model's key-value cache, a transformers ``DynamicCache``; ``None`` if answers
            cannot share it. The model then reads the prefix again with each answer.
        logits: Logits of an answer's first token, ``[B, 1, V]``; ``None`` if ``cache`` is ``None``.
        lengths: Number of attended tokens in each of the ``B`` rows.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    cache: Any
    logits: Tensor | None
    lengths: list[int]


def check_language_model(language_model: Any) -> bool:
    """Run the model on a few embeddings and return whether answers can share its cache.

    They can if the cache holds only keys and values, the model takes ``position_ids`` (without them
    padding on the left would shift positions), and the logits are the same without the cache.

    Raises:
        InputError: The model is not a causal language model, does not run on ``inputs_embeds``, or
            generates other tokens than its forward pass predicts; the message names its class.
    """
    name = type(language_model).__name__
    if getattr(language_model.config, "is_encoder_decoder", False):
        raise InputError(f"{name} is an encoder-decoder model, not a causal language model")
    try:
        with torch.inference_mode():
            out, generated, predicted = _try(language_model)
            shares = _is_plain(out.get("past_key_values")) and _continues(language_model)
    except Exception as error:  # a model's own code can raise anything
        raise InputError(
            f"{name} cannot be used as the language model: {one_line(error)}"
        ) from error
    if _differ(out.logits[0, :-1], out.logits[1, :-1]):
        raise InputError(f"{name} is not causal: a token changes the logits of earlier positions")
    if _differ(generated, predicted):
        raise InputError(
            f"{name} cannot be used as the language model: generate() and its forward pass give "
            "different logits"
        )
    return shares


def _try(language_model: Any) -> tuple[Any, Tensor, Tensor]:
    """Run two rows that differ only in their last token, and generate two tokens after the first.

    Returns:
        The output of both rows, and the logits ``[2, V]`` of the two generated tokens: once from
        ``generate``, once from one forward pass.
    """
    table = language_model.get_input_embeddings()
    rows, device = table.weight.shape[0], table.weight.device
    ids = torch.tensor([[0, 1, 2], [0, 1, 3]], device=device) % rows
    mask = torch.ones_like(ids)
    out = language_model(inputs_embeds=table(ids), attention_mask=mask, use_cache=True)
    if getattr(out, "logits", None) is None or out.logits.ndim != 3:
        raise InputError("it does not return logits for every token")
    generated = language_model.generate(
        inputs_embeds=table(ids[:1]),
        attention_mask=mask[:1],
        min_new_tokens=2,
        max_new_tokens=2,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    # Two rows again: some models keep a state from the last call, which has this batch size.
    whole = torch.cat([ids[:1], generated.sequences[:, :1]], 1).expand(2, -1)
    predicted = language_model(inputs_embeds=table(whole), use_cache=False).logits[0, -2:]
    return out, torch.cat(generated.logits), predicted


def _continues(language_model: Any) -> bool:
    """Return whether logits after a shared cache equal those of whole sequences."""
    if not takes(language_model, "position_ids"):
        return False
    table = language_model.get_input_embeddings()
    ids = torch.tensor([[0, 1, 2], [0, 1, 3]], device=table.weight.device) % table.weight.shape[0]
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    embeds = table(ids) * mask[..., None]
    sequence = VisualSequence(embeds, mask, None, (mask.cumsum(1) - 1).clamp(min=0))
    answers = ids[:, 1:], mask[:, 1:], 1
    whole = answer_logits(language_model, read_prefix(language_model, sequence, False), *answers)
    try:
        prefix = read_prefix(language_model, sequence, True)
        return not _differ(answer_logits(language_model, prefix, *answers), whole)
    except Exception:  # some models cannot add several tokens to a cache at once
        return False


def _differ(first: Tensor, second: Tensor) -> bool:
    """Return whether logits differ by more than rounding can explain.

    Logits that are not finite count as equal: training reports them, with the step.
    """
    largest = second.abs().max().float()
    distance = (first.float() - second.float()).abs().max()
    return bool(distance > largest * torch.finfo(second.dtype).eps ** 0.5)


def takes(language_model: Any, argument: str) -> bool:
    """Return whether the model's forward has a parameter of this name."""
    return argument in inspect.signature(language_model.forward).parameters


def _is_plain(cache: Any) -> bool:
    """Return whether the cache holds only keys and values, which can be copied and continued."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in kinds for layer in cache.layers)


def context_limit(config: Any) -> int | None:
    """Return the model's context length in tokens, or ``None`` if its configuration sets none.

    Models with rotary positions run past this limit without an error, but answer badly.
    """
    text = config.get_text_config()
    values = [getattr(text, name, None) for name in LIMITS]
    return min((value for value in values if isinstance(value, int) and value > 0), default=None)


def check_context(limit: int | None, before: int, answer: int) -> None:
    """Raise if prompt and answer together exceed the language model's context length.

    Args:
        limit: Context length from :func:`context_limit`.
        before: Number of visual tokens and prompt tokens.
        answer: Number of answer tokens. The last one, its end of text, is generated and never read.

    Raises:
        InputError: They do not fit; the message states the numbers.
    """
    if limit is None or before + answer - 1 <= limit:
        return
    room = limit - before + 1
    raise InputError(
        f"{before} tokens of images and prompt and an answer of up to {answer} do not fit into the "
        f"language model's context of {limit} tokens: "
        + (f"the answer may have up to {room}" if room > 0 else "the prompt alone is too long")
    )


def read_prefix(language_model: Any, sequence: VisualSequence, shares_cache: bool) -> Prefix:
    """Run the model on images and prompts, padded on the left, if answers can share its cache.

    Raises:
        InputError: Images and prompt of a sample exceed the model's context length.
    """
    embeds, mask, _, positions = sequence
    lengths = (mask != 0).sum(1).tolist()
    limit = context_limit(language_model.config)
    check_context(limit, max(lengths, default=0), 1)
    if not (shares_cache and lengths):
        return Prefix(embeds, mask, None, None, lengths)
    out = language_model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        **last_logits(language_model, 1),
    )
    return Prefix(embeds, mask, out.past_key_values, out.logits[:, -1:], lengths)


def last_logits(language_model: Any, count: int) -> dict[str, int]:
    """Return the argument that limits the logits to the last ``count``, if the model takes it."""
    return {"logits_to_keep": count} if takes(language_model, "logits_to_keep") else {}


def answer_logits(
    language_model: Any, prefix: Prefix, ids: Tensor, mask: Tensor, count: int
) -> Tensor:
    """Compute the logits ``[B * A, T, V]`` that predict each token of the answers.

    Args:
        language_model: Model that has read ``prefix``.
        prefix: Prefix of ``B`` samples; it is not changed.
        ids: Answer tokens ``[B * A, T]``, sample by sample, padded on the right.
        mask: ``[B * A, T]``, 0 at padding.
        count: Number ``A`` of answers per sample.
    """
    before = prefix.attention_mask.repeat_interleave(count, 0)
    attended = torch.cat([before, mask[:, :-1]], 1)
    if prefix.logits is None:
        return _logits_from_start(language_model, prefix, ids, attended, count)
    first = prefix.logits.repeat_interleave(count, 0)
    if ids.shape[1] == 1:
        return first
    rest = language_model(
        input_ids=ids[:, :-1],
        attention_mask=attended,
        position_ids=(attended.cumsum(1) - 1)[:, before.shape[1] :],
        past_key_values=_repeated(prefix.cache, count),
        use_cache=True,
    ).logits
    return torch.cat([first, rest], 1)


def _logits_from_start(
    language_model: Any, prefix: Prefix, ids: Tensor, attended: Tensor, count: int
) -> Tensor:
    """Compute the same logits from whole sequences; a causal model ignores padding on the right."""
    answers = language_model.get_input_embeddings()(ids[:, :-1])
    before = prefix.inputs_embeds.repeat_interleave(count, 0)
    embeds = torch.cat([before, answers.to(before.dtype)], 1)
    lengths = [length for length in prefix.lengths for _ in range(count)]
    starts = [before.shape[1] - length for length in lengths]
    embeds, attended = (_without_start(rows, starts) for rows in (embeds, attended))
    kept = embeds.shape[1] - min(lengths) + 1  # from the last token of the shortest prefix on
    logits = language_model(
        inputs_embeds=embeds,
        attention_mask=attended,
        use_cache=False,
        **last_logits(language_model, kept),
    ).logits[:, -kept:]
    offsets = torch.tensor(lengths, device=ids.device)[:, None] - min(lengths)
    where = offsets + torch.arange(ids.shape[1], device=ids.device)  # [B * A, T]
    where = where.clamp(max=kept - 1)  # changes padding only
    return logits.gather(1, where[..., None].expand(-1, -1, logits.shape[-1]))


def _without_start(rows: Tensor, starts: Sequence[int]) -> Tensor:
    """Return each row from its start on, padded on the right with zeros."""
    cut = [row[start:] for row, start in zip(rows, starts, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(cut, batch_first=True)


def _repeated(cache: Any, count: int) -> Any:
    """Return a cache with every row repeated ``count`` times; ``cache`` is not changed."""
    repeated = copy.copy(cache)
    repeated.layers = [copy.copy(layer) for layer in cache.layers]
    repeated.batch_repeat_interleave(count)
    return repeated


def token_log_probs(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Compute each id's log-probability from ``[R, T, V]``: fp32 ``[R, T]``, zero at padding."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none")
    return -(losses.view_as(ids) * mask)
