"""Extraction of the vision encoder of a Qwen-VL checkpoint into a directory of its own."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from visproj.errors import InputError
from visproj.files import Entry, parse_dtype
from visproj.progress import SILENT, Progress
from visproj.qwen_vl.checkpoint import Checkpoint, open_checkpoint
from visproj.qwen_vl.config import QwenVisionConfig
from visproj.qwen_vl.keys import expected_shapes
from visproj.qwen_vl.storage import check_destination, write_encoder

FORMATS = ("safetensors", "bin")


@dataclass(frozen=True)
class ExtractionSummary:
    """The summary of an extraction.

    Attributes:
        source: The directory or hub id that was read.
        destination: The directory that was written.
        files: Names of the files in it.
        config: The encoder's architecture.
        dtypes: Dtypes of the written tensors, such as ``bfloat16``.
        tensors: Number of written tensors.
        parameters: Number of elements of the written tensors.
        bytes_read: Bytes of tensor data that were read.
        checkpoint_bytes: Bytes of the checkpoint's weight files; ``None`` if they are not known.
        seconds: Wall-clock time, downloads included.
        notes: Assumptions that were made.
    """

    source: str
    destination: Path
    files: tuple[str, ...]
    config: QwenVisionConfig
    dtypes: tuple[str, ...]
    tensors: int
    parameters: int
    bytes_read: int
    checkpoint_bytes: int | None
    seconds: float
    notes: tuple[str, ...]


def extract_vision_encoder(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    format: str = "safetensors",
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> ExtractionSummary:
    """Write the vision encoder of a Qwen-VL checkpoint as a model of its own.

    Keeps the tensors whose names begin with ``transformer.visual.``, except
    ``transformer.visual.proj``. Only the shards that hold them are opened (and, from the hub,
    downloaded), and tensors are copied one at a time: the language model is never in memory, and no
    code of the checkpoint is executed.

    The destination gets ``model.safetensors``, ``config.json``, ``preprocessor_config.json`` and,
    with ``format="bin"``, also the ``pytorch_model.bin`` that DeepSpeed-VisualChat loads. It is
    written completely or not at all.

    Args:
        source: A directory or a hub id; safetensors or ``.bin``, single or sharded, with or without
            an index.
        destination: A directory that does not exist yet.
        dtype: ``float32``, ``float16``, ``bfloat16`` or ``float64``; ``None`` keeps the stored
            dtypes.
        revision: Branch, tag or commit on the hub.
        format: ``"safetensors"``, or ``"bin"`` for both.
        overwrite: Replace an existing encoder at the destination.
        progress: Receives the progress of opening the checkpoint and of writing the tensors.

    Returns:
        An :class:`ExtractionSummary`.

    Raises:
        ConnectionError: If a file cannot be downloaded from the hub.
        FileExistsError: If the destination exists, and is not an encoder or ``overwrite`` is false.
        FileNotFoundError: If the source, its weights or a shard is missing.
        OSError: If the destination cannot be written.
        ValueError: If a file is damaged; if the visual tensors are absent, incomplete, misshapen or
            too large for ``dtype``; if an argument is unknown.

    Source: DeepSpeed-VisualChat ``helper/extract_qwen_vl.py``, which loads the whole model.
    """
    started = time.perf_counter()
    wanted = parse_dtype(dtype)
    if format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    final = Path(destination).resolve()
    check_destination(final, overwrite)
    progress.stage("opening the checkpoint")
    checkpoint = open_checkpoint(source, revision)
    entries = _entries(checkpoint, wanted)
    progress.stage("copying tensors", len(entries))
    files = write_encoder(
        final,
        checkpoint.config,
        entries,
        with_bin=format == "bin",
        overwrite=overwrite,
        on_written=lambda entry: progress.advance(),
    )
    return ExtractionSummary(
        source=checkpoint.name,
        destination=final,
        files=tuple(files),
        config=checkpoint.config,
        dtypes=tuple(sorted({str(entry.dtype).removeprefix("torch.") for entry in entries})),
        tensors=len(entries),
        parameters=sum(torch.Size(entry.shape).numel() for entry in entries),
        bytes_read=sum(checkpoint.tensor(key).nbytes for key in checkpoint.names),
        checkpoint_bytes=checkpoint.total_bytes,
        seconds=time.perf_counter() - started,
        notes=checkpoint.notes,
    )


def _entries(checkpoint: Checkpoint, dtype: torch.dtype | None) -> list[Entry]:
    """Return entries for the encoder's tensors, in the order of the table of keys."""
    keys = {name: key for key, name in checkpoint.names.items()}
    entries = []
    for name, shape in expected_shapes(checkpoint.config).items():
        key = keys[name]
        stored = checkpoint.tensor(key).dtype
        entries.append(Entry(name, dtype or stored, shape, partial(checkpoint.tensor, key)))
    return entries


def render_summary(summary: ExtractionSummary) -> str:
    """Return the summary as a few lines of text."""
    config = summary.config
    read = f"{summary.bytes_read / 2**20:,.1f} MiB"
    if summary.checkpoint_bytes is None:
        whole = "a checkpoint of unknown size"
    else:
        share = summary.bytes_read / max(1, summary.checkpoint_bytes)
        whole = f"{summary.checkpoint_bytes / 2**20:,.1f} MiB in the checkpoint ({share:.1%})"
    lines = [
        f"{summary.source} -> {summary.destination}",
        f"files: {', '.join(summary.files)}",
        f"tensors: {summary.tensors:,}, parameters: {summary.parameters:,}, "
        f"{', '.join(summary.dtypes)}",
        f"encoder: {config.layers} layers, width {config.width}, {config.heads} heads, "
        f"{config.image_size} px -> {config.n_queries} tokens of {config.output_dim}",
        f"read: {read} of {whole}",
        f"time: {summary.seconds:.1f} s",
        *(f"note: {note}" for note in summary.notes),
    ]
    return "\n".join(lines)
