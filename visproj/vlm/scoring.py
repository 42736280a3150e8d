"""Does the language model know which photograph it is shown? Retrieval of its captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from visproj.errors import InputError
from visproj.progress import SILENT, Progress
from visproj.vlm.model import VisualLanguageModel
from visproj.vlm.prompts import check_texts

ANSWERS = 32  # scored together: their logits are as wide as the vocabulary


class Retrieval(NamedTuple):
    """How often the best-scoring caption is one of the photograph's own.

    Attributes:
        views: How many were scored.
        captions: Among how many captions.
        rate: Part of the views whose best caption belongs to their photograph.
        control: The same after a random permutation of the views' photographs.
        interval: Where 95 % of such controls lie if the pictures carry nothing: the central
            binomial interval of chance, as a part of the views.
    """

    views: int
    captions: int
    rate: float
    control: float
    interval: tuple[float, float]


@torch.inference_mode()
def caption_scores(
    model: VisualLanguageModel,
    views: Sequence[Tensor],
    captions: Sequence[Sequence[str]],
    prompt: str,
    progress: Progress = SILENT,
) -> tuple[Tensor, Tensor]:
    """Log-probability of every caption given every view.

    A view's image and prompt pass through the language model once, where captions can share its
    key-value cache.

    Args:
        model: Whose projector is judged.
        views: Features ``[V, S, C]`` of each photograph's views.
        captions: The captions of each photograph.
        prompt: What the model is asked about each view.
        progress: Advances once per view.

    Returns:
        Sums of log-probabilities, fp32 ``[views, captions]``, photograph by photograph, and the
        number of tokens of each caption, ``[captions]``.

    Raises:
        InputError: The views are of another number of photographs than the captions.
    """
    _check_photographs(views, captions)
    everything = [caption for own in captions for caption in own]
    lengths = torch.tensor([len(model.answer_ids(text)) for text in everything], dtype=torch.long)
    scores = torch.zeros(sum(map(len, views)), len(everything))
    flat = (view for features in views for view in features)
    for row, view in zip(scores, flat, strict=True):
        row[:] = _scores(model, view, everything, prompt)
        progress.advance()
    return scores, lengths


def _scores(
    model: VisualLanguageModel, view: Tensor, captions: Sequence[str], prompt: str
) -> Tensor:
    prefix = model.read(view[None], [prompt])
    parts = [
        model.answer_log_probs(prefix, [captions[start : start + ANSWERS]])[0][0].sum(-1)
        for start in range(0, len(captions), ANSWERS)
    ]
    return torch.cat(parts) if parts else torch.zeros(0)


def _check_photographs(views: Sequence[Tensor], captions: Sequence[Sequence[str]]) -> None:
    if len(views) != len(captions):
        raise InputError(f"views of {len(views)} photographs, captions of {len(captions)}")
    for own in captions:
        check_texts(own, "the captions of a photograph")


def retrieval(
    scores: Tensor, lengths: Tensor, view_of: Tensor, caption_of: Tensor, seed: int
) -> Retrieval:
    """Find each view's caption by its mean log-probability per token.

    Chance is what the captions that were picked would meet among randomly assigned photographs.

    Args:
        scores: ``[views, captions]``.
        lengths: ``[captions]``.
        view_of: The photograph of each view.
        caption_of: The photograph of each caption.
        seed: Draws the permutation of the control.

    Raises:
        InputError: There are no views or no captions.
    """
    from scipy.stats import binom

    if not scores.numel():
        raise InputError("there are no views or no captions to score")

    picked = caption_of[(scores / lengths).argmax(1)]
    generator = torch.Generator().manual_seed(seed)
    permuted = view_of[torch.randperm(len(view_of), generator=generator)]
    chance = (picked[:, None] == view_of).double().mean().item()
    low, high = binom.interval(0.95, len(view_of), chance)
    return Retrieval(
        views=len(view_of),
        captions=len(caption_of),
        rate=(picked == view_of).double().mean().item(),
        control=(picked == permuted).double().mean().item(),
        interval=(float(low) / len(view_of), float(high) / len(view_of)),
    )
