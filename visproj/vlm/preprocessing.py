"""What an encoder's ``preprocessor_config.json`` asks for, as far as it is followed here."""

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
    """From a photograph to a square of pixels: resized, the centre cut out, values normalised.

    Attributes:
        resize: The shorter side after resizing.
        crop: Side of the square.
        resample: How it is resized.
        mean: Of each channel, on a scale from 0 to 1; is subtracted.
        std: Of each channel, on the same scale; divides.
        whole: Whether the whole photograph is resized to the square instead, its sides each by a
            factor of its own, and nothing cut away.
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
    """Read the settings of an image processor of the CLIP or the SigLIP kind.

    Absent settings have transformers' defaults, sizes that of the model. There are none for mean
    and standard deviation, which differ between models.

    Args:
        values: Content of the file.
        encoder: Name of the encoder, for messages.
        image_size: What the model's own configuration says.
        crops: Whether the centre is cut out (CLIP) or the whole image resized to a square (SigLIP)
            where ``do_center_crop`` is absent.

    Raises:
        InputError: A setting is missing, cannot be understood or asks for something else than the
            steps that are followed here; the message has the file and the setting.
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
    """The settings of a file that are not null, and what is read from them."""

    def __init__(self, values: Mapping[str, Any], encoder: str) -> None:
        self.given = {key: value for key, value in values.items() if value is not None}
        self.encoder = encoder

    def refuse(self, key: str, wanted: str) -> InputError:
        found = f"{key} is {self.given[key]!r}" if key in self.given else f"{key} is missing"
        return InputError(f"{FILE} of the encoder {self.encoder}: {found}, {wanted}")

    def check_steps(self) -> None:
        """Refuse a step that is not known, and doing without the one that is needed."""
        for key in sorted(key for key in self.given if key.startswith("do_")):
            value = self.given[key]
            if not isinstance(value, bool):
                raise self.refuse(key, "wanted true or false")
            if (key not in STEPS) if value else (key == REQUIRED):
                raise self.refuse(key, "which is not supported")

    def square(self, default: int | None) -> int:
        """The side that the whole image is resized to."""
        size = self.given.get("size", {"height": default, "width": default})
        side = _side(size, {"height", "width"}) if isinstance(size, dict) else None
        if side is None:
            raise self.refuse("size", "wanted a height and the same width (no do_center_crop)")
        return side

    def centre(self, default: int) -> tuple[int, int]:
        """The shorter side after resizing, and the side of the square that is cut out."""
        crop = _side(self.given.get("crop_size", default), {"height", "width"})
        if crop is None:
            raise self.refuse("crop_size", "wanted the side of a square")
        resize = _side(self.given.get("size", crop), {"shortest_edge"})
        if resize is None or resize < crop:
            raise self.refuse("size", f"wanted a shortest_edge of at least {crop}")
        return resize, crop

    def resample(self) -> Image.Resampling:
        resample = self.given.get("resample", Image.Resampling.BICUBIC)
        if type(resample) is bool or resample not in list(Image.Resampling):
            raise self.refuse("resample", "wanted the number of a Pillow filter")
        return Image.Resampling(resample)

    def scale(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation for values from 0 to 1."""
        given = self.given
        factor = given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1
        if not _is_number(factor) or factor <= 0:
            raise self.refuse("rescale_factor", "wanted a positive number")
        mean: tuple[float, ...] = (0.0,) * 3
        std: tuple[float, ...] = (1.0,) * 3
        if given.get("do_normalize", True):
            mean, std = _channels(given.get("image_mean")), _channels(given.get("image_std"))
            if not mean:
                raise self.refuse("image_mean", "wanted three numbers")
            if not std or min(std) <= 0:
                raise self.refuse("image_std", "wanted three positive numbers")
        factor *= 255
        return tuple(value / factor for value in mean), tuple(value / factor for value in std)


def _side(value: object, keys: set[str]) -> int | None:
    """A side from itself or from a dictionary in which all ``keys`` have it."""
    if isinstance(value, dict) and value.keys() == keys:
        first, *others = value.values()
        value = first if all(other == first for other in others) else None
    return value if type(value) is int and value > 0 else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _channels(value: object) -> tuple[float, ...]:
    """Three numbers, or nothing if it is something else."""
    if isinstance(value, list) and len(value) == 3 and all(map(_is_number, value)):
        return tuple(map(float, value))
    return ()
