"""Caption retrieval: does a caption's score depend on the photograph that the model is shown?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from visproj.errors import InputError
from visproj.progress import SILENT, Progress
from visproj.vlm.model import VisualLanguageModel
from visproj.vlm.prompts import check_texts

ANSWERS = 32  # captions per forward pass; their logits are as wide as the vocabulary


class Retrieval(NamedTuple):
    """The results of caption retrieval.

    Attributes:
        views: Number of views.
        captions: Number of captions that each view was scored against.
        rate: Fraction of the views whose best-scoring caption belongs to their photograph.
        control: The same fraction after a random permutation of the views' photographs.
        interval: Lower and upper end of the central 95 % binomial interval of the control, if
            scores do not depend on the photograph; fractions of the views.
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
    """Compute the log-probability of every caption given every view.

    The language model reads a view's image and prompt once, if captions can share its key-value
    cache.

    Args:
        model: Model whose projector is evaluated.
        views: Features ``[V, S, C]`` of each photograph's views.
        captions: The captions of each photograph.
        prompt: The question that the model is asked about each view.
        progress: Progress that advances once per view.

    Returns:
        Sums of log-probabilities, fp32 ``[views, captions]``, in the order of the photographs, and
        the number of tokens of each caption, int64 ``[captions]``.

    Raises:
        InputError: ``views`` and ``captions`` are of different numbers of photographs.
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
        raise InputError(
            "views and captions must be of the same photographs, got views of "
            f"{len(views)} photographs and captions of {len(captions)}"
        )
    for own in captions:
        check_texts(own, "the captions of a photograph")


def retrieval(
    scores: Tensor, lengths: Tensor, view_of: Tensor, caption_of: Tensor, seed: int
) -> Retrieval:
    """Pick each view's caption with the highest mean log-probability per token, and rate the picks.

    Chance is the expected rate of the picked captions if photographs were assigned at random.

    Args:
        scores: Sums of log-probabilities, ``[views, captions]``.
        lengths: Number of tokens of each caption, ``[captions]``.
        view_of: Index of each view's photograph, ``[views]``.
        caption_of: Index of each caption's photograph, ``[captions]``.
        seed: Seed of the control's permutation.

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
