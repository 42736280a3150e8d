"""Photographs as RGB images: the caller's own, or the two that come with scikit-learn."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

from visproj.errors import InputError
from visproj.vlm.bundled import bundled_file

SAMPLES = ("china.jpg", "flower.jpg")


class Photograph(NamedTuple):
    """An upright 8-bit RGB image and a name that no other photograph of its list has."""

    name: str
    image: Image.Image


def load_photographs(paths: Sequence[Path | str] = ()) -> list[Photograph]:
    """Read each file as an RGB image, turned upright by its EXIF tag.

    Args:
        paths: Image files; none means scikit-learn's ``china.jpg`` and ``flower.jpg``.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A file is not an image, is damaged, or has more than 8 bits a channel.
        ModuleNotFoundError: No paths were given and scikit-learn is not installed.
    """
    files = [Path(path) for path in paths]
    files = files or [bundled_file("sklearn", f"datasets/images/{name}") for name in SAMPLES]
    photographs: list[Photograph] = []
    for file in files:
        taken = {photograph.name for photograph in photographs}
        photographs.append(Photograph(free_name(file.stem, taken), read_rgb(file)))
    return photographs


def free_name(stem: str, taken: set[str]) -> str:
    """``stem``, or the first of ``stem-2``, ``stem-3``, ... that is not taken."""
    name, count = stem, 1
    while name in taken:
        count += 1
        name = f"{stem}-{count}"
    return name


def read_rgb(path: Path) -> Image.Image:
    """Decode all of an image file, upright, transparent parts on white.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: The file is not an image, is damaged, or has more than 8 bits a channel.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such image: {path}")
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read {path} as an image: {error}") from error
    # Pillow clips these to 255 where it converts them at all: a white picture and no error.
    if upright.mode.startswith(("I", "F")):
        raise InputError(
            f"{path} has pixels of mode {upright.mode}, convert it to 8 bits a channel"
        )
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright.convert("RGBA"))
    return upright.convert("RGB")
