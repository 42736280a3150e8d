"""The training objective: the negative log-likelihood of answers, several of them in one row."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visproj.vlm.compose import IGNORE_INDEX, VisualSequence
from visproj.vlm.decoding import last_logits, takes


def answer_losses(language_model: Any, sequence: VisualSequence) -> tuple[Tensor, Tensor]:
    """Sum the negative log-likelihood of each row's answer tokens.

    Args:
        language_model: A causal language model that takes ``inputs_embeds``.
        sequence: ``B`` rows of ``T`` tokens, with labels. Its ``attention_mask`` holds the branch
            of each token, and 0 at padding. All later tokens attend to a token of branch 1, and
            only later tokens of the same branch to a token of branch 2, 3, .... Several answers to
            one question thus share its tokens, and each has the loss that it would have alone. A
            mask of zeros and ones is an ordinary one.

    Returns:
        Sums in nats, fp32 ``[B]``, and numbers of answer tokens, int64 ``[B]``.
    """
    embeds, branches, labels, positions = sequence
    assert labels is not None
    answers = labels != IGNORE_INDEX
    rows, columns = answers.nonzero(as_tuple=True)
    attention, before = branches, columns - 1
    if bool((branches > 1).any()):
        visible = visible_tokens(branches)
        positions = (visible.sum(-1) - 1).clamp(min=0)
        before = _tokens_before(visible)[rows, columns]
        attention = _additive(visible, embeds.dtype)
    kept = embeds.shape[1] - int(before.min()) if before.numel() else 1
    logits = language_model(
        inputs_embeds=embeds,
        attention_mask=attention,
        use_cache=False,
        **({"position_ids": positions} if takes(language_model, "position_ids") else {}),
        **last_logits(language_model, kept),
    ).logits[:, -kept:]
    chosen = logits[rows, before - (embeds.shape[1] - kept)]  # [answer tokens, V]
    losses = F.cross_entropy(chosen.float(), labels[rows, columns], reduction="none")
    zeros = torch.zeros(answers.shape, dtype=losses.dtype, device=losses.device)
    return zeros.index_put((rows, columns), losses).sum(1), answers.sum(1)


@torch.no_grad()
def takes_branches(language_model: Any) -> bool:
    """Return whether several answers in one row have the losses that each of them has alone.

    They do if the model takes ``position_ids`` and masks ``[B, 1, T, T]``. Mamba does not, nor do
    models that run FlashAttention.
    """
    table = language_model.get_input_embeddings()
    if hasattr(table.weight, "ds_id") or not takes(language_model, "position_ids"):
        return False

    def losses(ids: list[list[int]], branches: list[list[int]]) -> Tensor:
        rows = torch.tensor(ids, device=table.weight.device) % len(table.weight)
        mask = torch.tensor(branches, device=rows.device)
        labels = torch.where(mask > 1, rows, IGNORE_INDEX)
        positions = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
        return answer_losses(language_model, VisualSequence(table(rows), mask, labels, positions))[
            0
        ]

    try:
        together = losses([[0, 1, 2, 3, 4, 5]], [[1, 1, 2, 2, 3, 3]]).sum()
        apart = losses([[0, 1, 2, 3], [0, 1, 4, 5]], [[1, 1, 2, 2], [1, 1, 2, 2]]).sum()
    except Exception:  # a model's own code can raise anything
        return False
    tolerance = torch.finfo(table.weight.dtype).eps ** 0.5  # above rounding, below a mix-up
    return bool((together - apart).abs() <= tolerance * apart.abs())


def visible_tokens(branches: Tensor) -> Tensor:
    """Return which tokens each token attends to, bool ``[B, T, T]``, for branches ``[B, T]``."""
    seen, own = branches[:, None, :], branches[:, :, None]
    causal = torch.ones(branches.shape[1], branches.shape[1], device=branches.device).tril().bool()
    return causal & ((seen == 1) | (seen == own)) & (seen != 0) & (own != 0)


def _tokens_before(visible: Tensor) -> Tensor:
    """Return the index of the last earlier token that each token sees, int64 ``[B, T]``, or -1."""
    order = torch.arange(visible.shape[-1], device=visible.device)
    earlier = visible & (order < order[:, None])
    return torch.where(earlier, order, -1).amax(-1)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask ``[B, 1, T, T]`` that transformers' models add to the attention scores."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]
