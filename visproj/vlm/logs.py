"""What a training run says while it runs: progress, and the log as CSV."""

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
    """Write Trainer's log as CSV: a row per entry with a loss, empty where a value was not logged.

    Losses are means per answer token in nats, ``grad_norm`` is the norm before clipping.
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
    """Keeps ``metrics.csv`` in the run's folder.

    It begins with what the checkpoint's log has, so that what a killed run logged after its last
    checkpoint is not in it twice.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write what was logged before the checkpoint."""
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
    """Has the loss of held-out samples measured after each epoch, or every few steps.

    It is measured before a checkpoint of the same step is written: Trainer's own strategy for
    epochs does so afterwards, and a run that goes on from the checkpoint would lack it.

    Args:
        steps: Optimiser steps in between; 0 measures after each epoch.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_train_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any
    ) -> None:
        """Count the steps of an epoch; a stream has none."""
        if not self._steps and hasattr(train_dataloader.dataset, "__len__"):
            self._steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for it, also after the last step."""
        ends = state.global_step >= state.max_steps
        if ends or (self._steps and state.global_step % self._steps == 0):
            control.should_evaluate = True


class ProgressLog(TrainerCallback):
    """Shows the loss, the images per second of all processes and the time left.

    Args:
        progress: Receives the stage and every optimiser step.
        images: Returns how many images this process has trained on.
    """

    def __init__(self, progress: Progress, images: Callable[[], int]) -> None:
        self._progress = progress
        self._images = images
        self._begin = (0.0, 0)  # of the step: time, images
        self._recent: deque[tuple[float, int]] = deque(maxlen=10)  # steps: seconds, images
        self._notes: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin the stage where the checkpoint left off."""
        if state.is_world_process_zero:
            self._progress.stage("training", state.max_steps, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note when the step began: evaluations and checkpoints are not counted."""
        self._begin = time.perf_counter(), self._images()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Take the losses."""
        if "loss" in logs:
            self._notes["loss"] = f"loss {logs['loss']:.3f}"
        if "eval_loss" in logs:
            self._notes["held-out"] = f"held-out {logs['eval_loss']:.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance by a step."""
        begin, images = self._begin
        self._recent.append((time.perf_counter() - begin, self._images() - images))
        seconds, images = map(sum, zip(*self._recent, strict=True))
        speed = images * args.world_size / seconds
        if state.is_world_process_zero:
            self._progress.advance(", ".join([*self._notes.values(), f"{speed:.2f} images/s"]))
