"""Settings of a training run: its processes, its dtype, and Trainer's arguments for both."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from visproj.errors import InputError, MissingPackageError
from visproj.vlm.run_folder import PROCESS_COUNTS

if TYPE_CHECKING:
    from transformers import TrainingArguments

BETAS = (0.9, 0.99)
DTYPES = ("auto", "bfloat16", "float32")
ACCELERATE = "ACCELERATE_"
ENGINES = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED"}


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training run other than its models and data.

    Attributes:
        epochs: Passes over the training samples.
        max_steps: Number of optimiser steps, which overrides ``epochs``; -1 sets none.
        learning_rate: Peak learning rate, which decays to zero along a cosine after the warm-up.
        batch: Per-process batch size (samples).
        accumulate: Forward passes per optimiser step.
        warmup: Fraction of the optimiser steps in which the learning rate rises linearly.
        weight_decay: Weight decay of AdamW.
        clip: Maximum norm of the gradient.
        dtype: ``bfloat16`` trains under autocast and loads the language model in bfloat16;
            ``float32`` uses no autocast; ``auto`` takes the faster of the two.
        save_steps: Optimiser steps between checkpoints.
        eval_steps: Optimiser steps between evaluations on held-out samples; 0 evaluates after each
            epoch.
        log_steps: Optimiser steps between log lines.
        workers: Processes that decode images, per training process.
        gradient_checkpointing: Whether to recompute the language model's activations in the
            backward pass instead of keeping them.
        by_length: Whether to batch samples of similar lengths together.
        report_to: ``csv``, and any integration that Trainer supports, such as ``tensorboard``.
        deepspeed: DeepSpeed's configuration file, for the ``deepspeed`` launcher.
        seed: Seed of the projector's initialisation and of the data order.
    """

    epochs: int = 1
    max_steps: int = -1
    learning_rate: float = 2e-3
    batch: int = 2
    accumulate: int = 1
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    dtype: str = "auto"
    save_steps: int = 100
    eval_steps: int = 0
    log_steps: int = 1
    workers: int = 2
    gradient_checkpointing: bool = False
    by_length: bool = False
    report_to: tuple[str, ...] = ("csv", "tensorboard")
    deepspeed: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "accumulate", "save_steps", "log_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("eval_steps", "workers"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not (self.max_steps == -1 or self.max_steps > 0):
            raise InputError(f"max_steps must be at least 1, or -1 for none, got {self.max_steps}")
        if not 0 <= self.weight_decay < float("inf"):
            raise InputError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if not 0 <= self.warmup < 1:
            raise InputError(f"warmup must be at least 0 and less than 1, got {self.warmup}")
        if not 0 <= self.seed < 2**32:  # NumPy's limit: Trainer seeds NumPy as well
            raise InputError(f"seed must be at least 0 and less than 2**32, got {self.seed}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context for forward passes that run outside of Trainer."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")


def launched() -> int:
    """Return the number of processes that a launcher reports in the environment, 1 without one."""
    counts = [os.environ.get(name, "").strip() for name in PROCESS_COUNTS]
    return max([int(count) for count in counts if count.isdigit()], default=1)


def is_launched_beside_the_first() -> bool:
    """Return whether a launcher started this process with a rank other than 0."""
    return os.environ.get("RANK", "0").strip() not in ("", "0")


@contextmanager
def engine_of_its_own() -> Iterator[None]:
    """Restore accelerate's settings after a run; they would decide the next run's dtype."""
    before = {name: value for name, value in os.environ.items() if name.startswith(ACCELERATE)}
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith(ACCELERATE)]:
            del os.environ[name]
        os.environ.update(before)
        if find_spec("accelerate") is not None:
            from accelerate.state import AcceleratorState, GradientState

            AcceleratorState._reset_state()
            GradientState._reset_state()


def training_arguments(
    settings: TrainingSettings, out: Path, *, evaluates: bool, resumes: bool
) -> TrainingArguments:
    """Build Trainer's arguments; this joins the process group of a launcher.

    Args:
        settings: Settings whose dtype is no longer ``auto``: see :func:`settle_dtype`.
        out: Folder of the checkpoints.
        evaluates: Whether there are held-out samples.
        resumes: Whether the run goes on from a checkpoint.

    Raises:
        InputError: A launcher has started a different number of processes than take part, or
            requests an engine that does not run on this machine.
        MissingPackageError: ``accelerate`` or, to report to it, ``tensorboard`` is not installed.
    """
    from transformers import TrainingArguments

    _check_launcher()
    # Before transformers 5 this variable sets the dtype, not the argument bf16.
    os.environ[f"{ACCELERATE}MIXED_PRECISION"] = "bf16" if settings.dtype == "bfloat16" else "no"
    for package in ("accelerate", *({"tensorboard"} & {*settings.report_to})):
        if find_spec(package) is None:
            raise MissingPackageError(package, name=package)
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    options: dict[str, Any] = {
        # Before transformers 5, warmup_steps is an integer, and warmup_ratio the fraction.
        "warmup_ratio" if "warmup_ratio" in known else "warmup_steps": settings.warmup,
        "report_to": [name for name in settings.report_to if name not in ("csv", "none")] or "none",
        "eval_on_start": evaluates and not resumes,
        "deepspeed": None if settings.deepspeed is None else str(settings.deepspeed),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": settings.dtype == "bfloat16",
    }
    try:
        args = TrainingArguments(
            output_dir=str(out),
            num_train_epochs=settings.epochs,
            max_steps=settings.max_steps,
            learning_rate=settings.learning_rate,
            per_device_train_batch_size=settings.batch,
            per_device_eval_batch_size=settings.batch,
            gradient_accumulation_steps=settings.accumulate,
            lr_scheduler_type="cosine",
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.clip,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            save_strategy="steps",
            save_steps=settings.save_steps,
            save_total_limit=2,  # the last one, and the previous one until the last is complete
            logging_steps=settings.log_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            dataloader_num_workers=settings.workers,
            dataloader_pin_memory=torch.cuda.is_available(),
            accelerator_config={"dispatch_batches": False},
            ddp_find_unused_parameters=False,
            remove_unused_columns=False,
            label_names=["labels"],
            disable_tqdm=True,
            seed=settings.seed,
            **options,
        )
        device = args.device  # joins the process group
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"training cannot start: {' '.join(str(error).split())}") from error
    if device.type == "cuda":
        args._n_gpu = 1  # one process per GPU: with more, Trainer uses nn.DataParallel
    _check_processes(args)
    return args


def _check_launcher() -> None:
    """Raise if a launcher has started several processes without setting PyTorch's ``RANK``."""
    if launched() > 1 and "RANK" not in os.environ:
        raise InputError(
            f"a launcher has started {launched()} processes, each of which would train alone: use "
            "torchrun, accelerate launch or deepspeed"
        )


def _check_processes(args: TrainingArguments) -> None:
    if launched() != args.world_size:
        raise InputError(
            f"the launcher has started {launched()} processes, but {args.world_size} take part in "
            "training: start it with torchrun, accelerate launch or deepspeed"
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available() and local > torch.cuda.device_count():
        raise InputError(
            f"{local} processes for {torch.cuda.device_count()} GPUs: start one per GPU"
        )


def check_engine(accelerator: Any, settings: TrainingSettings) -> None:
    """Raise unless the requested engine, FSDP or DeepSpeed, is the one that trains.

    accelerate ignores both on a machine without an accelerator.

    Raises:
        InputError: Another engine trains; the message names both.
    """
    wanted = [name for key, name in ENGINES.items() if os.environ.get(key, "").lower() == "true"]
    wanted += ["DEEPSPEED"] if settings.deepspeed is not None else []
    found = accelerator.distributed_type.name
    if wanted and wanted[-1] != found:
        raise InputError(
            f"{wanted[-1]} was requested but is not used: accelerate runs {found} on "
            f"{accelerator.device}. Start without {wanted[-1]}, or on a machine with GPUs"
        )


def settle_dtype(settings: TrainingSettings, out: Path) -> TrainingSettings:
    """Return the settings with ``auto`` replaced by a dtype; this joins the process group."""
    if settings.dtype != "auto":
        return settings
    one = dataclasses.replace(settings, dtype="float32")
    device = training_arguments(one, out, evaluates=False, resumes=False).device
    return dataclasses.replace(settings, dtype=faster_dtype(device))


def faster_dtype(device: torch.device) -> str:
    """Return ``bfloat16`` if matmuls with their backward pass are faster in it, else ``float32``.

    A CUDA device takes ``bfloat16`` if it supports it. On a CPU a matmul is timed in both, which
    takes a second: with AVX-512 but without AMX, fp32 is faster. With several processes, the first
    one decides for all.
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    seconds = {dtype: _seconds(dtype) for dtype in (torch.bfloat16, torch.float32)}
    chosen = [min(seconds, key=lambda dtype: seconds[dtype])]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(chosen)
    return str(chosen[0]).removeprefix("torch.")


def _seconds(dtype: torch.dtype) -> float:
    """Return the least time in s of a matmul of a language model's size, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 1024, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(1024, 1024, generator=generator).to(dtype)
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        F.linear(x, weight).sum().backward()
        times.append(time.perf_counter() - begin)
    return min(times)
