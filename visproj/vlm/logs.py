"""Trainer callbacks: the progress line, the log as CSV, and the loss of held-out samples."""

from __future__ import annotations

import csv
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from visproj.files import replacing
from visproj.progress import Progress

METRICS_NAME = "metrics.csv"
COLUMNS = ("step", "epoch", "loss", "learning_rate", "grad_norm", "eval_loss")


def write_metrics(file: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write Trainer's log as CSV, with one row per entry that has a loss.

    Losses are means per answer token in nats. ``grad_norm`` is the norm before clipping. A value
    that was not logged is empty.
    """
    with replacing(file) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(_row(entry) for entry in history if _is_measured(entry))


def _is_measured(entry: Mapping[str, Any]) -> bool:
    return "loss" in entry or "eval_loss" in entry


def _row(entry: Mapping[str, Any]) -> list[Any]:
    return [entry.get(name, "") for name in COLUMNS]


class CsvLog(TrainerCallback):
    """A callback that writes ``metrics.csv`` in the run's folder.

    A resumed run starts the file anew from the checkpoint's log. Steps that were logged after the
    checkpoint, and are now run again, are therefore not in it twice.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the entries that were logged before the checkpoint."""
        if state.is_world_process_zero:
            write_metrics(Path(args.output_dir, METRICS_NAME), state.log_history)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Append the last entry."""
        entry = state.log_history[-1]
        if not state.is_world_process_zero or not _is_measured(entry):
            return
        file = Path(args.output_dir, METRICS_NAME)
        with file.open("a", encoding="utf-8", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerow(_row(entry))


class HeldOutLoss(TrainerCallback):
    """A callback that requests the held-out loss after each epoch, or every few steps.

    The loss is measured before the checkpoint of the same step is written. Trainer's own strategy
    for epochs measures it afterwards, and a run resumed from that checkpoint would lack it.

    Args:
        steps: Optimiser steps between two measurements; 0 measures after each epoch.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_train_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any
    ) -> None:
        """Count the optimiser steps of an epoch; a stream has no epochs."""
        if not self._steps and hasattr(train_dataloader.dataset, "__len__"):
            self._steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Request the evaluation when it is due, and after the last step."""
        ends = state.global_step >= state.max_steps
        if ends or (self._steps and state.global_step % self._steps == 0):
            control.should_evaluate = True


class ProgressLog(TrainerCallback):
    """A callback that shows the losses, the images per second of all processes and the time left.

    Args:
        progress: Progress that receives the stage and every optimiser step.
        images: Function that returns the number of images that this process has trained on.
    """

    def __init__(self, progress: Progress, images: Callable[[], int]) -> None:
        self._progress = progress
        self._images = images
        self._begin = (0.0, 0)  # when the step began: time, images
        self._recent: deque[tuple[float, int]] = deque(maxlen=10)  # per step: seconds, images
        self._notes: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin the stage at the checkpoint's step."""
        if state.is_world_process_zero:
            self._progress.stage("training", state.max_steps, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note when the step began, so that evaluations and checkpoints are not timed."""
        self._begin = time.perf_counter(), self._images()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keep the losses for the progress line."""
        if "loss" in logs:
            self._notes["loss"] = f"loss {logs['loss']:.3f}"
        if "eval_loss" in logs:
            self._notes["held-out"] = f"held-out {logs['eval_loss']:.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance the progress by one step."""
        begin, images = self._begin
        self._recent.append((time.perf_counter() - begin, self._images() - images))
        seconds, images = map(sum, zip(*self._recent, strict=True))
        speed = images * args.world_size / seconds
        if state.is_world_process_zero:
            self._progress.advance(", ".join([*self._notes.values(), f"{speed:.2f} images/s"]))
