"""The visual tensors of a full checkpoint, in a directory or on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from visproj.checkpoints import Files, find_tensors, open_files
from visproj.contents import a_few, refuse_placeholders
from visproj.errors import InputError
from visproj.files import TensorFile, read_json_object
from visproj.qwen_vl.config import CONFIG_NAME, QwenVisionConfig
from visproj.qwen_vl.keys import check_shapes, config_from_shapes, encoder_key


@dataclass(frozen=True)
class Checkpoint:
    """The visual part of a full checkpoint, opened but not read.

    Attributes:
        name: The directory or hub id.
        tensors: The mapped file of every checkpoint key that belongs to the encoder.
        names: The encoder's name for each of these keys.
        config: The architecture.
        config_assumed: Whether the architecture was read from shapes alone.
        total_bytes: Bytes of the checkpoint's weight files, if known.
        notes: Assumptions that were made.
    """

    name: str
    tensors: dict[str, TensorFile]
    names: dict[str, str]
    config: QwenVisionConfig
    config_assumed: bool
    total_bytes: int | None
    notes: tuple[str, ...]

    def tensor(self, key: str) -> Tensor:
        """Return the mapped tensor of a checkpoint key."""
        return self.tensors[key].tensor(key)


def open_checkpoint(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Open the shards of a Qwen-VL checkpoint that hold visual tensors, and only these.

    Args:
        source: A directory, or a hub id.
        revision: Branch, tag or commit on the hub.

    Raises:
        ConnectionError: If a file cannot be downloaded from the hub.
        FileNotFoundError: If there is no such directory, no weights in it, or a shard is missing.
        ValueError: If a file is damaged, or if the visual tensors are absent, incomplete or
            misshapen.
    """
    files = open_files(source, revision)
    block = _visual_block(files)
    tensors, total_bytes, first_keys = find_tensors(files, lambda key: "visual" in key)
    if not tensors:
        raise InputError(
            f"{files.name} has no keys that contain 'visual', so it is not a Qwen-VL checkpoint; "
            f"the first keys are {a_few(first_keys)}"
        )
    return _check(files.name, tensors, block, total_bytes)


def _visual_block(files: Files) -> dict[str, Any] | None:
    path = files.fetch(CONFIG_NAME)
    if path is None:
        return None
    try:
        block = read_json_object(path).get("visual")
    except ValueError as error:
        raise InputError(f"{files.name}: {error}") from error
    if block is not None and not isinstance(block, dict):
        raise InputError(
            f"{files.name}: visual in {CONFIG_NAME} is a {type(block).__name__}, not an object"
        )
    return block


def _check(
    name: str,
    tensors: dict[str, TensorFile],
    block: dict[str, Any] | None,
    total_bytes: int | None,
) -> Checkpoint:
    """Check names and shapes against the architecture; the error says what differs."""
    names: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for key, file in tensors.items():
        short = encoder_key(key)
        if short is None:
            continue
        if short in shapes:
            raise InputError(f"{name} holds {short} twice, once as {key}")
        names[key] = short
        shapes[short] = tuple(file.tensor(key).shape)
    notes = []
    refuse_placeholders(shapes, name)
    try:
        if block is None:
            config = config_from_shapes(shapes)
            notes.append(
                f"no visual block in {CONFIG_NAME}: architecture read from the tensors' shapes, "
                f"assuming {config.heads} heads and images of {config.image_size} px"
            )
        else:
            config = QwenVisionConfig.from_visual_block(block)
        check_shapes(shapes, config)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
    dtypes = sorted({str(file.tensor(key).dtype) for key, file in tensors.items() if key in names})
    if len(dtypes) > 1:
        notes.append(
            f"the tensors have several dtypes ({', '.join(dtypes)}): pass dtype to write them in "
            "one"
        )
    return Checkpoint(name, tensors, names, config, block is None, total_bytes, tuple(notes))
