"""Square views of a photograph: random ones for training, fixed ones for evaluation."""

import math
import random

from PIL import Image, ImageOps

from visproj.errors import InputError

SMALLEST = 0.6  # smallest side of a training view, as a fraction of the image's shorter side
CORNER = 0.75  # side of the held-out corner crop, as the same fraction
COARSE = 96  # side of the reduced held-out view, in pixels
HELD_OUT = 5


def training_view(image: Image.Image, number: int, seed: int) -> Image.Image:
    """Cut out a square view; number 0 is the whole centre square.

    The side of the others is uniform between 0.6 and 1 of the image's shorter side, their position
    uniform over the image. The side of :func:`held_out_view`'s corner crop is replaced by the next
    larger one. A view depends only on its number, the seed and the image's size.

    Args:
        image: Image of any size.
        number: Number of the view, from 0.
        seed: Seed of the views; each image has a different one.

    Raises:
        InputError: ``number`` is negative.
    """
    if number < 0:
        raise InputError(f"the number of a view is at least 0, got {number}")
    if number == 0:
        return _centre_square(image)
    shorter = min(image.size)
    generator = random.Random(f"{seed} {number}")
    side = generator.randint(math.ceil(SMALLEST * shorter), shorter)
    if side == _corner_side(shorter):
        side = min(side + 1, shorter)
    left = generator.randint(0, image.width - side)
    return _crop(image, left, generator.randint(0, image.height - side), side)


def held_out_view(image: Image.Image, number: int, seed: int = 0) -> Image.Image:
    """Cut out one of five fixed square views, none of which :func:`training_view` shows.

    0. The centre square, mirrored.
    1. The upper left part of that square, with 0.8 of its side, mirrored.
    2. The lower right part of the square, with 0.75 of its side.
    3. The middle of the square, with half its side, which is smaller than in any training view.
    4. The whole square, reduced to a side of 96 pixels, or to half its side if that is less.

    No training view has the side of view 2. The mirrored views can equal a training view only if
    the photograph is its own mirror image. The others can do so only below 3 pixels per side.

    Args:
        image: Image of any size.
        number: Number of the view, from 0 to 4.
        seed: Ignored; the argument exists because :func:`training_view` has it.

    Raises:
        InputError: There is no view of this number.
    """
    if not 0 <= number < HELD_OUT:
        raise InputError(f"held-out views have the numbers 0 to {HELD_OUT - 1}, got {number}")
    square = _centre_square(image)
    side = square.width
    corner, half = _corner_side(side), max(1, side // 2)
    if number == 0:
        return ImageOps.mirror(square)
    if number == 1:
        return ImageOps.mirror(_crop(square, 0, 0, max(1, round(0.8 * side))))
    if number == 2:
        return _crop(square, side - corner, side - corner, corner)
    if number == 3:
        return _crop(square, (side - half) // 2, (side - half) // 2, half)
    coarse = min(COARSE, half)
    return square.resize((coarse, coarse), Image.Resampling.BICUBIC)


def _corner_side(shorter: int) -> int:
    return max(1, round(CORNER * shorter))


def _centre_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    return _crop(image, (image.width - side) // 2, (image.height - side) // 2, side)


def _crop(image: Image.Image, left: int, top: int, side: int) -> Image.Image:
    return image.crop((left, top, left + side, top + side))
