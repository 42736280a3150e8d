"""Every row is in a picture, or the picture says how many are not."""

import pytest

pytest.importorskip("matplotlib")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks import cases, plots
from benchmarks.results import Results, Row

DEVICE = "Some Processor, 2 threads of 2 cores"


def rows(count, task="perceiver", modes=cases.MODES, shares=(0.5,)):
    """``count`` rows of three implementations, mode by mode, batch after batch."""
    found = []
    for i in range(count):
        name = ("upstream", "fair", "visproj")[i % 3]
        mode = modes[i // 3 % len(modes)]
        place = (task, name, mode, "tiny", 256, 65, 512, 1 + i // 9, "fp32")
        ratios = {"vs_fair": 1.5, "vs_fair_p20": 1.4, "vs_fair_p80": 1.7} if i % 3 == 2 else {}
        times = {"time_us": 100.0 + i, "time_us_p20": 99.0, "time_us_p80": 400.0}
        share = shares[i % len(shares)]
        found.append(Row(*place, share_of_model_floor=share, peak_mib=0.5 * i, **times, **ratios))
    return found


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw rows; pictures by name, each a matplotlib figure."""
    figures = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.update({path.stem: figure}))

    def call(rows):
        figures.clear()
        plots.draw(Results({"device": DEVICE}, rows), tmp_path)
        return figures

    yield call
    plt.close("all")


def bars(figure: Figure):
    return [patch for axes in figure.axes for patch in axes.patches]


def legend(figure: Figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def title(figure: Figure):
    return figure._suptitle.get_text()


def test_all_of_more_rows_than_fit_one_picture(drawn):
    figures = drawn(rows(102))
    memory = [figures["memory_perceiver"], figures["memory_perceiver_2"]]
    assert [len(bars(figure)) for figure in memory] == [60, 42]
    assert title(memory[0]) == f"perceiver: peak memory, rows 1 to 60 of 102\n{DEVICE}"
    assert title(memory[1]) == f"perceiver: peak memory, rows 61 to 102 of 102\n{DEVICE}"
    widths = sorted(bar.get_width() for figure in memory for bar in bars(figure))
    assert widths == [0.5 * i for i in range(102)]
    modes = [axes.get_title(loc="left") for figure in memory for axes in figure.axes]
    assert modes == ["forward", "backward", "backward", "forward+backward"]


def test_what_is_not_shown_is_said(drawn):
    figures = drawn(rows(270, modes=("forward",)))
    names = [name for name in figures if name.startswith("memory")]
    assert names == ["memory_perceiver", *(f"memory_perceiver_{i}" for i in (2, 3, 4))]
    assert sum(len(bars(figures[name])) for name in names) == 240
    for name in names:
        assert "of 270; the others are only in results.csv" in title(figures[name])


def test_colours_have_a_legend(drawn):
    figures = drawn(rows(9))
    assert legend(figures["memory_perceiver"]) == ["upstream", "fair", "visproj"]
    assert title(figures["memory_perceiver"]).startswith("perceiver: peak memory, all 9 rows")
    speed = figures["speed_up_over_fair_perceiver"]
    assert legend(speed) == ["visproj", "20th to 80th percentile", "as fast as fair"]
    colours = {bar.get_facecolor() for bar in bars(figures["memory_perceiver"])}
    assert len(colours) == 3
    assert {bar.get_facecolor() for bar in bars(speed)} < colours
    for figure in (figures["memory_perceiver"], speed):
        *_, last = figure.axes
        assert last.get_xlabel()
    assert "speed_up_over_upstream_perceiver" not in figures


def test_above_100_percent_is_marked(drawn):
    figure = drawn(rows(9, shares=(0.5, 0.9, 1.5)))["share_of_floor_perceiver"]
    hatched = [bar.get_width() for bar in bars(figure) if bar.get_hatch()]
    assert hatched == [150.0] * 3
    assert "above 100 %: the measured floor is not a lower bound there" in legend(figure)
    figure = drawn(rows(9))["share_of_floor_perceiver"]
    assert legend(figure) == ["upstream", "fair", "visproj", "floor"]
    assert not any(bar.get_hatch() for bar in bars(figure))


def test_time_by_batch(drawn):
    figure = drawn(rows(27) + rows(27, task="vit"))["time_by_batch"]
    assert [axes.get_title() for axes in figure.axes] == [
        "perceiver\ntiny, D 512, fp32",
        "vit\ntiny, D 512, fp32",
    ]
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == ["upstream", "fair", "visproj"]
        assert all(list(line.get_xdata()) == [1, 2, 3] for line in axes.lines)
        assert axes.get_legend() is not None


def test_nothing_to_draw(drawn):
    assert drawn([]) == {}


def test_files(tmp_path):
    written = plots.draw(Results({}, rows(18)), tmp_path)
    assert sorted(written) == sorted(tmp_path.iterdir())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
