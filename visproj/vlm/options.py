"""What ``visproj train`` is asked for, and what it reports."""

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
    """What ``visproj train`` is asked for; the command line says the same of each.

    Attributes:
        kind: ``baseline``, ``vit`` or ``perceiver``; ``None`` is that of ``from_projector``, else
            a Perceiver.
        out: Folder for the projector, checkpoints and logs.
        data: A file, a folder, a pattern or a name on the hub; ``None`` is the built-in set.
        images: Folder that image paths are relative to; ``None`` is that of the data.
        columns: Names of columns that are not the usual ones.
        split: Split to train on.
        held_out: Part of the samples, or the name of a split, whose loss is measured; ``None``
            measures none, and other views of the photographs of the built-in set.
        views: Views of each image; 1 shows what the encoder sees of it; ``None`` is 14 for the
            built-in set and 1 for others.
        streaming: Read a hub's data set as it comes.
        cache_features: GiB of features to keep on disk; ``None`` is 1 for the built-in set and
            else 0.
        encoder: A model for transformers, what ``visproj extract`` wrote, or a name on the hub;
            ``None`` the offline one.
        language_model: Name on the hub, directory or GGUF file; ``None`` the offline one.
        prompt: The question that captions answer.
        queries: A Perceiver has this number squared.
        max_length: Tokens of a sample, visual ones included; ``None`` is what the language model
            reads.
        from_projector: Checkpoint whose weights training begins with.
        resume: Go on from the last whole checkpoint in ``out``.
        retrieval: Score captions against held-out samples afterwards; ``None`` does so for the
            built-in set. The first process does it alone: not where weights are sharded.
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
    queries: int = 8
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
        """Whether the 15 photographs are trained on."""
        return self.data is None


@dataclass(frozen=True)
class TrainingReport:
    """What came of it.

    Attributes:
        kind: Of the projector.
        samples: Training samples, each view for itself; ``None`` of a stream.
        steps: Optimiser steps of the whole run.
        parameters: That were trained.
        dtype: That it was trained in.
        untrained_loss: Mean per token of the held-out samples' answers, before training; ``None``
            where none are held out.
        trained_loss: The same afterwards.
        retrieval: Whether the right caption is found, and its control; ``None`` if not asked for.
        seconds: By stage.
        peak_mib: Largest resident memory of the process so far; ``None`` where the system does
            not say.
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
    """A part between 0 and 1, or the name of a split."""
    try:
        return None if held_out is None else float(held_out)
    except ValueError:
        return held_out
