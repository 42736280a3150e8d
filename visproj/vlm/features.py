"""Features of a frozen encoder, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from visproj.files import entries_of, replacing, write_safetensors
from visproj.vlm.encoders import VisionEncoder

logger = logging.getLogger("visproj")


class FeatureCache:
    """Images in, the encoder's features out; an image seen before is read from disk.

    One safetensors file an image, named by a digest of the pixels that the encoder sees, of the
    encoder's :attr:`~visproj.vlm.encoders.VisionEncoder.identity` and of its input size. Files
    appear whole or not at all; a damaged one is computed again.

    Args:
        encoder: Computes what is not there yet.
        folder: Where the files are, made if it is missing; ``None`` keeps nothing.
    """

    BATCH = 8

    def __init__(self, encoder: VisionEncoder, folder: Path | None = None) -> None:
        self.encoder = encoder
        self.folder = folder

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Features fp32 ``[N, 1 + S, C]`` of RGB images.

        Where the folder cannot be written, the features are computed all the same.
        """
        if not images:
            rows, columns = self.encoder.grid
            return torch.zeros(0, 1 + rows * columns, self.encoder.config.hidden_size)
        if self.folder is None:
            return self.encoder.encode(self.encoder.preprocess(images))
        files = [self._file(image) for image in images]
        found = [_read(file) for file in files]
        missing = [index for index, features in enumerate(found) if features is None]
        for start in range(0, len(missing), self.BATCH):
            batch = missing[start : start + self.BATCH]
            computed = self.encoder.encode(
                self.encoder.preprocess([images[index] for index in batch])
            )
            for index, features in zip(batch, computed, strict=True):
                _write(files[index], features)
                found[index] = features
        return torch.stack([features for features in found if features is not None])

    def _file(self, image: Image.Image) -> Path:
        assert self.folder is not None
        seen = self.encoder.crop(image)
        digest = hashlib.sha256(f"{self.encoder.identity} {seen.size}".encode())
        digest.update(seen.tobytes())
        return self.folder / f"{digest.hexdigest()}.safetensors"


def _read(file: Path) -> Tensor | None:
    try:
        return load_file(file)["features"]
    except (OSError, SafetensorError, KeyError):
        return None


def _write(file: Path, features: Tensor) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            write_safetensors(partial, entries_of({"features": features}))
    except OSError as error:
        logger.debug("features are not kept: %s", error)
