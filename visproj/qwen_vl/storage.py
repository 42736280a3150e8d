"""Reading tensor files mapped into memory, and writing an encoder's directory whole or not at all.

Tensors are streamed one at a time: safetensors' own writer wants all of them at once, and before
its release 0.8 it copies each of them besides.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visproj.qwen_vl.config import (
    CONFIG_NAME,
    QwenVisionConfig,
    preprocessor_settings,
    write_json,
)
from visproj.qwen_vl.keys import check_shapes

SAFETENSORS_NAME = "model.safetensors"
BIN_NAME = "pytorch_model.bin"
PREPROCESSOR_NAME = "preprocessor_config.json"
OUR_FILES = frozenset({SAFETENSORS_NAME, BIN_NAME, PREPROCESSOR_NAME, CONFIG_NAME})
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SAFETENSORS_DTYPES}


class TensorFile:
    """The tensors of one ``.safetensors`` or ``.bin`` file, mapped: only what is used is read.

    A ``.bin`` is read by PyTorch's restricted unpickler, which builds tensors and runs no code.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or holds something else than tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        with path.open("rb") as file:
            if file.read(24).startswith(b"version https://git-lfs"):
                raise ValueError(
                    f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`"
                )
        self.keys: frozenset[str]
        self._get: Callable[[str], Any]
        if path.suffix == ".safetensors":
            self._open_safetensors()
        else:
            self._open_bin()

    def _open_safetensors(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            handle = safe_open(self.path, framework="pt", device="cpu")
            self.keys = frozenset(handle.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{self.path} is no intact safetensors file ({error})") from error
        self._get = handle.get_tensor

    def _open_bin(self) -> None:
        if not zipfile.is_zipfile(self.path):
            raise ValueError(
                f"{self.path} is truncated, or was written by torch.save before PyTorch 1.6 and "
                "cannot be mapped: load and save it again"
            )
        try:
            state = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            name = re.search(r"GLOBAL ([\w.]+)", str(error))
            found = f" ({name[1]})" if name else ""
            raise ValueError(
                f"{self.path} is damaged or holds pickled objects that are no tensors{found}; "
                "refused, nothing in it was executed"
            ) from error
        except Exception as error:  # a damaged pickle can raise anything
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ValueError(f"{self.path} is damaged ({reason})") from error
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise ValueError(
                f"{self.path} holds a {type(state).__name__}, not a dict of named tensors"
            )
        self.keys = frozenset(state)
        self._get = state.__getitem__

    def tensor(self, key: str) -> Tensor:
        """A tensor whose bytes are still in the file.

        Raises:
            ValueError: If there is no such key, or what it holds is no plain floating tensor.
        """
        if key not in self.keys:
            raise ValueError(f"{self.path} holds no tensor {key}")
        tensor = self._get(key)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{key} in {self.path} is a {type(tensor).__name__}, not a tensor")
        plain = (
            type(tensor) in (Tensor, torch.nn.Parameter)
            and tensor.layout == torch.strided
            and tensor.device.type == "cpu"
            and tensor.dtype in SAFETENSORS_DTYPES
        )
        if not plain:
            raise ValueError(
                f"{key} in {self.path} must be a plain tensor of {', '.join(DTYPES)}, got a "
                f"{tensor.layout} {type(tensor).__name__} of {tensor.dtype} on {tensor.device.type}"
            )
        return tensor.detach()


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating dtype from itself or its name.

    Raises:
        ValueError: If it is not one of those that can be written.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in SAFETENSORS_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    return found


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype``, itself where it is already.

    Raises:
        ValueError: If a finite number overflows.
    """
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and result.isinf().any():
        finite = tensor[tensor.isfinite()]
        if finite.to(dtype).isinf().any():
            raise ValueError(
                f"{name} holds numbers up to {finite.abs().max().item():.3g}, too large for {dtype}"
            )
    return result


class Entry(NamedTuple):
    """A tensor to be written: what the header says of it, and how to get it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def entries_of(tensors: Mapping[str, Tensor]) -> list[Entry]:
    """Entries for tensors that are in memory."""
    return [
        Entry(name, tensor.dtype, tuple(tensor.shape), tensor.detach)
        for name, tensor in tensors.items()
    ]


def tensor_bytes(tensor: Tensor) -> Any:
    """The tensor's data, row-major; copied only where it does not lie like that."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def write_safetensors(
    path: Path, entries: Sequence[Entry], on_written: Callable[[Entry], None]
) -> None:
    """Write a safetensors file with one tensor in memory at a time."""
    # Wider numbers first keeps every tensor aligned.
    entries = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        header[entry.name] = {
            "dtype": SAFETENSORS_DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for entry in entries:
            file.write(tensor_bytes(cast(entry.name, entry.load(), entry.dtype)))
            on_written(entry)
        sync(file.fileno())


def write_encoder(
    destination: str | Path,
    config: QwenVisionConfig,
    entries: Sequence[Entry],
    *,
    with_bin: bool = False,
    overwrite: bool = False,
    on_written: Callable[[Entry], None] = lambda entry: None,
) -> list[str]:
    """Write the directory of an encoder; the names of its files come back.

    Raises:
        FileExistsError: As :func:`staged_directory`.
        OSError: As :func:`staged_directory`.
        ValueError: If the tensors are not those of ``config``, or if a number does not fit into the
            dtype it is to be written in.
    """
    check_shapes({entry.name: entry.shape for entry in entries}, config)
    with staged_directory(destination, overwrite=overwrite) as staging:
        weights = staging / SAFETENSORS_NAME
        write_safetensors(weights, entries, on_written)
        if with_bin:
            file = TensorFile(weights)
            state = {entry.name: file.tensor(entry.name) for entry in entries}
            save_bin(state, staging / BIN_NAME)
        config.save(staging)
        write_json(staging / PREPROCESSOR_NAME, preprocessor_settings(config))
        return sorted(path.name for path in staging.iterdir())


def save_bin(state: Mapping[str, Any], path: Path) -> None:
    """``torch.save`` whose disk errors are told as such."""
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # PyTorch's writer hides the OSError behind its own
            cause = error.__context__
            raise (cause if isinstance(cause, OSError) else OSError(str(error))) from error
        file.flush()
        sync(file.fileno())


def load_encoder_tensors(
    directory: Path, config: QwenVisionConfig, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors of an encoder's directory, copied out of the file and cast.

    Raises:
        FileNotFoundError: If the directory holds no weights.
        ValueError: If they are damaged, not those of ``config``, or do not fit into ``dtype``.
    """
    file = open_encoder(directory, config)
    dtype = parse_dtype(dtype)
    tensors = {}
    for name in sorted(file.keys):
        stored = file.tensor(name)
        tensors[name] = cast(name, stored, dtype or stored.dtype)
        if tensors[name] is stored:
            tensors[name] = stored.clone()
    return tensors


def open_encoder(directory: Path, config: QwenVisionConfig) -> TensorFile:
    """The weights in an encoder's directory, with the names and shapes that ``config`` asks for.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If they are damaged or are not those of ``config``.
    """
    names = [name for name in (SAFETENSORS_NAME, BIN_NAME) if (directory / name).is_file()]
    if not names:
        raise FileNotFoundError(f"no {SAFETENSORS_NAME} and no {BIN_NAME} in {directory}")
    file = TensorFile(directory / names[0])
    try:
        check_shapes({key: tuple(file.tensor(key).shape) for key in file.keys}, config)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
    return file


def check_destination(destination: str | Path, overwrite: bool) -> Path:
    """Resolve a destination that may be written.

    Raises:
        FileExistsError: If it exists and ``overwrite`` is false, or if it is anything but a
            directory that holds an encoder's files and no others.
    """
    path = Path(destination).resolve()
    if not path.exists():
        return path
    if not overwrite:
        raise FileExistsError(f"{path} exists, and is replaced only on request (--overwrite)")
    if not path.is_dir():
        raise FileExistsError(f"{path} exists and is no directory")
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
    return path


@contextmanager
def staged_directory(destination: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A fresh directory beside ``destination`` that takes its place once the block has succeeded.

    On any failure it is removed and the destination untouched; a killed process leaves it behind
    under the name ``.<destination>.partial-*``. Replacing is one exchange of two names where the
    system has it (Linux), two renames elsewhere.

    Raises:
        FileExistsError: As :func:`check_destination`.
        OSError: If something cannot be written; the message names the destination.
    """
    final = check_destination(destination, overwrite)
    staging = final.with_name(f".{final.name}.partial-{secrets.token_hex(4)}")
    try:
        staging.mkdir(parents=True)
        try:
            yield staging
            _sync_directory(staging)
            _replace(final, staging, check_destination(final, overwrite).exists())
            _sync_directory(final.parent)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(f"cannot write {final}: {error.strerror}") from error


def _replace(final: Path, staging: Path, exists: bool) -> None:
    if not exists:
        os.rename(staging, final)
        return
    if not _exchange(staging, final):
        old = final.with_name(f"{staging.name}-old")
        os.rename(final, old)
        try:
            os.rename(staging, final)
        except OSError:
            os.rename(old, final)
            raise
        staging = old
    shutil.rmtree(staging, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step, or say that this system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def sync(descriptor: int) -> None:
    """Bring an open file to the disk."""
    os.fsync(descriptor)


def _sync_directory(path: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
