"""Square views of a photograph: random ones to train on, fixed ones kept back for evaluation."""

import math
import random
from collections.abc import Iterator
from itertools import chain

from PIL import Image, ImageOps

from visproj.errors import InputError

SMALLEST = 0.6  # side of a training view, in shorter sides of the image
CORNER = 0.75  # side of the held-out corner crop, in the same unit
COARSE = 96  # pixels


def training_views(image: Image.Image, count: int, seed: int) -> Iterator[Image.Image]:
    """``count`` square crops, never mirrored or resized; the first is the whole centre square.

    Each is cut out when it is asked for: together they can be several times the image's size.

    The sides of the others are uniform between 0.6 and 1 of the image's shorter side, their
    positions uniform over the image. The one side that ``held_out_views`` crops its corner at is
    passed over for the next larger. The crops depend on the seed and the image's size alone, and
    the global random state is left as it was.

    Raises:
        ValueError: ``count`` is less than 1.
    """
    if count < 1:
        raise InputError(f"count is {count}, at least 1 view is needed")
    shorter = min(image.size)
    generator = random.Random(seed)

    def random_crop() -> Image.Image:
        side = generator.randint(math.ceil(SMALLEST * shorter), shorter)
        if side == _corner_side(shorter):
            side = min(side + 1, shorter)
        left = generator.randint(0, image.width - side)
        return _crop(image, left, generator.randint(0, image.height - side), side)

    crops = (random_crop() for _ in range(count - 1))
    return chain([_centre_square(image)], crops)


def held_out_views(image: Image.Image) -> list[Image.Image]:
    """Five fixed square views, none of which ``training_views`` shows.

    1. The centre square, mirrored.
    2. Its upper left part of 0.8 of the side, mirrored.
    3. Its lower right part of 0.75 of the side.
    4. Its middle at half the side, closer than any training view.
    5. All of it, reduced to 96 pixels, or to half where that is fewer.

    View 3 has a side that training passes over; mirrored views can coincide with training ones only
    where the photograph is its own mirror image, the others only below 3 pixels a side.
    """
    square = _centre_square(image)
    side = square.width
    corner, half = _corner_side(side), max(1, side // 2)
    coarse = min(COARSE, half)
    return [
        ImageOps.mirror(square),
        ImageOps.mirror(_crop(square, 0, 0, max(1, round(0.8 * side)))),
        _crop(square, side - corner, side - corner, corner),
        _crop(square, (side - half) // 2, (side - half) // 2, half),
        square.resize((coarse, coarse), Image.Resampling.BICUBIC),
    ]


def _corner_side(shorter: int) -> int:
    return max(1, round(CORNER * shorter))


def _centre_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    return _crop(image, (image.width - side) // 2, (image.height - side) // 2, side)


def _crop(image: Image.Image, left: int, top: int, side: int) -> Image.Image:
    return image.crop((left, top, left + side, top + side))
