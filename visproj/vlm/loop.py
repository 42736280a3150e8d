"""The training loop: AdamW, a cosine schedule, checkpoints to resume from to the bit, and logs."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import random
import statistics
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from visproj.errors import InputError, NotFiniteError
from visproj.files import replacing, save_bin
from visproj.progress import SILENT, Progress
from visproj.vlm.model import VisualLanguageModel

STATE_NAME = "resume.pt"
METRICS_NAME = "metrics.csv"
BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class TrainingSettings:
    """What decides a training run besides its models and data.

    Attributes:
        epochs: How often every training view is seen.
        learning_rate: Its peak, after the warm-up; falls to zero along a cosine.
        batch: Views a forward.
        accumulate: Forwards an optimiser step.
        warmup: Part of the steps in which the learning rate rises linearly.
        weight_decay: Of AdamW.
        clip: Largest norm of the gradient.
        dtype: ``bfloat16`` trains under autocast; ``float32`` does not.
        save_every: Optimiser steps between checkpoints.
        seed: Of the projector's first weights and the order of the data.
    """

    epochs: int = 3
    learning_rate: float = 2e-3
    batch: int = 2
    accumulate: int = 1
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    dtype: str = "bfloat16"
    save_every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if not 0 <= self.warmup < 1:
            raise InputError(f"warmup must be at least 0 and less than 1, got {self.warmup}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be at least 0 and less than 2**63, got {self.seed}")
        if self.dtype not in ("bfloat16", "float32"):
            raise InputError(f"dtype must be bfloat16 or float32, got {self.dtype!r}")

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context that forwards run in."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")


class TrainingData(NamedTuple):
    """Features of each photograph's training views, ``[V, 1 + S, C]``, and its captions."""

    views: Sequence[Tensor]
    captions: Sequence[Sequence[str]]
    prompt: str


class Step(NamedTuple):
    """One row of the log: an optimiser step, its mean loss a token and what led to it.

    ``images_per_second`` is the one value that another run of the same seed will not repeat.
    """

    step: int
    epoch: int
    loss: float
    learning_rate: float
    gradient_norm: float
    images_per_second: float


@dataclass
class TrainingRun:
    """Steps done so far, and the loss on held-out views where it was measured.

    Attributes:
        steps: The log.
        held_out: Optimiser steps done and loss.
        total: Steps of the whole run.
    """

    steps: list[Step] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    total: int = 0

    def note(self) -> str:
        """How it goes: the means of the last ten steps, and the last held-out loss."""
        recent = self.steps[-10:]
        loss = statistics.mean(step.loss for step in recent)
        speed = statistics.mean(step.images_per_second for step in recent)
        held_out = f", held-out {self.held_out[-1][1]:.3f}" if self.held_out else ""
        return f"loss {loss:.3f}, {speed:.2f} images/s{held_out}"


def train(
    model: VisualLanguageModel,
    data: TrainingData,
    settings: TrainingSettings,
    folder: Path,
    *,
    identity: Mapping[str, str] | None = None,
    save: Callable[[], object] = lambda: None,
    evaluate: Callable[[], float] | None = None,
    progress: Progress = SILENT,
    on_step: Callable[[Step, TrainingRun], None] = lambda step, run: None,
) -> TrainingRun:
    """Train the model's projector, from the beginning or from where ``folder`` left off.

    ``folder`` gets ``metrics.csv``, ``tensorboard/`` and ``resume.pt`` with weights, optimiser and
    log, replaced in one step: a run that is killed goes on from there and, on a CPU, ends with the
    weights that it would have had, to the bit. A run may go on for more epochs than it was begun
    with: the data of the first ones stays the same, and the learning rate continues on the warm-up
    and the cosine over all epochs, so that it rises where the shorter run had already lowered it.

    Args:
        model: Whose projector learns, in place.
        data: What it learns from.
        settings: How.
        folder: Where the logs and the state are.
        identity: What else has to be the same for a run to go on, by name, such as the models.
        save: Called before each checkpoint, to save the projector by itself: a run that is killed
            between the two saves it again.
        evaluate: The loss on held-out views; measured before training and after every epoch.
        progress: Receives the stage and every optimiser step, with the means of the last ten.
        on_step: Called after every optimiser step.

    Raises:
        ValueError: There is nothing to train on, or ``folder`` holds the state of another run; one
            with fewer epochs goes on.
        FloatingPointError: A loss or gradient is not finite; the message has the step. The last
            checkpoint stays as it is.
        KeyboardInterrupt: Of the user's; its text says what is kept.
        OSError: Something cannot be written; the last checkpoint stays as it is.
    """
    parameters = [p for p in model.projector.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, settings.learning_rate, BETAS, weight_decay=settings.weight_decay
    )
    schedule = list(_schedule(data, settings))
    if not schedule:
        raise InputError("no training views")
    described = {**(identity or {}), **_describe(data), **asdict(settings)}
    state = _State(model.projector, optimiser, described, folder / STATE_NAME)
    folder.mkdir(parents=True, exist_ok=True)
    lengths = [[len(model.answer_ids(text)) for text in own] for own in data.captions]
    run = state.load()
    run.total = len(schedule)
    progress.stage("training", run.total, len(run.steps))
    write_metrics(folder / METRICS_NAME, run)
    # From this step on TensorBoard hides what a killed run wrote after its last checkpoint.
    purge = len(run.steps) + 1 if run.steps else 0
    with SummaryWriter(str(folder / "tensorboard"), purge_step=purge) as board, state.kept(run):
        if evaluate and not run.held_out:
            _measure(run, evaluate, board, state)
        for number in range(len(run.steps), len(schedule)):
            rate = _learning_rate(number, len(schedule), settings)
            for group in optimiser.param_groups:
                group["lr"] = rate
            batches = schedule[number]
            begin = time.perf_counter()
            model.train()
            loss = _accumulate_gradients(model, data, lengths, settings, batches)
            norm = nn.utils.clip_grad_norm_(parameters, settings.clip).item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NotFiniteError(
                    f"step {number + 1}: the loss is {loss} and the gradient's norm {norm}; "
                    f"{state.what_is_kept}: try a lower learning rate"
                )
            optimiser.step()
            images = sum(len(batch.views) for batch in batches)
            speed = images / (time.perf_counter() - begin)
            step = Step(number + 1, batches[0].epoch, loss, rate, norm, speed)
            run.steps.append(step)
            for name, value in step._asdict().items():
                board.add_scalar(f"train/{name}", value, step.step)
            ends = number + 1 == len(schedule)
            if evaluate and (ends or schedule[number + 1][0].epoch != step.epoch):
                _measure(run, evaluate, board, state)
            if ends or step.step % settings.save_every == 0:
                board.flush()
                save()
                state.save(run)
                write_metrics(folder / METRICS_NAME, run)
            progress.advance(run.note())
            on_step(step, run)
    model.eval()
    return run


def _describe(data: TrainingData) -> dict[str, str | int]:
    """Identify a set of data by its texts and the sizes of its views."""
    texts = json.dumps([list(own) for own in data.captions])
    return {
        "prompt": data.prompt,
        "photographs": len(data.views),
        "training views": sum(map(len, data.views)),
        "captions": hashlib.sha256(texts.encode()).hexdigest()[:12],
    }


class _Batch(NamedTuple):
    """Photograph and view of each sample, and which of the photograph's captions it trains."""

    epoch: int
    views: list[tuple[int, int]]
    captions: list[list[int]]

    def trained(self) -> Iterator[tuple[int, list[int]]]:
        """Photograph and captions of each sample."""
        for (photo, _), drawn in zip(self.views, self.captions, strict=True):
            yield photo, drawn


def _schedule(data: TrainingData, settings: TrainingSettings) -> Iterator[list[_Batch]]:
    """The batches of every optimiser step, from the settings and the data's sizes alone.

    Every sample trains as many captions as the photograph with the fewest has, drawn anew.
    """
    generator = random.Random(settings.seed)
    fewest = min(map(len, data.captions), default=0)
    for epoch in range(1, settings.epochs + 1):
        order = [
            (photo, view) for photo, views in enumerate(data.views) for view in range(len(views))
        ]
        generator.shuffle(order)
        batches = []
        for start in range(0, len(order), settings.batch):
            views = order[start : start + settings.batch]
            drawn = [generator.sample(range(len(data.captions[p])), fewest) for p, _ in views]
            batches.append(_Batch(epoch, views, drawn))
        for start in range(0, len(batches), settings.accumulate):
            yield batches[start : start + settings.accumulate]


def _learning_rate(step: int, steps: int, settings: TrainingSettings) -> float:
    """Linear warm-up, then a half cosine down to zero after the last step."""
    warmup = round(settings.warmup * steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    return settings.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def _accumulate_gradients(
    model: VisualLanguageModel,
    data: TrainingData,
    lengths: Sequence[Sequence[int]],
    settings: TrainingSettings,
    batches: Sequence[_Batch],
) -> float:
    """Set the gradients of the mean loss per token of all batches of a step, and return it."""
    model.zero_grad(set_to_none=True)
    tokens = [
        sum(lengths[photo][index] for photo, drawn in batch.trained() for index in drawn)
        for batch in batches
    ]
    mean = 0.0
    for batch, count in zip(batches, tokens, strict=True):
        features = torch.stack([data.views[photo][view] for photo, view in batch.views])
        answers = [
            [data.captions[photo][index] for index in drawn] for photo, drawn in batch.trained()
        ]
        with settings.autocast(model.device):
            loss = model(features, [data.prompt] * len(answers), answers)
        part = loss * (count / sum(tokens))
        part.backward()
        mean += part.item()
    return mean


def _measure(
    run: TrainingRun, evaluate: Callable[[], float], board: SummaryWriter, state: _State
) -> None:
    loss = evaluate()
    if not math.isfinite(loss):
        raise NotFiniteError(
            f"after step {len(run.steps)}: the loss of the held-out views is {loss}; "
            f"{state.what_is_kept}: the models and photographs have to give finite numbers"
        )
    run.held_out.append((len(run.steps), loss))
    board.add_scalar("held-out/loss", loss, len(run.steps))


def write_metrics(file: Path, run: TrainingRun) -> None:
    """The log as CSV, one row a step, with the held-out loss where it was measured."""
    held_out = dict(run.held_out)
    with replacing(file) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow([*Step._fields, "held_out_loss"])
        if 0 in held_out:
            table.writerow([0, 0, *[""] * (len(Step._fields) - 2), held_out[0]])
        for step in run.steps:
            table.writerow([*step, held_out.get(step.step, "")])


class _State:
    """What a run needs to go on, in one file that is replaced whole."""

    def __init__(
        self,
        projector: nn.Module,
        optimiser: torch.optim.Optimizer,
        identity: Mapping[str, str | int | float],
        file: Path,
    ) -> None:
        self.projector = projector
        self.optimiser = optimiser
        self.identity = dict(identity)
        self.file = file
        self.saved = 0

    @property
    def what_is_kept(self) -> str:
        """In words, for whoever stops here."""
        return f"the checkpoint of step {self.saved} is kept" if self.saved else "nothing is kept"

    @contextmanager
    def kept(self, run: TrainingRun) -> Iterator[None]:
        """Give Ctrl-C in the block a text that says what is kept.

        The step under way is not finished and no checkpoint is written: the last one is whole.
        """
        try:
            yield
        except KeyboardInterrupt as stop:
            hint = ", go on with --resume" if self.saved else ""
            text = f"stopped at step {len(run.steps)}: {self.what_is_kept}{hint}"
            raise KeyboardInterrupt(text) from stop

    def save(self, run: TrainingRun) -> None:
        with replacing(self.file) as partial:
            save_bin(
                {
                    "identity": self.identity,
                    "projector": self.projector.state_dict(),
                    "optimiser": self.optimiser.state_dict(),
                    "steps": [tuple(step) for step in run.steps],
                    "held_out": run.held_out,
                },
                partial,
            )
        self.saved = len(run.steps)

    def load(self) -> TrainingRun:
        if not self.file.exists():
            return TrainingRun()
        state = self._read()
        for name, value in self.identity.items():
            before = state["identity"].get(name)
            if before == value or (name == "epochs" and _grown(before, value)):
                continue
            raise InputError(f"{self.file} is of a run with {name} {before}, not {value}")
        try:
            self.projector.load_state_dict(state["projector"])
            self.optimiser.load_state_dict(state["optimiser"])
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"{self.file} is of another projector: its weights do not fit"
            ) from error
        self.saved = len(state["steps"])
        return TrainingRun([Step(*row) for row in state["steps"]], list(state["held_out"]))

    def _read(self) -> dict[str, Any]:
        try:
            with zipfile.ZipFile(self.file) as archive:
                damaged = archive.testzip()  # torch.load does not look at the checksums
            if damaged is None:
                state = torch.load(self.file, "cpu", weights_only=True)
                if state.keys() == {"identity", "projector", "optimiser", "steps", "held_out"}:
                    return state
        except (zipfile.BadZipFile, RuntimeError, UnpicklingError, AttributeError) as error:
            raise InputError(f"{self.file} is damaged: remove it to start again") from error
        raise InputError(f"{self.file} is damaged: remove it to start again")


def _grown(before: object, after: object) -> bool:
    return isinstance(before, int) and isinstance(after, int) and before < after
