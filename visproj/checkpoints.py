"""Finding tensors in a checkpoint: a folder or a repository on the hub, one file or shards."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from visproj.errors import InputError
from visproj.files import BIN_NAME, SAFETENSORS_NAME, TensorFile, read_json_object

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


class Files(Protocol):
    """The source of a checkpoint's files."""

    name: str

    def fetch(self, filename: str, *, required: bool = False) -> Path | None:
        """Return the file's path on this machine; ``None`` if it is missing and not required."""

    def weight_files(self, pattern: str) -> list[str]:
        """Return the names of the files that match a pattern; none if files cannot be listed."""


class LocalFiles:
    """The files of a directory."""

    def __init__(self, directory: Path) -> None:
        self.name = str(directory)
        self.directory = directory

    def fetch(self, filename: str, *, required: bool = False) -> Path | None:
        """See :meth:`Files.fetch`."""
        path = self.directory / filename
        if path.is_file():
            return path
        if required:
            raise FileNotFoundError(f"{self.name} lacks the file {filename}")
        return None

    def weight_files(self, pattern: str) -> list[str]:
        """See :meth:`Files.weight_files`."""
        return sorted(path.name for path in self.directory.glob(pattern) if path.is_file())


class HubFiles:
    """The files of a repository on the hub, each downloaded when it is first needed.

    Raises:
        ConnectionError: From :meth:`fetch`, if a file cannot be downloaded.
    """

    def __init__(self, repo_id: str, revision: str | None) -> None:
        self.name = repo_id
        self.revision = revision
        self._reached = False
        self._fetched: dict[str, Path] = {}

    def fetch(self, filename: str, *, required: bool = False) -> Path | None:
        """See :meth:`Files.fetch`."""
        if filename in self._fetched:
            return self._fetched[filename]
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            path = huggingface_hub.hf_hub_download(self.name, filename, revision=self.revision)
        except LocalEntryNotFoundError as error:
            # Without a network, a file that the cache lacks may or may not exist.
            if required or not self._reached:
                raise self._refusal(filename, error) from error
            return None
        except EntryNotFoundError as error:
            if required:
                raise FileNotFoundError(f"{self.name} lacks the file {filename}") from error
            self._reached = True
            return None
        except Exception as error:  # the client's errors have no common class in all its releases
            raise self._refusal(filename, error) from error
        self._reached = True
        self._fetched[filename] = Path(path)
        return self._fetched[filename]

    def weight_files(self, pattern: str) -> list[str]:
        """Return no names: without an index only the usual names are tried."""
        return []

    def _refusal(self, filename: str, error: Exception) -> ConnectionError:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        return ConnectionError(
            f"{self.name} is not a local directory, and {filename} of a model of that name could "
            f"not be downloaded from the hub ({reason})"
        )


def find_tensors(
    files: Files, wanted: Callable[[str], bool]
) -> tuple[dict[str, TensorFile], int | None, list[str]]:
    """Find the wanted tensors of a checkpoint.

    Shards without wanted tensors, according to the index, are not opened.

    Args:
        files: The checkpoint's files.
        wanted: Returns whether a key is wanted.

    Returns:
        The file of each wanted key; the bytes of all weight files, ``None`` if unknown; and up to
        five keys, wanted or not, for error messages.

    Raises:
        FileNotFoundError: If there are no weights, or a shard is missing.
        ValueError: If a file is damaged, or two files or file and index contradict each other.
    """
    shards, total_bytes, first_keys = _find_shards(files, wanted)
    tensors: dict[str, TensorFile] = {}
    for filename, keys in shards.items():
        file = TensorFile(_shard(files, filename))
        if keys is None:
            first_keys.extend(sorted(file.keys)[:5])
            keys = [key for key in sorted(file.keys) if wanted(key)]
        elif unnamed := sorted({key for key in file.keys if wanted(key)} - set(keys)):
            raise InputError(f"{file.path} holds {unnamed[0]}, which the index does not name")
        for key in keys:
            if key not in file.keys:
                raise InputError(f"the index says that {file.path} holds {key}, which it does not")
            if key in tensors:
                raise InputError(f"{key} is in both {tensors[key].path} and {file.path}")
            tensors[key] = file
    return tensors, total_bytes, first_keys[:5]


def open_files(source: str | Path, revision: str | None) -> Files:
    """Return the files of a local directory or of a repository on the hub."""
    if Path(source).is_dir():
        if revision is not None:
            raise InputError(f"{source} is a directory, so there is no revision {revision}")
        return LocalFiles(Path(source))
    if Path(source).exists():
        raise InputError(f"{source} is a file: pass the directory that it is in")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source):
        raise FileNotFoundError(
            f"{source} is not a directory, and cannot be a model's name on the hub"
        )
    return HubFiles(source, revision)


def _shard(files: Files, filename: str) -> Path:
    path = files.fetch(filename, required=True)
    assert path is not None
    return path


def _find_shards(
    files: Files, wanted: Callable[[str], bool]
) -> tuple[dict[str, list[str] | None], int | None, list[str]]:
    """Return the shards to open with their wanted keys (None: unknown), all bytes, first keys."""
    for single, pattern in ((SAFETENSORS_NAME, "*.safetensors"), (BIN_NAME, "pytorch_model*.bin")):
        index_name = f"{single}.index.json"
        index_path = files.fetch(index_name)
        if index_path is not None:
            try:
                return _read_index(files, index_path, wanted)
            except ValueError as error:
                raise InputError(f"{files.name}: {error}") from error
        path = files.fetch(single)
        if path is not None:
            return {single: None}, path.stat().st_size, []
        unindexed = files.weight_files(pattern)
        if unindexed:
            return dict.fromkeys(unindexed), _size(files, unindexed), []
    raise FileNotFoundError(
        f"{files.name} has neither {SAFETENSORS_NAME} nor {BIN_NAME}, nor an index of shards"
    )


def _read_index(
    files: Files, path: Path, wanted: Callable[[str], bool]
) -> tuple[dict[str, list[str] | None], int | None, list[str]]:
    index = read_json_object(path)
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path.name} has no weight_map")
    shards: dict[str, list[str] | None] = {}
    for key, filename in weight_map.items():
        plain = isinstance(filename, str) and Path(filename).name == filename
        if not plain or not filename.endswith((".safetensors", ".bin")):
            raise InputError(f"{path.name} maps {key} to {filename!r}, which is not a shard's name")
        if wanted(key):
            keys = shards.setdefault(filename, [])
            assert keys is not None
            keys.append(key)
    total = _size(files, set(weight_map.values()))
    if total is None and isinstance(metadata, dict):
        stated = metadata.get("total_size")
        total = int(stated) if isinstance(stated, int | float) else None
    return shards, total, list(weight_map)[:5]


def _size(files: Files, filenames: Iterable[str]) -> int | None:
    """Return the bytes of files in a local directory, or None; nothing is downloaded."""
    if not isinstance(files, LocalFiles):
        return None
    paths = [files.directory / filename for filename in filenames]
    return sum(p.stat().st_size for p in paths) if all(p.is_file() for p in paths) else None
