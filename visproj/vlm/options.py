"""Options of ``visproj train``, and the report of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from visproj.errors import InputError
from visproj.projectors import KINDS
from visproj.vlm.language import IMAGE_TOKEN
from visproj.vlm.samples import Columns
from visproj.vlm.scoring import Retrieval

PROMPT = "Describe the photograph."


@dataclass(frozen=True)
class TrainingOptions:
    """Options of ``visproj train`` for models, data and output, as on its command line.

    Attributes:
        kind: ``baseline``, ``vit`` or ``perceiver``; ``None`` is the kind of ``from_projector``, or
            a Perceiver without one.
        out: Folder for the projector, checkpoints and logs.
        data: A file, a folder, a pattern or a name on the hub; ``None`` is the built-in set.
        images: Folder that image paths are relative to; ``None`` is the data's folder.
        columns: Names of columns that are not the usual ones.
        split: Split to train on.
        held_out: Fraction of the samples, or name of a split, on which the loss is measured.
            ``None`` measures no loss, except on the built-in set, where other views of the training
            photographs are held out.
        views: Random crops per image; 1 gives the encoder the whole image. ``None`` is 14 for the
            built-in set and 1 for others.
        streaming: Stream a data set from the hub instead of downloading it first.
        cache_features: Features to keep on disk, in GiB; ``None`` is 1 for the built-in set and 0
            for others.
        encoder: A model for transformers, a folder that ``visproj extract`` wrote, or a name on the
            hub; ``None`` is the offline encoder.
        language_model: Name on the hub, directory or GGUF file; ``None`` is the offline model.
        prompt: The question that captions answer.
        queries: Side of a Perceiver's square of queries, which has ``queries**2`` of them.
        max_length: Largest number of tokens per sample, visual tokens included; longer samples are
            cut. ``None`` is the language model's limit.
        from_projector: Projector whose weights training starts from.
        resume: Continue from the last complete checkpoint in ``out``.
        retrieval: Score captions against held-out samples after training; ``None`` does so for the
            built-in set. It is skipped if weights are sharded, because one process does it alone.
        strict: Stop at the first sample that cannot be used.
    """

    out: Path
    kind: str | None = None
    data: str | None = None
    images: Path | None = None
    columns: Columns = field(default_factory=Columns)
    split: str = "train"
    held_out: float | str | None = None
    views: int | None = None
    streaming: bool = False
    cache_features: float | None = None
    encoder: str | None = None
    language_model: str | None = None
    prompt: str = PROMPT
    queries: int = 6
    max_length: int | None = None
    from_projector: Path | None = None
    resume: bool = False
    retrieval: bool | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise InputError(f"unknown kind {self.kind!r}, choose from {', '.join(KINDS)}")
        for name in ("queries", "views", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.prompt.count(IMAGE_TOKEN) > 1:
            raise InputError(f"the prompt {self.prompt!r} has more than one {IMAGE_TOKEN}")
        if isinstance(self.held_out, float) and not 0 < self.held_out < 1:
            raise InputError(f"held_out must be between 0 and 1, got {self.held_out}")
        if self.cache_features is not None and not 0 <= self.cache_features < float("inf"):
            raise InputError(f"cache_features must be at least 0 GiB, got {self.cache_features}")

    @property
    def is_built_in(self) -> bool:
        """True if training uses the 15 built-in photographs."""
        return self.data is None


@dataclass(frozen=True)
class TrainingReport:
    """The results of a training run.

    Attributes:
        kind: Kind of the projector.
        samples: Number of training samples, each view counted; ``None`` for a stream.
        steps: Optimiser steps of the whole run.
        parameters: Number of parameters that were trained.
        dtype: Dtype of the training.
        untrained_loss: Mean loss per answer token on held-out samples before training, in nats;
            ``None`` if none are held out.
        trained_loss: The same loss after training.
        retrieval: Result of the caption retrieval and its control; ``None`` if it was not run.
        seconds: Seconds per stage.
        peak_mib: Peak resident memory of the process in MiB; ``None`` if the system does not
            report it.
    """

    kind: str
    samples: int | None
    steps: int
    parameters: int
    dtype: str
    untrained_loss: float | None
    trained_loss: float | None
    retrieval: Retrieval | None
    seconds: dict[str, float]
    peak_mib: float | None


def part_or_split(held_out: str | None) -> float | str | None:
    """Return ``--held-out`` as a fraction if it is a number, otherwise as the name of a split."""
    try:
        return None if held_out is None else float(held_out)
    except ValueError:
        return held_out
