import random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from visproj.errors import InputError
from visproj.vlm.bundled import bundled_file
from visproj.vlm.photographs import read_rgb
from visproj.vlm.samples import image_paths
from visproj.vlm.sources import open_source
from visproj.vlm.views import HELD_OUT, held_out_view, training_view

sizes = st.integers(1, 90)


def training_views(image, count, seed):
    return [training_view(image, number, seed) for number in range(count)]


def held_out_views(image):
    return [held_out_view(image, number) for number in range(HELD_OUT)]


def built_in_photographs():
    """Files of the photographs that come with scikit-image and scikit-learn."""
    for row in open_source(None).rows():
        (name,) = image_paths(row.values["image"])
        package, _, inside = name.partition("/")
        yield bundled_file(package, inside)


def coordinates(width, height):
    """An image whose pixels say where they are: red is the column, green the row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def contents(views):
    return [(view.size, view.tobytes()) for view in views]


@given(sizes, sizes, st.integers(0, 2**32))
@example(1, 1, 0)
@settings(deadline=None)
def test_training_views_are_square_crops_of_the_image(width, height, seed):
    image = coordinates(width, height)
    views = training_views(image, 9, seed)
    shorter = min(width, height)
    for view in views:
        side = view.width
        assert view.height == side
        assert 0.6 * shorter <= side <= shorter
        left, top, _ = view.getpixel((0, 0))
        assert left + side <= width
        assert top + side <= height
        # Nothing was resized, mirrored or filled in.
        assert view == image.crop((left, top, left + side, top + side))


@given(sizes, sizes)
@example(1, 1)
@example(1, 90)
@settings(deadline=None)
def test_held_out_views_are_square_and_fixed(width, height):
    image = coordinates(width, height)
    views = held_out_views(image)
    assert len(views) == 5
    assert all(view.width == view.height >= 1 for view in views)
    assert contents(views) == contents(held_out_views(image))


@given(st.integers(3, 90), st.integers(3, 90), st.integers(0, 2**32))
@example(4, 4, 0)
@settings(deadline=None)
def test_no_held_out_view_is_a_training_view(width, height, seed):
    image = coordinates(width, height)
    assert not {*contents(held_out_views(image))} & {*contents(training_views(image, 64, seed))}


def test_no_held_out_view_of_the_built_in_set_is_a_training_view():
    for file in built_in_photographs():
        image = read_rgb(file)
        held_out = contents(held_out_views(image))
        assert len(set(held_out)) == 5, file
        assert not {*held_out} & {*contents(training_views(image, 64, 0))}, file


def test_the_first_training_view_is_the_centre_square():
    assert contents([training_view(coordinates(30, 20), 0, 0)]) == contents(
        [coordinates(30, 20).crop((5, 0, 25, 20))]
    )


def test_held_out_views_are_those_of_the_docstring():
    image = coordinates(240, 200)
    square = image.crop((20, 0, 220, 200))
    expected = [
        ImageOps.mirror(square),
        ImageOps.mirror(image.crop((20, 0, 180, 160))),
        image.crop((70, 50, 220, 200)),
        image.crop((70, 50, 170, 150)),
        square.resize((96, 96), Image.Resampling.BICUBIC),
    ]
    assert contents(held_out_views(image)) == contents(expected)


def test_the_coarse_view_is_half_the_side_of_a_small_image():
    assert held_out_view(coordinates(50, 90), 4).size == (25, 25)


def test_training_views_depend_on_number_seed_and_size_alone():
    image = coordinates(60, 40)
    assert contents(training_views(image, 20, 1)) == contents(training_views(image, 20, 1))
    assert contents(training_views(image, 20, 1)) != contents(training_views(image, 20, 2))
    assert contents([training_view(image, 7, 1)]) == contents(training_views(image, 20, 1))[7:8]
    assert len({*contents(training_views(image, 20, 1))}) > 15
    inverted = [ImageOps.invert(view) for view in training_views(ImageOps.invert(image), 20, 1)]
    assert contents(inverted) == contents(training_views(image, 20, 1))


def test_training_views_spread_over_sides_and_positions():
    # Corners along each axis, as parts of what the view's side leaves free.
    def corners(width, height, axis):
        views = training_views(coordinates(width, height), 400, 0)[1:]
        return [view.getpixel((0, 0))[axis] / (200 - view.width) for view in views]

    views = training_views(coordinates(200, 100), 400, 0)[1:]
    sides = [view.width for view in views]
    assert {60, 100} <= set(sides)
    assert 75 not in sides  # the held-out corner crop has it
    assert 78 < np.mean(sides) < 82
    for places in (corners(200, 100, axis=0), corners(100, 200, axis=1)):
        assert min(places) < 0.02 < 0.98 < max(places)
        assert 0.45 < np.mean(places) < 0.55


def test_global_random_states_are_left_alone():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    training_views(coordinates(9, 9), 9, 0)
    held_out_views(coordinates(9, 9))
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after


def test_a_negative_number_is_refused():
    with pytest.raises(InputError, match="the number of a view is at least 0, got -1"):
        training_view(coordinates(2, 2), -1, 0)
    for number in (-1, HELD_OUT):
        with pytest.raises(
            InputError, match=f"held-out views have the numbers 0 to 4, got {number}"
        ):
            held_out_view(coordinates(2, 2), number)
