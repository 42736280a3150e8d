import gc
import logging
import struct
import warnings
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from vlm.tiny import TinyEncoder

from visproj.errors import InputError
from visproj.vlm.features import encode_images
from visproj.vlm.loading import PictureReader
from visproj.vlm.photographs import Images, load_photographs, read_rgb
from visproj.vlm.views import training_view


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


def saved(image, format, **options):
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def exif(*tags):
    """EXIF bytes: tag, type, count and value of each, as a camera writes them."""
    entries, values = b"", b""
    for tag, kind, count, value in tags:
        place = struct.pack("<I", 8 + 2 + 12 * len(tags) + 4 + len(values))
        values += value if len(value) > 4 else b""
        shown = value.ljust(4, b"\0") if len(value) <= 4 else place
        entries += struct.pack("<HHI", tag, kind, count) + shown
    start = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags))
    return start + entries + bytes(4) + values


SHORT, RATIONAL, DOUBLE, ASCII = 3, 5, 12, 2
TURN = (274, SHORT, 1, struct.pack("<H", 6))
METADATA = {
    "plain": exif(TURN),
    "a rational width": exif((256, RATIONAL, 1, struct.pack("<II", 12, 1)), TURN),
    "a width without end": exif((256, DOUBLE, 1, struct.pack("<d", 1e300)), TURN),
    "a rational orientation": exif((274, RATIONAL, 1, struct.pack("<II", 6, 1))),
    "an orientation in words": exif((274, ASCII, 2, b"6\0")),
    "two orientations": exif((274, SHORT, 2, struct.pack("<HH", 6, 6))),
    "an EXIF block that is nowhere": exif((0x8769, 4, 1, b"\xff\xff\xff\x7f"), TURN),
}
USELESS = {
    "no such orientation": exif((274, SHORT, 1, struct.pack("<H", 9))),
    "orientation 0": exif((274, SHORT, 1, b"\0\0")),
    "a division by zero": exif((274, RATIONAL, 1, bytes(8))),
    "an orientation of letters": exif((274, ASCII, 2, b"x\0")),
    "cut off": exif(TURN)[:-10],
    "no EXIF at all": b"Exif\0\0what",
}


@pytest.mark.parametrize("format", ["jpeg", "png", "webp", "mpo"])
@pytest.mark.parametrize("name", [*METADATA, *USELESS])
def test_orientation_is_read_and_the_rest_of_the_metadata_is_not(tmp_path, format, name):
    image = Image.linear_gradient("L").resize((12, 7)).convert("RGB")
    path = tmp_path / f"a.{format}"
    image.save(path, format, exif={**METADATA, **USELESS}[name])
    with Image.open(BytesIO(saved(image, format))) as opened:
        want = opened.convert("RGB")
    if name in METADATA:
        want = want.transpose(Image.Transpose.ROTATE_270)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = read_rgb(path)
    assert got.size == ((7, 12) if name in METADATA else (12, 7))
    assert got.tobytes() == want.tobytes()


NOISE = Image.effect_noise((12, 7), 80).convert("RGB")
FILES = [saved(NOISE, name, exif=exif(TURN)) for name in ("jpeg", "png", "webp", "tiff", "mpo")]
FILES += [saved(NOISE, name) for name in ("gif", "bmp", "jpeg2000", "ppm")]


@given(
    st.sampled_from(FILES),
    st.lists(st.tuples(st.integers(0, 299), st.integers(0, 255)), max_size=6),
    st.integers(20, 1000),
)
@settings(deadline=None, max_examples=300)
def test_damaged_files_are_refused_or_read(tmp_path_factory, content, changes, length):
    """Whatever the decoders raise: nothing else gets out, and nothing is printed."""
    damaged = bytearray(content)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    path = tmp_path_factory.mktemp("damaged") / "a"
    path.write_bytes(bytes(damaged[:length]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with suppress(InputError):
            assert read_rgb(path).mode == "RGB"


def test_what_pillow_reports_is_not_printed(capfd):
    logging.getLogger("PIL.TiffImagePlugin").error("More samples per pixel than can be decoded")
    assert capfd.readouterr().err == ""


def test_many_pixels_are_no_warning(tmp_path, monkeypatch):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_rgb(tmp_path / "a.png").size == (20, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"cannot read .*a\.png as an image: .*decompression bomb"):
        read_rgb(tmp_path / "a.png")


def test_the_first_picture_of_an_animation(tmp_path):
    first, second = (Image.new("RGB", (2, 2), colour) for colour in ("red", "blue"))
    for name in ("a.gif", "a.png", "a.webp"):
        options = {"lossless": True} if name == "a.webp" else {}
        first.save(tmp_path / name, save_all=True, append_images=[second], **options)
        assert pixels(tmp_path / name)[0][0] == [255, 0, 0]


def test_images_are_decoded_each_time(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (3, 2), "red").save(tmp_path / name)
    photographs = load_photographs([tmp_path / "a.png", tmp_path / "b.png"])
    images = Images(photographs)
    assert [photograph.size for photograph in photographs] == [(3, 2)] * 2
    assert [image.size for image in images] == [(3, 2)] * 2
    assert len(images[1:]) == 1
    Image.new("RGB", (5, 5)).save(tmp_path / "b.png")
    assert images[1].size == photographs[1].image.size == (5, 5)


def live_pixels():
    return sum(o.width * o.height for o in gc.get_objects() if issubclass(type(o), Image.Image))


class WatchingEncoder(TinyEncoder):
    """Notes how many pixels are decoded whenever it looks at an image."""

    def __init__(self):
        super().__init__()
        self.seen = []  # before each look

    def crop(self, image):
        self.seen.append(live_pixels())
        return super().crop(image)


@pytest.mark.parametrize("use", ["train", "chat"])
def test_one_photograph_is_in_memory_at_a_time(tmp_path, use):
    """A photograph, and while it is trained on one view of it, beside the encoder's crops."""
    width, height, count, views = 200, 300, 5, 4
    encoder = WatchingEncoder()
    for number in range(count):
        Image.new("RGB", (width, height)).save(tmp_path / f"{number}.png")
    files, before = sorted(tmp_path.glob("*.png")), live_pixels()
    if use == "train":
        read = PictureReader(encoder)
        for file in files:
            for view in range(views):
                read(file, lambda image, view=view: training_view(image, view, 0), "")
        least, most = width * width, 2 * width * height
    else:
        encode_images(encoder, Images(load_photographs(files)))
        least, most = width * height, 2 * width * height
    assert len(encoder.seen) == count * (views if use == "train" else 1)
    crops = max(views, count) * encoder.config.image_size**2
    assert least <= max(encoder.seen) - before <= most + crops


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


@pytest.mark.parametrize("format", ["png", "jpeg", "gif", "bmp", "tiff", "webp"])
def test_the_content_of_a_file_is_as_good(tmp_path, format):
    content = saved(NOISE, format, exif=exif(TURN))
    (tmp_path / "a").write_bytes(content)
    image = read_rgb(content)
    assert (image.mode, image.size) == ("RGB", read_rgb(tmp_path / "a").size)
    assert image.tobytes() == read_rgb(tmp_path / "a").tobytes()
    half = content[: len(content) // 2]
    with pytest.raises(
        InputError, match=f"^cannot read an image of {len(half)} bytes as an image: "
    ):
        read_rgb(half)


def test_deep_pixels_are_refused_not_clipped(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((2, 2), 40_000, dtype=np.uint16)).save(path)
    with pytest.raises(ValueError, match=r"deep\.png has pixels of mode I;16"):
        load_photographs([path])
    with pytest.raises(InputError, match=r"^an image of \d+ bytes has pixels of mode I;16"):
        read_rgb(path.read_bytes())
