"""What an encoder's ``preprocessor_config.json`` asks for, as far as it is followed here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import Image

from visproj.errors import InputError

FILE = "preprocessor_config.json"
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


class Preprocessing(NamedTuple):
    """From a photograph to pixels: shorter side resized, centre cut out, values normalised.

    Attributes:
        resize: The shorter side after resizing.
        crop: Side of the square.
        resample: How it is resized.
        mean: Of each channel, on a scale from 0 to 1; is subtracted.
        std: Of each channel, on the same scale; divides.
    """

    resize: int
    crop: int
    resample: Image.Resampling
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_preprocessing(values: Mapping[str, Any], encoder: str, image_size: int) -> Preprocessing:
    """Read the settings of an image processor of the CLIP kind.

    Absent settings have transformers' defaults, sizes that of the model. There are none for mean
    and standard deviation, which differ between models.

    Args:
        values: Content of the file.
        encoder: Name of the encoder, for messages.
        image_size: What the model's own configuration says.

    Raises:
        InputError: A setting is missing, cannot be understood or asks for something else than the
            steps that are followed here; the message has the file and the setting.
    """
    given = {key: value for key, value in values.items() if value is not None}

    def refuse(key: str, wanted: str) -> InputError:
        found = f"{key} is {given[key]!r}" if key in given else f"{key} is missing"
        return InputError(f"{FILE} of the encoder {encoder}: {found}, {wanted}")

    for key in sorted({*STEPS, *(key for key in given if key.startswith("do_"))}):
        if not isinstance(given.get(key, True), bool):
            raise refuse(key, "wanted true or false")
        if given.get(key, key in STEPS) != (key in STEPS) and key not in STEPS[2:]:
            raise refuse(key, "which is not supported")
    crop = _side(given.get("crop_size", image_size), {"height", "width"})
    if crop is None:
        raise refuse("crop_size", "wanted the side of a square")
    resize = _side(given.get("size", crop), {"shortest_edge"})
    if resize is None or resize < crop:
        raise refuse("size", f"wanted a shortest_edge of at least {crop}")
    resample = given.get("resample", Image.Resampling.BICUBIC)
    if type(resample) is bool or resample not in list(Image.Resampling):
        raise refuse("resample", "wanted the number of a Pillow filter")
    factor = given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1
    if not _is_number(factor) or factor <= 0:
        raise refuse("rescale_factor", "wanted a positive number")
    mean: tuple[float, ...] = (0.0,) * 3
    std: tuple[float, ...] = (1.0,) * 3
    if given.get("do_normalize", True):
        mean, std = _channels(given.get("image_mean")), _channels(given.get("image_std"))
        if not mean:
            raise refuse("image_mean", "wanted three numbers")
        if not std or min(std) <= 0:
            raise refuse("image_std", "wanted three positive numbers")
    scale = 255 * factor
    return Preprocessing(
        resize,
        crop,
        Image.Resampling(resample),
        tuple(value / scale for value in mean),
        tuple(value / scale for value in std),
    )


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
