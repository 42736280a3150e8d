"""The directory of an encoder: written completely or not at all, and read back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from visproj.contents import refuse_placeholders
from visproj.errors import InputError
from visproj.files import (
    BIN_NAME,
    SAFETENSORS_NAME,
    Entry,
    TensorFile,
    parse_dtype,
    save_bin,
    staged_directory,
    write_json,
    write_safetensors,
)
from visproj.qwen_vl.config import CONFIG_NAME, QwenVisionConfig, preprocessor_settings
from visproj.qwen_vl.keys import check_shapes

PREPROCESSOR_NAME = "preprocessor_config.json"
OUR_FILES = frozenset({SAFETENSORS_NAME, BIN_NAME, PREPROCESSOR_NAME, CONFIG_NAME})


def write_encoder(
    destination: str | Path,
    config: QwenVisionConfig,
    entries: Sequence[Entry],
    *,
    with_bin: bool = False,
    overwrite: bool = False,
    on_written: Callable[[Entry], None] = lambda entry: None,
) -> list[str]:
    """Write the directory of an encoder and return the names of its files.

    Raises:
        FileExistsError: As :func:`staged_directory`.
        OSError: As :func:`staged_directory`.
        ValueError: If the tensors are not those of ``config``, or if a value does not fit into the
            dtype that it is written in.
    """
    check_shapes({entry.name: entry.shape for entry in entries}, config)
    check = partial(check_destination, overwrite=overwrite)
    with staged_directory(destination, check) as staging:
        weights = staging / SAFETENSORS_NAME
        write_safetensors(weights, entries, on_written)
        if with_bin:
            _write_bin(weights, staging / BIN_NAME, [entry.name for entry in entries])
        config.save(staging)
        write_json(staging / PREPROCESSOR_NAME, preprocessor_settings(config))
        return sorted(path.name for path in staging.iterdir())


def _write_bin(weights: Path, path: Path, names: Sequence[str]) -> None:
    """Write the tensors again as a ``.bin``; the memory mapping is released on return."""
    file = TensorFile(weights)
    save_bin({name: file.tensor(name) for name in names}, path)


def load_encoder_tensors(
    directory: Path, config: QwenVisionConfig, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return copies of the tensors in an encoder's directory, cast to ``dtype`` if given.

    Raises:
        FileNotFoundError: If the directory holds no weights.
        ValueError: If they are damaged, not those of ``config``, or do not fit into ``dtype``.
    """
    file = open_encoder(directory, config)
    dtype = parse_dtype(dtype)
    return {name: file.read(name, dtype) for name in sorted(file.keys)}


def open_encoder(directory: Path, config: QwenVisionConfig) -> TensorFile:
    """Open the weights in an encoder's directory, and check their names and shapes.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If they are damaged or are not those of ``config``.
    """
    names = [name for name in (SAFETENSORS_NAME, BIN_NAME) if (directory / name).is_file()]
    if not names:
        raise FileNotFoundError(f"no {SAFETENSORS_NAME} and no {BIN_NAME} in {directory}")
    file = TensorFile(directory / names[0])
    shapes = {key: tuple(file.tensor(key).shape) for key in file.keys}
    refuse_placeholders(shapes, str(file.path))
    try:
        check_shapes(shapes, config)
    except ValueError as error:
        raise InputError(f"{file.path}: {error}") from error
    return file


def check_destination(path: Path, overwrite: bool) -> None:
    """Raise unless an encoder may be written to ``path``.

    Raises:
        FileExistsError: If it exists and ``overwrite`` is false, or if it is anything but a
            directory that holds an encoder's files and no others.
    """
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists, and is replaced only on request (--overwrite)")
    if not path.is_dir():
        raise FileExistsError(f"{path} exists and is not a directory")
    names = {entry.name for entry in path.iterdir()}
    others = sorted(names - OUR_FILES)
    if others:
        raise FileExistsError(
            f"{path} holds other files than an encoder's ({others[0]}), so it is not overwritten"
        )
    if names:
        try:
            QwenVisionConfig.from_pretrained(path)
        except (ValueError, OSError) as error:
            raise FileExistsError(f"{path} holds no encoder, so it is not overwritten") from error
