"""Weight files of any kind, replacement of files and directories in one step, the cache folder.

This module imports only visproj's errors, so that the kernels can import it.
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

from visproj.errors import InputError

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
SAFETENSORS_NAME = "model.safetensors"
BIN_NAME = "pytorch_model.bin"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SAFETENSORS_DTYPES}


def cache_folder() -> Path | None:
    """Return the folder for everything visproj keeps between runs, or None if there is none.

    It is ``VISPROJ_CACHE_DIR``; if that is not set, ``visproj`` in ``XDG_CACHE_HOME``; else
    ``.cache/visproj`` in the home directory. The folder need not exist and may not be writable:
    callers then go on without a cache, which only takes more time.
    """
    if chosen := os.environ.get("VISPROJ_CACHE_DIR"):
        return Path(chosen)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared, "visproj")
    try:
        return Path.home() / ".cache" / "visproj"
    except RuntimeError:  # no HOME, and a user without an entry in the password file
        return None


def check_weight_file(path: Path) -> None:
    """Raise if ``path`` is missing or is obviously not a weight file.

    Failed downloads leave Git LFS pointers, web pages, error messages or empty files.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is one of these; the message says which.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open("rb") as file:
        start = file.read(256)
    if not start:
        raise InputError(f"{path} is empty: download it again")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(f"{path} is a web page, not a weight file: download it again")
    if all(byte in _TEXT for byte in start):
        shown = " ".join(start.decode("ascii").split())[:40]
        raise InputError(f"{path} is text ({shown!r}), not a weight file: download it again")


_TEXT = frozenset(b"\t\r\n" + bytes(range(32, 127)))
_ZIP = b"PK\x03\x04"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


def check_weight_files(path: Path) -> None:
    """Raise if a weight file that a loader would open is damaged or is not a weight file.

    Call this before another library opens the files and raises errors of its own. Headers are
    read, tensors are not. A folder without weight files passes. So does a path that does not
    exist, because it may be a model's name on the hub.

    Args:
        path: The folder of a model, or one weight file.

    Raises:
        FileNotFoundError: If a weight file is a link that leads nowhere, or a shard is missing.
        InputError: If one is a Git LFS pointer, a web page, text, empty or truncated, or its format
            is not the one of its name; the message names the file.
    """
    for file in _opened_by_loaders(path) if path.is_dir() else [path] if path.is_file() else []:
        if file.is_symlink() and not file.exists():
            raise FileNotFoundError(f"{file} is a link to {os.readlink(file)}, which is not there")
        check_weight_file(file)
        _check_container(file)


def _opened_by_loaders(directory: Path) -> list[Path]:
    """Return the weight files that transformers would open, or all if that is not known.

    The others are not checked: a clone often has Git LFS pointers for formats that are not needed.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        if os.path.lexists(directory / single):
            return [directory / single]
        index = directory / f"{single}.index.json"
        if index.is_file():
            shards = read_json_object(index).get("weight_map")
            named = shards.values() if isinstance(shards, dict) else ()
            return sorted({directory / name for name in named if isinstance(name, str)})
    return sorted(
        file
        for file in directory.iterdir()
        if file.suffix.lower() in WEIGHT_SUFFIXES
        and not file.name.startswith(".")
        and not file.is_dir()
    )


def _check_container(path: Path) -> None:
    """Raise if the file's first bytes do not fit its name, or if it is visibly truncated."""
    if path.suffix.lower() == ".safetensors":
        _open_safetensors(path)
        return
    with path.open("rb") as file:
        start = file.read(4)
    if path.suffix.lower() == ".gguf" and start != b"GGUF":
        raise InputError(f"{path} is not a GGUF file: it begins with {start!r}")
    if start == _ZIP and not zipfile.is_zipfile(path):
        raise InputError(f"{path} is truncated: download it again")


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        if file.read(4) == _ZIP:
            raise InputError(f"{path} was written by torch.save: call it .bin, not {path.suffix}")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not an intact safetensors file ({error})") from error


class TensorFile:
    """The memory-mapped tensors of one ``.safetensors`` or ``.bin`` file.

    Only tensors that are used are read. A safetensors file is recognised under any name. The
    attribute ``metadata`` holds the metadata of its header; it is empty for a ``.bin``.

    A ``.bin`` is read by PyTorch's restricted unpickler, which builds tensors and runs no code.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is damaged or holds anything other than tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_weight_file(path)
        self.keys: frozenset[str]
        self.metadata: dict[str, str] = {}
        self._get: Callable[[str], Any]
        self.is_safetensors = path.suffix == ".safetensors" or _begins_as_safetensors(path)
        if self.is_safetensors:
            handle = _open_safetensors(path)
            self.keys = frozenset(handle.keys())
            self.metadata = handle.metadata() or {}
            self._get = handle.get_tensor
        else:
            self._open_bin()

    def _open_bin(self) -> None:
        if not zipfile.is_zipfile(self.path):
            raise InputError(
                f"{self.path} is truncated, or was written by torch.save before PyTorch 1.6 and "
                "cannot be mapped: load and save it again"
            )
        try:
            state = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            name = re.search(r"GLOBAL ([\w.]+)", str(error))
            found = f" ({name[1]})" if name else ""
            raise InputError(
                f"{self.path} is damaged or holds pickled objects that are not tensors{found}; "
                "it was not loaded, and nothing in it was executed"
            ) from error
        except Exception as error:  # a damaged pickle can raise anything
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise InputError(f"{self.path} is damaged ({reason})") from error
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise InputError(
                f"{self.path} holds a {type(state).__name__}, not a dict of named tensors"
            )
        self.keys = frozenset(state)
        self._get = state.__getitem__

    def tensor(self, key: str) -> Tensor:
        """Return a memory-mapped tensor.

        Raises:
            ValueError: If there is no such key, or its value is not a plain floating-point tensor.
        """
        if key not in self.keys:
            raise InputError(f"{self.path} holds no tensor {key}")
        tensor = self._get(key)
        if not isinstance(tensor, Tensor):
            raise InputError(f"{key} in {self.path} is a {type(tensor).__name__}, not a tensor")
        plain = (
            type(tensor) in (Tensor, torch.nn.Parameter)
            and tensor.layout == torch.strided
            and tensor.device.type == "cpu"
            and tensor.dtype in SAFETENSORS_DTYPES
        )
        if not plain:
            raise InputError(
                f"{key} in {self.path} must be a plain tensor of {', '.join(DTYPES)}, got a "
                f"{tensor.layout} {type(tensor).__name__} of {tensor.dtype} on {tensor.device.type}"
            )
        return tensor.detach()

    def read(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a copy of a tensor in memory, cast to ``dtype`` if given.

        Raises:
            ValueError: As :meth:`tensor` and :func:`cast` do.
        """
        stored = self.tensor(key)
        result = cast(key, stored, dtype or stored.dtype)
        return stored.clone() if result is stored else result


def _begins_as_safetensors(path: Path) -> bool:
    """Return whether the file starts with a header length that fits it and a JSON object."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def parse_device(device: torch.device | str) -> torch.device:
    """Return a device, given the device or its name.

    Raises:
        InputError: If there is no such device, or it cannot be used here.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"the device {device} cannot be used here ({reason})") from error


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a floating-point dtype, given the dtype or its name; ``None`` for ``None``.

    Raises:
        ValueError: If it is not one of :data:`DTYPES`.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in SAFETENSORS_DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    return found


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in ``dtype``; the same tensor if it has that dtype.

    Raises:
        ValueError: If a finite number overflows.
    """
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and result.isinf().any():
        finite = tensor[tensor.isfinite()]
        if finite.to(dtype).isinf().any():
            raise InputError(
                f"{name} holds numbers up to {finite.abs().max().item():.3g}, too large for {dtype}"
            )
    return result


class Entry(NamedTuple):
    """A tensor to be written: its entry in the header, and a function that loads its data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def entries_of(tensors: Mapping[str, Tensor]) -> list[Entry]:
    """Return entries for tensors that are in memory.

    Raises:
        InputError: If a value is not a tensor, such as the packed weights of a quantised module.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise InputError(
                f"{name} is a {type(tensor).__name__}, not a tensor: save before quantising"
            )
    return [
        Entry(name, tensor.dtype, tuple(tensor.shape), tensor.detach)
        for name, tensor in tensors.items()
    ]


def tensor_bytes(tensor: Tensor) -> Any:
    """Return the tensor's bytes in row-major order, copied only if they are laid out otherwise."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def write_safetensors(
    path: Path,
    entries: Sequence[Entry],
    on_written: Callable[[Entry], None] = lambda entry: None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file with one tensor in memory at a time.

    safetensors' own writer needs all of them at once, and before its release 0.8 it also copies
    each of them.
    """
    # Wider dtypes come first, which keeps every tensor aligned.
    entries = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
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


def save_bin(state: Mapping[str, Any], path: Path) -> None:
    """Write a state dict with ``torch.save``, and raise disk errors as ``OSError``."""
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # PyTorch raises it instead of the OSError
            cause = error.__context__
            raise (cause if isinstance(cause, OSError) else OSError(str(error))) from error
        file.flush()
        sync(file.fileno())


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file whose outermost value is an object.

    Raises:
        InputError: If the file holds anything else.
    """
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"{path.name} holds a {type(values).__name__}, not an object")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name to write to; its file replaces ``path`` when the block has succeeded.

    On any failure ``path`` is unchanged.

    Raises:
        OSError: If something cannot be written; the message names ``path``.
    """
    final = Path(path)
    partial = final.with_name(f".{final.name}.partial-{secrets.token_hex(4)}")
    try:
        yield partial
        os.replace(partial, final)
    except OSError as error:
        raise type(error)(f"cannot write {final}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def refuse_existing(path: Path) -> None:
    """Raise ``FileExistsError`` if there is anything at ``path``."""
    if path.exists():
        raise FileExistsError(f"{path} exists: choose another destination")


@contextmanager
def staged_directory(
    destination: str | Path, check: Callable[[Path], None] = refuse_existing
) -> Iterator[Path]:
    """Yield a new directory, which replaces ``destination`` when the block has succeeded.

    On any failure the new directory is removed and ``destination`` is unchanged. A killed process
    leaves it under the name ``.<destination>.partial-*``. On systems that can exchange two names in
    one step (Linux) the replacement is one step, elsewhere two renames.

    Args:
        destination: The directory to write.
        check: Called before and after the block; raises unless what is at ``destination`` may be
            replaced.

    Raises:
        FileExistsError: As ``check`` does.
        OSError: If something cannot be written; the message names the destination.
    """
    final = Path(destination).resolve()
    check(final)
    staging = final.with_name(f".{final.name}.partial-{secrets.token_hex(4)}")
    try:
        staging.mkdir(parents=True)
        try:
            yield staging
            _sync_directory(staging)
            check(final)
            _replace(final, staging, final.exists())
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
    """Swap two names in one step; return False if this system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def sync(descriptor: int) -> None:
    """Flush an open file to the disk."""
    os.fsync(descriptor)


def _sync_directory(path: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
