"""transformers' Trainer for a projector between two frozen models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices

from visproj.errors import InputError, NotFiniteError
from visproj.vlm.checkpoints import checkpoints, mark_complete
from visproj.vlm.features import FeatureShards
from visproj.vlm.loading import encoded
from visproj.vlm.model import VisualLanguageModel
from visproj.vlm.preparing import FAULTS_SHOWN, check_faults
from visproj.vlm.pretrained import PretrainedProjector
from visproj.weights import WEIGHTS_NAME, whole_state


class ProjectorTrainer(Trainer):
    """A Trainer that saves only the projector, and stops at a non-finite loss or gradient.

    Loader workers decode images, and the training process computes their features. The loss is the
    sum over answer tokens, divided by their number in all batches of the optimiser step and all
    processes. After every process has written its part of a checkpoint, a marker file completes it.

    Args:
        projector: The model's projector, which is trained.
        shards: Features on disk; ``None`` keeps none.
        by_length: Whether batches have samples of similar lengths.
        strict: Whether to stop at the first sample that cannot be read.
        options: Arguments of ``Trainer``.
    """

    def __init__(
        self,
        projector: PretrainedProjector,
        *,
        shards: FeatureShards | None = None,
        by_length: bool = False,
        strict: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(compute_metrics=self._mean_loss, **options)
        self.projector = projector
        self.shards = shards
        self.out = Path(self.args.output_dir or "")
        self.images = 0  # that this process has trained on
        self._by_length = by_length
        self._strict = strict
        self._faults: dict[str, None] = {}
        self._reported = 0

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """Return Trainer's loader, without splitting a stream, which is this process's part."""
        dataset: Any = self.train_dataset
        if not isinstance(dataset, IterableDataset):
            return super().get_train_dataloader()
        return DataLoader(
            dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        lengths = dataset.lengths if self._by_length else None
        together = batch * self.args.world_size
        return EpochSampler(len(dataset), self.args.seed, lengths, together, self._epoch)

    def _epoch(self) -> int:
        return int(self.state.epoch or 0)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(inputs)
        self._faults |= dict.fromkeys(inputs.pop("faults"))
        contents, digests = inputs.pop("contents"), inputs.pop("digests")
        inputs["features"] = encoded(contents, digests, self._inner, self.shards)
        if self._inner.training:
            self.images += len(contents)
        return super()._prepare_inputs(inputs)

    @property
    def _inner(self) -> VisualLanguageModel:
        return self.accelerator.unwrap_model(self.model)

    # Steps

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """Run Trainer's step; raise in every process if the loss or the gradient is not finite."""
        loss = super().training_step(model, inputs, *args)
        if self.accelerator.sync_gradients:
            self._check_finite(loss)
        return loss

    def _check_finite(self, loss: Tensor) -> None:
        summed = self.accelerator.reduce(loss.float(), "sum").item()
        norm = _gradient_norm(self.projector)
        if not (math.isfinite(summed) and math.isfinite(norm)):
            raise NotFiniteError(
                f"step {self.state.global_step + 1}: the loss is {summed} and the gradient norm is "
                f"{norm}; {self.what_is_kept}: try a lower learning rate"
            )

    @property
    def what_is_kept(self) -> str:
        """Text for error messages that names the last complete checkpoint."""
        kept = checkpoints(self.out)
        return f"{kept[-1].name} is kept" if kept else "nothing is kept"

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Log as Trainer does, after a warning about samples that could not be read."""
        self._report_faults()
        super().log(logs, *args)

    def _report_faults(self) -> None:
        """Warn about samples that any process could not read, if there are new ones."""
        own = list(self._faults)[:FAULTS_SHOWN], len(self._faults)
        gathered = _gather(own)
        total = sum(count for _, count in gathered)
        if total == self._reported:
            return
        self._reported = total
        shown = [fault for faults, _ in gathered for fault in faults][:FAULTS_SHOWN]
        prepared = getattr(self.train_dataset, "prepared", None)
        size = self._seen_samples() if prepared is None else len(prepared.table)
        check_faults(shown, total, size, self._strict)

    def _seen_samples(self) -> int:
        args = self.args
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return self.state.global_step * step

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[None, Tensor, Tensor]:
        """Return ``None``, each sample's summed loss and its number of answer tokens, ``[B]``."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            out = model(**inputs)
        return None, out["losses"].detach(), out["tokens"]

    def _mean_loss(self, prediction: Any) -> dict[str, float]:
        """Return the mean loss per answer token over all samples, independent of their batches."""
        losses, tokens = prediction.predictions, prediction.label_ids
        loss = float(losses.sum()) / max(1, int(tokens.sum()))
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"after step {self.state.global_step}: the loss of the held-out samples is {loss}; "
                f"{self.what_is_kept}"
            )
        return {"loss": loss}

    # Checkpoints

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        """Save as Trainer does, then write the marker; the previous checkpoint stays until then."""
        folder = self.out / f"checkpoint-{self.state.global_step}"
        if self.shards is not None:
            self.shards.flush()
        try:
            with self._without_frozen_fragments():
                super()._save_checkpoint(*args, **options)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_complete(folder)
        except (OSError, RuntimeError) as error:  # torch's and safetensors' errors for a full disk
            reason = " ".join(str(error).split())
            raise OSError(f"cannot save {folder}: {reason}; {self.what_is_kept}") from error
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _without_frozen_fragments(self) -> Any:
        """Make DeepSpeed save checkpoints without its partitions of frozen weights."""
        if not self.is_deepspeed_enabled:
            yield
            return
        engine: Any = self.model_wrapped
        save = engine.save_checkpoint
        engine.save_checkpoint = partial(save, exclude_frozen_parameters=True)
        try:
            yield
        finally:
            del engine.save_checkpoint

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the projector: its configuration, weights and model card."""
        if self.args.should_save:
            self.projector.save_pretrained(output_dir or self.out)
            return
        with whole_state(self.projector.module):  # every process takes part in gathering it
            pass

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the projector's weights; Trainer itself loads the optimiser and the rest."""
        load_projector(self.projector, Path(resume_from_checkpoint))


class EpochSampler(Sampler[int]):
    """A sampler whose order depends only on the seed and the epoch, so that runs can be resumed.

    Args:
        size: Number of samples.
        seed: Seed of the order.
        lengths: Numbers of tokens of the samples, to put similar ones into a batch; ``None``
            shuffles all samples.
        batch: Samples per optimiser step over all processes.
        epoch: Function that returns the number of the epoch that begins.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        lengths: Sequence[int] | None,
        batch: int,
        epoch: Callable[[], int],
    ) -> None:
        self._size = size
        self._seed = seed
        self._lengths = lengths
        self._batch = batch
        self._epoch = epoch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch())
        if self._lengths is None:
            return iter(torch.randperm(self._size, generator=generator).tolist())
        return iter(get_length_grouped_indices(self._lengths, self._batch, generator=generator))


def load_projector(projector: PretrainedProjector, folder: Path) -> None:
    """Load weights from ``folder`` into a projector that FSDP may have sharded.

    Raises:
        InputError: The weights are missing, damaged or those of another projector.
    """
    try:
        state: dict[str, Any] = load_file(folder / WEIGHTS_NAME)
        options = StateDictOptions(full_state_dict=True, strict=True)
        set_model_state_dict(projector.module, state, options=options)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"cannot load the projector in {folder}: {reason}") from error


def _gradient_norm(module: nn.Module) -> float:
    """Return the gradient norm over all processes; 0 if an engine does not expose gradients."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norm: Any = nn.utils.get_total_norm(gradients)
    return getattr(norm, "full_tensor", lambda: norm)().item()


def _gather(value: Any) -> list[Any]:
    """Return the values of all processes, in every process."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered
