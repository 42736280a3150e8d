"""Features of a frozen encoder, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from visproj.vlm.encoders import VisionEncoder


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

        Raises:
            ValueError: There are no images.
            OSError: The folder cannot be written.
        """
        if not images:
            raise ValueError("no images to encode")
        if self.folder is None:
            return self.encoder.encode(self.encoder.preprocess(images))
        self.folder.mkdir(parents=True, exist_ok=True)
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
    except (FileNotFoundError, SafetensorError, KeyError):
        return None


def _write(file: Path, features: Tensor) -> None:
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        save_file({"features": features.contiguous()}, partial)
        os.replace(partial, file)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot keep features in {file.parent}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
