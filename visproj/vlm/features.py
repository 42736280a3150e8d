"""Features of a frozen encoder, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from visproj.files import entries_of, replacing, write_safetensors
from visproj.vlm.encoders import VisionEncoder

LIMIT = 4 * 2**30  # bytes in the folder, beyond which old files are removed

logger = logging.getLogger("visproj")


class FeatureCache:
    """Images in, the encoder's features out; an image seen before is read from disk.

    One safetensors file per image, named by a digest of the pixels that the encoder sees, of the
    encoder's :attr:`~visproj.vlm.encoders.VisionEncoder.identity` and of its input size. Files
    appear whole or not at all; a damaged one is computed again. Before the first file is written,
    the files that were not used for longest are removed from a folder of more than 4 GiB.

    Args:
        encoder: Computes what is not there yet.
        folder: Where the files are, made if it is missing; ``None`` keeps nothing.
    """

    BATCH = 8

    def __init__(self, encoder: VisionEncoder, folder: Path | None = None) -> None:
        self.encoder = encoder
        self.folder = folder
        self._pruned = False

    def __call__(self, images: Iterable[Image.Image]) -> Tensor:
        """Features fp32 ``[N, 1 + S, C]`` of RGB images.

        Images are taken one at a time, and of each only what the encoder sees is kept. Where the
        folder cannot be written, the features are computed all the same.
        """
        crops = [self.encoder.crop(image) for image in images]
        if not crops:
            rows, columns = self.encoder.grid
            return torch.zeros(0, 1 + rows * columns, self.encoder.config.hidden_size)
        files = [self._file(crop) for crop in crops]
        found = [_read(file) for file in files]
        missing = [index for index, features in enumerate(found) if features is None]
        for start in range(0, len(missing), self.BATCH):
            batch = missing[start : start + self.BATCH]
            pixels = self.encoder.normalise([crops[index] for index in batch])
            for index, features in zip(batch, self.encoder.encode(pixels), strict=True):
                self._write(files[index], features)
                found[index] = features
        return torch.stack([features for features in found if features is not None])

    def _file(self, crop: Image.Image) -> Path | None:
        if self.folder is None:
            return None
        digest = hashlib.sha256(f"{self.encoder.identity} {crop.size}".encode())
        digest.update(crop.tobytes())
        return self.folder / f"{digest.hexdigest()}.safetensors"

    def _write(self, file: Path | None, features: Tensor) -> None:
        if file is None:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if not self._pruned:
                self._pruned = True
                prune(file.parent, LIMIT)
            with replacing(file) as partial:
                write_safetensors(partial, entries_of({"features": features}))
        except OSError as error:
            logger.debug("features are not kept: %s", error)


def prune(folder: Path, limit: int) -> None:
    """Remove the files that were not used for longest, until those left have ``limit`` bytes.

    Other processes may use the folder at the same time: a file that is gone is computed again.
    """
    files = []
    for file in folder.iterdir():
        with suppress(OSError):
            status = file.stat()
            files.append((status.st_mtime, status.st_size, file))
    left = 0
    for _, size, file in sorted(files, reverse=True):
        left += size
        if left > limit:
            with suppress(OSError):
                file.unlink()


def _read(file: Path | None) -> Tensor | None:
    """The features in a file, which counts as used from now on."""
    if file is None:
        return None
    try:
        features = load_file(file)["features"]
    except (OSError, SafetensorError, KeyError):
        return None
    with suppress(OSError):  # a folder of someone else's may be read all the same
        os.utime(file)
    return features
