import numpy as np
import pytest
from PIL import Image

from visproj.vlm.photographs import load_photographs


def pixels(path):
    return np.asarray(load_photographs([path])[0].image).tolist()


def test_the_two_samples_come_by_default(photographs):
    assert [photo.name for photo in photographs] == ["china", "flower"]
    assert [photo.image.size for photo in photographs] == [(640, 427), (640, 427)]
    # The sky of one is bright, the leaves of the other are dark.
    means = [np.asarray(photo.image)[:40].mean() for photo in photographs]
    assert means[0] > 180
    assert means[1] < 60


def test_exif_orientation_turns_the_image(tmp_path):
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[274] = 6  # the camera lay on its side: turn a quarter clockwise to view
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (255, 0, 0))
    image.putpixel((1, 0), (0, 0, 255))
    image.save(path, exif=exif)
    assert pixels(path) == [[[255, 0, 0]], [[0, 0, 255]]]


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 100, [100, 100, 100]),
        ("RGBA", (200, 0, 0, 0), [255, 255, 255]),
        ("RGBA", (200, 0, 0, 255), [200, 0, 0]),
        ("LA", (10, 255), [10, 10, 10]),
        ("1", 1, [255, 255, 255]),
    ],
)
def test_other_modes_become_rgb(tmp_path, mode, value, expected):
    path = tmp_path / "image.png"
    Image.new(mode, (1, 1), value).save(path)
    assert pixels(path) == [[expected]]


def test_cmyk_becomes_rgb(tmp_path):
    path = tmp_path / "print.tiff"
    Image.new("CMYK", (1, 1), (0, 255, 255, 0)).save(path)
    assert pixels(path) == [[[255, 0, 0]]]


def test_names_are_unique(tmp_path):
    paths = [tmp_path / folder / "a.png" for folder in ("x", "y", "z")]
    for path in paths:
        path.parent.mkdir()
        Image.new("RGB", (1, 1)).save(path)
    assert [photo.name for photo in load_photographs(paths)] == ["a", "a-2", "a-3"]


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such image: .*nowhere\.jpg"):
        load_photographs([tmp_path / "nowhere.jpg"])


def test_what_is_no_image_is_named(tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    half = tmp_path / "half.png"
    half.write_bytes(whole.read_bytes()[:1000])
    for path in (text, half, tmp_path):
        with pytest.raises(ValueError, match=f"cannot read {path} as an image"):
            load_photographs([path])


def test_deep_pixels_are_refused_not_clipped(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((2, 2), 40_000, dtype=np.uint16)).save(path)
    with pytest.raises(ValueError, match=r"deep\.png has pixels of mode I;16"):
        load_photographs([path])
