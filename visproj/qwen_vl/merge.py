"""Writing a trained vision encoder back into a full Qwen-VL checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from visproj.errors import InputError
from visproj.files import (
    TensorFile,
    cast,
    refuse_existing,
    save_bin,
    staged_directory,
    sync,
    tensor_bytes,
)
from visproj.qwen_vl.checkpoint import Checkpoint, open_checkpoint
from visproj.qwen_vl.config import QwenVisionConfig
from visproj.qwen_vl.keys import encoder_key
from visproj.qwen_vl.storage import open_encoder


def merge_into(
    checkpoint_dir: str | Path, encoder_dir: str | Path, destination: str | Path
) -> Path:
    """Write a copy of a full checkpoint, in which a trained encoder replaces the original one.

    Shards that hold visual tensors are rewritten with the encoder's values, cast to the
    checkpoint's dtypes; ``transformer.visual.proj`` is kept. Other weight files are hard-linked if
    the file system allows it. Both checkpoints then share them, so replace such a file instead of
    writing into it. All other files are copied. No tensor of the language model is loaded. The
    destination is written completely or not at all.

    Args:
        checkpoint_dir: A full checkpoint, as :func:`visproj.extract_vision_encoder` takes it.
        encoder_dir: A directory written by that function or by
            ``QwenVisionTransformer.save_pretrained``.
        destination: A directory that does not exist yet.

    Returns:
        The destination, resolved.

    Raises:
        FileExistsError: If the destination exists.
        FileNotFoundError: If a directory or a file in it is missing.
        OSError: If the destination cannot be written.
        ValueError: If a file is damaged, or if the encoder is not of the checkpoint's architecture
            or does not fit into its dtype.
    """
    root = Path(checkpoint_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"{checkpoint_dir} is not a directory")
    refuse_existing(Path(destination))
    checkpoint = open_checkpoint(root)
    config = QwenVisionConfig.from_pretrained(encoder_dir)
    if config.heads != checkpoint.config.heads and not checkpoint.config_assumed:
        raise InputError(
            f"the encoder has {config.heads} heads, but the checkpoint's encoder has "
            f"{checkpoint.config.heads}"
        )
    encoder = open_encoder(Path(encoder_dir), checkpoint.config)
    replaced = _by_shard(checkpoint)
    paths = list(_files(root))
    _refuse_second_encoder([p for p in paths if _is_shard(p) and p not in replaced], replaced)
    with staged_directory(destination) as staging:
        for path in paths:
            target = staging / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in replaced:
                _rewrite(path, target, replaced[path], encoder)
            elif _is_shard(path):
                _link(path, target)
            else:
                shutil.copyfile(path, target)
    return Path(destination).resolve()


def _by_shard(checkpoint: Checkpoint) -> dict[Path, dict[str, str]]:
    """Return the shards to rewrite, each with its keys to replace and the encoder's names."""
    replaced: dict[Path, dict[str, str]] = {}
    for key, name in checkpoint.names.items():
        replaced.setdefault(checkpoint.tensors[key].path, {})[key] = name
    return replaced


def _is_shard(path: Path) -> bool:
    """Return whether a file has a name that only weight files of a model have."""
    return path.suffix == ".safetensors" or fnmatch(path.name, "pytorch_model*.bin")


def _refuse_second_encoder(others: list[Path], replaced: Mapping[Path, object]) -> None:
    """Raise if a file of the other format holds an encoder too, which would not be replaced."""
    formats = {path.suffix for path in replaced}
    for path in others:
        if path.suffix not in formats and any(map(encoder_key, TensorFile(path).keys)):
            raise InputError(
                f"{path} holds the encoder a second time, in a format that is not replaced: remove "
                "the files of that format from the checkpoint first"
            )


def _files(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder, including those in linked folders."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.resolve() not in (folder.resolve(), *folder.resolve().parents):
            yield from _files(path)
        elif path.is_file():
            yield path


def _link(path: Path, target: Path) -> None:
    source = path.resolve()  # the hub's cache holds links to files elsewhere
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _rewrite(path: Path, target: Path, names: Mapping[str, str], encoder: TensorFile) -> None:
    if TensorFile(path).is_safetensors:
        _rewrite_safetensors(path, target, names, encoder)
    else:
        _rewrite_bin(path, target, names, encoder)


def _rewrite_safetensors(
    path: Path, target: Path, names: Mapping[str, str], encoder: TensorFile
) -> None:
    """Copy the file, then overwrite the bytes of the tensors in ``names``; no offset changes."""
    shutil.copyfile(path, target)
    shard = TensorFile(path)
    with target.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for key, name in names.items():
            file.seek(8 + length + header[key]["data_offsets"][0])
            file.write(tensor_bytes(cast(name, encoder.tensor(name), shard.tensor(key).dtype)))
        file.flush()
        sync(file.fileno())


def _rewrite_bin(path: Path, target: Path, names: Mapping[str, str], encoder: TensorFile) -> None:
    """Save the mapped shard again with the tensors in ``names`` replaced."""
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    for key, name in names.items():
        replacement = cast(name, encoder.tensor(name), state[key].dtype)
        state[key] = _like(replacement, state[key])
    save_bin(state, target)


def _like(tensor: Tensor, old: Tensor) -> Tensor:
    return torch.nn.Parameter(tensor, old.requires_grad) if type(old) is not Tensor else tensor
