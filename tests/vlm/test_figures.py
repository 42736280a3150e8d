import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from visproj.vlm.figures import (
    answer_attention_figure,
    attention_figure,
    features_figure,
    pca_colours,
    positions_figure,
    save_figure,
)


def drawn(axis):
    return [np.asarray(image.get_array()) for image in axis.images]


@pytest.fixture
def photo():
    return Image.effect_noise((32, 32), 60).convert("RGB")


def test_pca_colours_follow_the_components():
    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(2, 200, 3, generator=generator, dtype=torch.float64)
    factors = factors * torch.tensor([9.0, 3.0, 1.0])
    basis = torch.linalg.qr(torch.randn(8, 3, generator=generator, dtype=torch.float64)).Q
    colours = pca_colours(factors @ basis.T)
    assert colours.shape == (2, 200, 3)
    for channel in range(3):
        seen = np.corrcoef(colours[..., channel].ravel(), factors[..., channel].ravel())[0, 1]
        assert abs(seen) > 0.98
    assert colours.reshape(-1, 3).min(0).tolist() == [0, 0, 0]
    assert colours.reshape(-1, 3).max(0).tolist() == [1, 1, 1]


def test_pca_colours_do_not_depend_on_the_sign_of_the_axes():
    features = torch.randn(1, 50, 6, generator=torch.Generator().manual_seed(1))
    permuted = features[:, torch.arange(49, -1, -1)]
    want = pca_colours(features)[:, ::-1]
    np.testing.assert_allclose(pca_colours(permuted), want, atol=1e-9)


def test_pca_colours_of_equal_patches_are_finite():
    assert np.isfinite(pca_colours(torch.ones(1, 9, 4))).all()


def test_features_figure_shows_photo_and_map(photo):
    colours = np.linspace(0, 1, 4 * 4 * 3).reshape(16, 3)
    figure = features_figure(photo, colours, (4, 4), "an encoder", "a $b$.jpg")
    left, right = figure.axes
    np.testing.assert_array_equal(drawn(left)[0], np.asarray(photo))
    np.testing.assert_array_equal(drawn(right)[0], colours.reshape(4, 4, 3))
    assert "an encoder" in figure.get_suptitle()


def test_positions_figure_peaks_at_the_marked_cells():
    figure = positions_figure(64, cells=((2, 5), (8, 8)))
    *maps, colour_bar = figure.axes
    peaks = []
    for axis in maps:
        (similarity,) = drawn(axis)
        assert similarity.max() == pytest.approx(1, abs=1e-6)
        peaks.append(tuple(int(i) for i in np.unravel_index(similarity.argmax(), similarity.shape)))
        assert [(line.get_ydata()[0], line.get_xdata()[0]) for line in axis.lines] == [peaks[-1]]
    assert peaks == [(2, 5), (8, 8), (3, 7), (12, 12)]
    assert "cosine similarity" in colour_bar.get_ylabel()


def test_attention_figure_draws_the_mean_over_heads(photo):
    maps = torch.rand(2, 256, 16, generator=torch.Generator().manual_seed(2)).softmax(-1)
    figure = attention_figure(photo, maps, (4, 4), "a.jpg", cells=((0, 0), (1, 2)))
    _, first, second, colour_bar = figure.axes
    for axis, row in ((first, 0), (second, 18)):
        grey, overlay = drawn(axis)
        np.testing.assert_array_equal(grey, np.asarray(photo.convert("L")))
        want = maps[:, row].double().mean(0).reshape(4, 4) * 16
        np.testing.assert_allclose(overlay, want)
        assert overlay.mean() == pytest.approx(1)
        assert {tuple(image.get_extent()) for image in axis.images} == {(0, 32, 32, 0)}
    assert [line.get_xydata().tolist() for line in second.lines] == [[[5.0, 3.0]]]
    assert "untrained" in figure.get_suptitle()
    assert "even spread" in colour_bar.get_ylabel()


def test_answer_attention_figure_has_a_panel_a_word(photo):
    weights = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)).softmax(-1)
    figure = answer_attention_figure(photo, ["a", "$dog$"], weights, (4, 4), "perceiver", "a.jpg")
    first, *panels, colour_bar = figure.axes
    np.testing.assert_array_equal(drawn(first)[0], np.asarray(photo))
    assert [panel.get_title() for panel in panels] == ["a", "$dog$"]
    scales = set()
    for panel, row in zip(panels, weights, strict=True):
        grey, overlay = drawn(panel)
        np.testing.assert_array_equal(grey, np.asarray(photo.convert("L")))
        np.testing.assert_allclose(overlay, row.double().reshape(4, 4) * 16)
        scales.add(panel.images[1].get_clim())
    top = float(np.quantile(weights.double().numpy() * 16, 0.98))
    assert scales == {(float(weights.min() * 16), top)}
    assert "even spread" in colour_bar.get_ylabel()
    assert "Perceiver's own attention" in figure.get_supxlabel()
    assert "words." not in figure.get_supxlabel()


def test_answer_attention_figure_says_what_it_leaves_out(photo):
    words = [f"word {index}" for index in range(29)] + ["w" * 50]
    weights = torch.full((30, 16), 1 / 16)
    figure = answer_attention_figure(photo, words, weights, (4, 4), "vit", "a.jpg")
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["photograph", *words[:12]]
    assert "The first 12 of 30 words." in figure.get_supxlabel()
    assert "the vit projector makes one per patch" in figure.get_supxlabel()
    figure = answer_attention_figure(photo, words[29:], weights[29:], (4, 4), "vit", "a.jpg")
    assert figure.axes[1].get_title() == "w" * 19 + "…"


def test_words_that_the_font_lacks_are_drawn_without_a_warning(photo, tmp_path):
    words, weights = ["犬\x16", "\ud7ff$x"], torch.full((2, 16), 1 / 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(
            answer_attention_figure(photo, words, weights, (4, 4), "vit", "a.jpg"),
            tmp_path / "a.png",
        )
    assert (tmp_path / "a.png").is_file()


def test_saved_bytes_depend_on_the_figure_alone(tmp_path):
    for name in ("a", "b"):
        save_figure(positions_figure(64), tmp_path / name / "positions.png")
    first, second = ((tmp_path / name / "positions.png").read_bytes() for name in ("a", "b"))
    assert first == second
    assert b"tEXt" not in first
    assert b"tIME" not in first


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a.jpg", "a.jpg"),
        ("$x_1$ {0}.jpg", "$x_1$ {0}.jpg"),
        ("a\nb\udcff.jpg", "a?b?.jpg"),
        ("x" * 60 + ".jpg", "…" + "x" * 35 + ".jpg"),
    ],
)
def test_titles_have_the_name_of_the_file(photo, tmp_path, name, shown):
    maps = torch.full((1, 256, 16), 1 / 16)
    figures = [
        features_figure(photo, np.zeros((16, 3)), (4, 4), "an encoder", name),
        attention_figure(photo, maps, (4, 4), name),
        answer_attention_figure(photo, ["a"], maps[0, :1], (4, 4), "vit", name),
    ]
    for number, figure in enumerate(figures):
        assert shown in figure.get_suptitle()
        save_figure(figure, tmp_path / f"{number}.png")


def test_a_picture_stays_if_the_new_one_cannot_be_drawn(tmp_path):
    save_figure(positions_figure(64), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    broken = positions_figure(64)
    broken.savefig = lambda *given, **options: 1 / 0
    with pytest.raises(ZeroDivisionError):
        save_figure(broken, tmp_path / "a.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
