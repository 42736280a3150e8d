"""Photographs as RGB images: the caller's own, or the two that come with scikit-learn.

A list of photographs holds paths. An image is decoded on every access and is not kept, so memory
does not grow with the list.
"""

import io
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from visproj.errors import InputError
from visproj.vlm.bundled import bundled_file

logging.getLogger("PIL").addHandler(logging.NullHandler())  # our own error reports it

SAMPLES = ("china.jpg", "flower.jpg")
# The transposition that turns an image upright, by EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Photograph:
    """An image file that could be decoded.

    Attributes:
        name: Name that is unique in its list.
        path: The file.
        size: Width and height of the upright image in pixels.
    """

    name: str
    path: Path
    size: tuple[int, int]

    @property
    def image(self) -> Image.Image:
        """The upright 8-bit RGB image, decoded each time."""
        return read_rgb(self.path)


class Images(Sequence[Image.Image]):
    """A sequence of photographs' images, each decoded when it is accessed."""

    def __init__(self, photographs: Sequence[Photograph]) -> None:
        self._photographs = photographs

    def __len__(self) -> int:
        return len(self._photographs)

    def __getitem__(self, index: Any) -> Any:
        found = self._photographs[index]
        return Images(found) if isinstance(index, slice) else found.image


def load_photographs(paths: Sequence[Path | str] = ()) -> list[Photograph]:
    """Check that each file can be decoded, and return the photographs with unique names.

    Args:
        paths: Image files; scikit-learn's ``china.jpg`` and ``flower.jpg`` if empty.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A file is not an image, is damaged, or has more than 8 bits per channel.
        ModuleNotFoundError: No paths were given and scikit-learn is not installed.
    """
    files = [Path(path) for path in paths]
    files = files or [bundled_file("sklearn", f"datasets/images/{name}") for name in SAMPLES]
    photographs: list[Photograph] = []
    taken: set[str] = set()
    for file in files:
        name = free_name(file.stem, taken)
        taken.add(name)
        photographs.append(Photograph(name, file, read_rgb(file).size))
    return photographs


def free_name(stem: str, taken: set[str]) -> str:
    """Return ``stem``, or the first of ``stem-2``, ``stem-3``, ... that is not taken."""
    name, count = stem, 1
    while name in taken:
        count += 1
        name = f"{stem}-{count}"
    return name


def read_rgb(source: Path | bytes) -> Image.Image:
    """Decode an image to upright 8-bit RGB, with transparent parts on white.

    The orientation is the only metadata that is read. Damaged metadata is ignored.

    Args:
        source: An image file, or its content.

    Raises:
        FileNotFoundError: The path does not exist.
        InputError: The file is not an image, is damaged, or has more than 8 bits per channel.
    """
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), f"an image of {len(source)} bytes")
    if not source.exists():
        raise FileNotFoundError(f"no such image: {source}")
    return _read(source, str(source))


def _read(source: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata and many pixels
            return _decode(source, name)
    except InputError:
        raise
    except Exception as error:  # decoders raise any error for a damaged file
        reason = str(error) or type(error).__name__
        raise InputError(f"cannot read {name} as an image: {reason}") from error


def _decode(source: Path | io.BytesIO, name: str) -> Image.Image:
    with Image.open(source) as opened:
        opened.load()
        image: Image.Image = opened
        # If Pillow converts these, it clips them to 255: the image turns white without an error.
        if image.mode.startswith(("I", "F")):
            raise InputError(
                f"{name} has pixels of mode {image.mode}: convert it to 8 bits per channel"
            )
        turn = TURNS.get(_orientation(image))
        if turn is not None:
            image = image.transpose(turn)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation. ``ImageOps.exif_transpose`` would rewrite all other tags too."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata can raise any error; the pixels are intact
        return 1
