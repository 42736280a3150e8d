"""Reading of an encoder's ``preprocessor_config.json``; unsupported settings raise an error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import Image

from visproj.errors import InputError

FILE = "preprocessor_config.json"
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
REQUIRED = "do_resize"  # the other steps may be left out


class Preprocessing(NamedTuple):
    """Settings that turn a photograph into a square of pixels: resize, crop, normalise.

    Attributes:
        resize: Shorter side after resizing, in pixels.
        crop: Side of the square that is cut out of the centre, in pixels.
        resample: Filter of the resizing.
        mean: Mean of each channel on a scale from 0 to 1; it is subtracted.
        std: Standard deviation of each channel on the same scale; the difference is divided by it.
        whole: Whether the whole photograph is resized to the square instead, without a crop and
            without keeping its aspect ratio.
    """

    resize: int
    crop: int
    resample: Image.Resampling
    mean: tuple[float, ...]
    std: tuple[float, ...]
    whole: bool = False

    @property
    def setting(self) -> str:
        """Name of the setting that ``crop`` was read from, for messages."""
        return "size" if self.whole else "crop_size"


def read_preprocessing(
    values: Mapping[str, Any], encoder: str, image_size: int, *, crops: bool = True
) -> Preprocessing:
    """Read the settings of a CLIP or SigLIP image processor.

    A missing setting has transformers' default, and a missing size is the model's. Mean and
    standard deviation have no default, because they differ between models.

    Args:
        values: Content of the file.
        encoder: Name of the encoder, for messages.
        image_size: Image size in the model's own configuration, in pixels.
        crops: Default of ``do_center_crop``. True cuts out the centre (CLIP), False resizes the
            whole image to a square (SigLIP).

    Raises:
        InputError: A required setting is missing, or a setting is not valid or not supported; the
            message names the file and the setting.
    """
    settings = _Settings(values, encoder)
    settings.check_steps()
    whole = not settings.given.get("do_center_crop", crops)
    if whole:
        resize = crop = settings.square(None if crops else image_size)
    else:
        resize, crop = settings.centre(image_size)
    return Preprocessing(resize, crop, settings.resample(), *settings.scale(), whole)


class _Settings:
    """The settings of a file that are not null."""

    def __init__(self, values: Mapping[str, Any], encoder: str) -> None:
        self.given = {key: value for key, value in values.items() if value is not None}
        self.encoder = encoder

    def refuse(self, key: str, wanted: str) -> InputError:
        found = f"{key} is {self.given[key]!r}" if key in self.given else f"{key} is missing"
        return InputError(f"{FILE} of the encoder {self.encoder}: {found}, {wanted}")

    def check_steps(self) -> None:
        """Raise if a step that is not supported is on, or the one that is required is off."""
        for key in sorted(key for key in self.given if key.startswith("do_")):
            value = self.given[key]
            if not isinstance(value, bool):
                raise self.refuse(key, "expected true or false")
            if (key not in STEPS) if value else (key == REQUIRED):
                raise self.refuse(key, "which is not supported")

    def square(self, default: int | None) -> int:
        """Return the side of the square that the whole image is resized to."""
        size = self.given.get("size", {"height": default, "width": default})
        side = _side(size, {"height", "width"}) if isinstance(size, dict) else None
        if side is None:
            raise self.refuse("size", "expected equal height and width (do_center_crop is off)")
        return side

    def centre(self, default: int) -> tuple[int, int]:
        """Return the shorter side after resizing, and the side of the square that is cut out."""
        crop = _side(self.given.get("crop_size", default), {"height", "width"})
        if crop is None:
            raise self.refuse("crop_size", "expected the side of a square")
        resize = _side(self.given.get("size", crop), {"shortest_edge"})
        if resize is None or resize < crop:
            raise self.refuse("size", f"expected a shortest_edge of at least {crop}")
        return resize, crop

    def resample(self) -> Image.Resampling:
        resample = self.given.get("resample", Image.Resampling.BICUBIC)
        if type(resample) is bool or resample not in list(Image.Resampling):
            raise self.refuse("resample", "expected the number of a Pillow filter")
        return Image.Resampling(resample)

    def scale(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation for pixel values from 0 to 1."""
        given = self.given
        factor = given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1
        if not _is_number(factor) or factor <= 0:
            raise self.refuse("rescale_factor", "expected a positive number")
        mean: tuple[float, ...] = (0.0,) * 3
        std: tuple[float, ...] = (1.0,) * 3
        if given.get("do_normalize", True):
            mean, std = _channels(given.get("image_mean")), _channels(given.get("image_std"))
            if not mean:
                raise self.refuse("image_mean", "expected three numbers")
            if not std or min(std) <= 0:
                raise self.refuse("image_std", "expected three positive numbers")
        factor *= 255
        return tuple(value / factor for value in mean), tuple(value / factor for value in std)


def _side(value: object, keys: set[str]) -> int | None:
    """Return a side given as an integer, or by a dictionary whose ``keys`` all have it."""
    if isinstance(value, dict) and value.keys() == keys:
        first, *others = value.values()
        value = first if all(other == first for other in others) else None
    return value if type(value) is int and value > 0 else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _channels(value: object) -> tuple[float, ...]:
    """Return a list of three numbers as floats, or an empty tuple for anything else."""
    if isinstance(value, list) and len(value) == 3 and all(map(_is_number, value)):
        return tuple(map(float, value))
    return ()
