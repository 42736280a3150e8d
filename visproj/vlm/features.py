"""Features of a frozen encoder: computed in batches and, on request, cached on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from visproj.files import entries_of, replacing, write_safetensors
from visproj.vlm.encoders import VisionEncoder

BATCH = 8

logger = logging.getLogger("visproj")


def encode_images(encoder: VisionEncoder, images: Iterable[Image.Image]) -> Tensor:
    """Compute the features of RGB images in batches of 8: fp32 ``[N, S, C]`` on the CPU."""
    crops = map(encoder.crop, images)
    rows = [torch.zeros(0, encoder.tokens, encoder.config.hidden_size)]
    while batch := list(islice(crops, BATCH)):
        rows.append(encoder.encode(encoder.normalise(batch)).float().cpu())
    return torch.cat(rows)


class FeatureShards:
    """Disk cache of features in bf16: files of many images, keyed by a digest of an image's bytes.

    Each process writes its own files, and reads all files that were in the folder when it started.
    A file is written whole or not at all, and the features of a damaged file are computed again. At
    the start, the least recently used files of the folder are removed until at most ``limit`` bytes
    are left. When the folder is full, the features of further images are not kept.

    Args:
        encoder: Encoder that computes the features.
        folder: Folder with a subfolder for each encoder; it is created if it is missing.
        limit: Maximum size of the folder in bytes.
    """

    IMAGES = 64  # per file

    def __init__(self, encoder: VisionEncoder, folder: Path, limit: int) -> None:
        self.folder = folder / hashlib.sha256(encoder.identity.encode()).hexdigest()[:16]
        self._limit = limit
        self._waiting: dict[str, Tensor] = {}
        self._file_of: dict[str, Path] = {}
        self._room = limit - prune(folder, limit)
        for file in self.folder.glob("*.safetensors"):
            with suppress(OSError, SafetensorError):
                with safe_open(file, "pt") as tensors:
                    self._file_of.update(dict.fromkeys(tensors.keys(), file))
                os.utime(file)  # marks it as used; fails in another user's folder

    def get(self, digest: str) -> Tensor | None:
        """Return the features bf16 ``[S, C]`` of an image, or ``None`` if they are not here."""
        if digest in self._waiting:
            return self._waiting[digest]
        file = self._file_of.get(digest)
        if file is None:
            return None
        try:
            with safe_open(file, "pt") as tensors:
                return tensors.get_tensor(digest)
        except (OSError, SafetensorError):
            self._file_of.pop(digest)
            return None

    def put(self, digest: str, features: Tensor) -> None:
        """Keep the features ``[S, C]`` of an image; they are on disk after :meth:`flush`."""
        if self._room <= 0 or self.get(digest) is not None:
            return
        self._waiting[digest] = features.detach().to("cpu", torch.bfloat16)
        self._room -= self._waiting[digest].nbytes
        if len(self._waiting) >= self.IMAGES:
            self.flush()

    def flush(self) -> None:
        """Write the features that are waiting; if that fails, no further features are kept."""
        if not self._waiting:
            return
        file = self.folder / f"{secrets.token_hex(8)}.safetensors"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as partial:
                write_safetensors(partial, entries_of(self._waiting))
            self._file_of.update(dict.fromkeys(self._waiting, file))
        except OSError as error:
            logger.warning("features are not kept on disk: %s", error)
            self._room = 0
        self._waiting = {}


def prune(folder: Path, limit: int) -> int:
    """Remove the least recently used files until at most ``limit`` bytes are left.

    Other processes may use the folder at the same time: they compute removed features again.

    Returns:
        Size in bytes of the files that are left.
    """
    files = []
    for file in folder.rglob("*.safetensors"):
        with suppress(OSError):
            status = file.stat()
            files.append((status.st_mtime, status.st_size, file))
    left = 0
    for _, size, file in sorted(files, reverse=True):
        if left + size > limit:
            with suppress(OSError):
                file.unlink()
        else:
            left += size
    return left
