"""Draw the documents' pictures: ``python -m benchmarks.pictures``.

Multiply-adds are counted from the code. Measured figures come from ``docs/pictures/measured.csv``,
where each stands beside the machine that it was measured on and the command that printed it.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import model
from benchmarks.command import Parser, check_folder, require, run_command
from benchmarks.peers import UpstreamPerceiver
from visproj.files import replacing
from visproj.folding.files import empty_folded
from visproj.supported import MODELS, count, empty_config

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
MEASURED = PICTURES / "measured.csv"
PERCEIVER = "DeepSpeed-VisualChat"

# Text stays text, and the same figure gives the same file.
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "visproj",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
BEFORE, AFTER, THIRD = "#9aa0aa", "#5c6bc0", "#e39a3b"
LIGHT = {BEFORE: "#eceef1", AFTER: "#dfe3f7", "none": "#ffffff"}


class Measured(NamedTuple):
    """One row of ``measured.csv``, each number as the command printed it.

    Attributes:
        device: The machine.
        call: How the projector was called.
        dtype: Of weights and features.
        images: Per call.
        implementation: The name of what was timed.
        baseline: The implementation that ``ratio`` compares with; empty for a time.
        ratio: Time of the baseline / time of the implementation.
        lowest: Smallest ratio of the paired runs, where they were paired.
        highest: Largest one.
        microseconds: Median time of a call; empty for a ratio.
        command: The command that printed it.
    """

    device: str
    call: str
    dtype: str
    images: str
    implementation: str
    baseline: str
    ratio: str
    lowest: str
    highest: str
    microseconds: str
    command: str

    @property
    def place(self) -> tuple[str, ...]:
        """Everything but the implementation and its numbers."""
        return self[:4]


def read_measured(path: Path = MEASURED) -> list[Measured]:
    """Read the measured figures."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Measured(**row) for row in csv.DictReader(file)]


def stage_gmacs() -> tuple[dict[str, float], dict[str, float]]:
    """Count the GMACs of every stage of the Perceiver for one image, published and folded.

    The modules run on fake tensors, which have no numbers. Products are told apart by their order.
    """
    entry = MODELS[PERCEIVER]
    with torch.device("meta"):
        projector = entry.build()
        heads, lang_dim = projector.num_heads, projector.embed_dim
        published = UpstreamPerceiver(projector.vis_dim, lang_dim, heads, entry.grid)
    folded = empty_folded(entry.folded, empty_config(entry))
    tokens = entry.grid[0] * entry.grid[1] + entry.has_cls
    x = torch.empty(1, tokens, projector.vis_dim, dtype=torch.bfloat16)
    products: list[list[tuple[str, float]]] = []
    for module in (published, folded):
        module = module.bfloat16().to_empty(device="cpu").requires_grad_(False).eval()
        launches = model.costs(module, [x], trains=False)["forward"].launches
        products.append([(found.name, found.flops / 2e9) for found in launches if found.flops])
    return _published_stages(products[0]), _folded_stages(products[1])


def _published_stages(products: list[tuple[str, float]]) -> dict[str, float]:
    kv, query, key, value, scores, pooling, out, last = (gmacs for _, gmacs in products)
    return {
        "kv_proj": kv,
        "query projection": query,
        "key projection": key,
        "value projection": value,
        "attention": scores + pooling,
        "out_proj": out,
        "Linear": last,
    }


def _folded_stages(products: list[tuple[str, float]]) -> dict[str, float]:
    """Attention parts the two scaled products, each of which begins with the product itself."""
    (at,) = (i for i, (name, _) in enumerate(products) if "attention" in name)
    gmacs = [found for _, found in products]
    return {
        "keys and values": gmacs[0],
        "their row scale": sum(gmacs[1:at]),
        "attention": gmacs[at],
        "output": gmacs[at + 1],
        "its row scale": sum(gmacs[at + 2 :]),
    }


def multiply_adds_figure() -> Any:
    """Draw the GMACs per image of every model that converts, published and folded."""
    from matplotlib.figure import Figure

    counted = {name: count(entry) for name, entry in MODELS.items()}
    figure = Figure(figsize=(9, 5.6))
    axes = figure.add_axes((0.22, 0.12, 0.76, 0.74))
    for y, found in enumerate(counted.values()):
        pairs = ((-0.2, found.published, BEFORE), (0.2, found.folded, AFTER))
        for offset, multiply_adds, colour in pairs:
            gmacs = multiply_adds / 1e9
            axes.barh(y + offset, gmacs, 0.36, color=colour)
            text = f"{gmacs:.2f}"
            if colour == AFTER:
                fewer = found.published / found.folded
                text += f" ({fewer:.2f} times fewer, form {found.form})"
            axes.text(gmacs + 0.5, y + offset, text, va="center", fontsize=9.5)
    axes.set_yticks(range(len(counted)), list(counted))
    axes.set_ylim(len(counted) - 0.45, -0.55)
    axes.set_xlim(0, 60)
    axes.set_xlabel("GMACs (10⁹ multiply-adds) per image at the released widths")
    _legend(figure, {"published": BEFORE, "folded": AFTER})
    _title(figure, "Multiply-adds per image", "Counted from the code, not measured")
    return figure


def speedups_figure(rows: Sequence[Measured]) -> Any:
    """Draw how many times as fast as upstream and fair the folded Perceiver was measured."""
    from matplotlib.figure import Figure

    ratios = [row for row in rows if row.baseline and row.implementation == "folded"]
    times = {(row.place, row.implementation): row.microseconds for row in rows if not row.baseline}
    places = [*dict.fromkeys(row.place for row in ratios)]
    figure = Figure(figsize=(9, 5.2))
    axes = figure.add_axes((0.25, 0.2, 0.72, 0.64))
    colours = {"upstream": AFTER, "fair": THIRD}
    for row in ratios:
        offset = -0.2 if row.baseline == "upstream" else 0.2
        y, ratio = places.index(row.place) + offset, float(row.ratio)
        axes.barh(y, ratio, 0.36, color=colours[row.baseline])
        end, text = ratio, row.ratio
        if row.lowest:
            axes.plot((float(row.lowest), float(row.highest)), (y, y), color="black", linewidth=1.2)
            end, text = float(row.highest), f"{text} ({row.lowest} to {row.highest})"
        if time := times.get((row.place, "folded")):
            text += f" ({time} µs instead of {times[row.place, row.baseline]} µs)"
        axes.text(end + 0.04, y, text, va="center", fontsize=9.5)
    for y, place in enumerate(places):
        if sum(row.place == place for row in ratios) < 2:
            axes.text(0.04, y - 0.2, "upstream: not run", va="center", fontsize=9.5)
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(places)), [_place(*place) for place in places])
    axes.set_ylim(len(places) - 0.45, -0.55)
    axes.set_xlim(0, 4.8)
    axes.set_xlabel("time of the baseline / time of the folded Perceiver")
    _legend(figure, {f"times as fast as {name}": colour for name, colour in colours.items()})
    _title(figure, "Speed of the folded Perceiver", "Measured at C 1024, D 4096, 256 tokens")
    notes = "CPU: medians of paired runs with the smallest and largest ratio. "
    figure.text(0.02, 0.02, notes + "H200: medians, calls recorded as CUDA graphs.", fontsize=9.5)
    return figure


def _place(device: str, call: str, dtype: str, images: str) -> str:
    del call  # the picture's note says it
    return f"{device}, {dtype}\n{images} image{'s' * (images != '1')} per call"


def fold_figure() -> Any:
    """Draw the Perceiver's stages before and after folding, with the GMACs of each."""
    from matplotlib.figure import Figure

    before, after = stage_gmacs()
    with torch.device("meta"):
        projector = MODELS[PERCEIVER].build()
    width, lang_dim, tokens = projector.vis_dim, projector.embed_dim, projector.num_queries
    ends = f"features [{tokens}, {width}]", f"visual tokens [{tokens}, {lang_dim}]"
    totals = [sum(stages.values()) for stages in (before, after)]
    figure = Figure(figsize=(9, 7.3))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 9), ylim=(0, 7.3))
    axes.set_axis_off()
    for x, name, total in zip((2.75, 7.25), ("published", "folded"), totals, strict=True):
        axes.text(
            x, 6.98, f"{name}: {total:.1f} GMACs", ha="center", va="center", weight="bold", size=12
        )
    for box in (*_published_boxes(before, *ends), *_folded_boxes(after, *ends)):
        _draw(axes, box)
    for arrow in ARROWS:
        _arrow(axes, *arrow)
    sizes = f"C {width}, D {lang_dim}, {tokens} tokens and queries"
    note = f"GMACs (10⁹ multiply-adds) per image at {sizes}, in PyTorch. Counted from the code."
    axes.text(0.2, 0.14, note, va="center", fontsize=9.5)
    return figure


class Box(NamedTuple):
    """A box of the diagram in inches: left, bottom, right, top."""

    text: str
    left: float
    bottom: float
    right: float
    top: float
    colour: str = "none"


# Bottoms of the rows, and the columns: queries, keys and values; folded, queries and features.
ROWS = [6.3 - 0.64 * row for row in range(10)]
HIGH = 0.45
QUERY, KEY, VALUE, BOTH = (0.2, 1.8), (2.05, 3.65), (3.75, 5.35), (2.05, 5.35)
CONSTANT, DIRECT = (5.75, 6.85), (7.05, 8.8)


def _at(text: str, row: int, columns: tuple[float, float], colour: str = "none") -> Box:
    return Box(text, columns[0], ROWS[row], columns[1], ROWS[row] + HIGH, colour)


def _published_boxes(gmacs: dict[str, float], features: str, output: str) -> list[Box]:
    def product(name: str, row: int, columns: tuple[float, float], end: str = "\n") -> Box:
        return _at(f"{name}{end}{gmacs[name]:.2f}", row, columns, BEFORE)

    whole = (QUERY[0], VALUE[1])
    return [
        _at("learned queries", 0, QUERY),
        _at(features, 0, BOTH),
        _at("LayerNorm", 1, QUERY),
        product("kv_proj", 1, BOTH, ": "),
        _at("+ positions", 2, QUERY),
        _at("LayerNorm", 2, BOTH),
        _at("+ positions", 3, KEY),
        product("query projection", 4, QUERY),
        product("key projection", 4, KEY),
        product("value projection", 4, VALUE),
        product("attention", 5, whole, ": "),
        product("out_proj", 6, whole, ": "),
        _at("LayerNorm", 7, whole),
        product("Linear", 8, whole, ": "),
        _at(output, 9, whole),
    ]


def _folded_boxes(gmacs: dict[str, float], features: str, output: str) -> list[Box]:
    keys = gmacs["keys and values"], gmacs["their row scale"]
    tail = gmacs["output"], gmacs["its row scale"]
    whole = (CONSTANT[0], DIRECT[1])
    top = ROWS[1] + HIGH
    return [
        _at(features, 0, DIRECT),
        _at("constant\nqueries", 4, CONSTANT),
        Box(
            f"one product\nwith a row scale\n{sum(keys):.2f}\n\n"
            f"product: {keys[0]:.2f}\nrow scale: {keys[1]:.2f}\n\n"
            "+ constants:\nprojected positions\nand values' shift",
            DIRECT[0],
            ROWS[4],
            DIRECT[1],
            top,
            AFTER,
        ),
        _at(f"attention: {gmacs['attention']:.2f}", 5, whole, AFTER),
        Box(
            f"one product with a row scale\n{sum(tail):.2f}\n\n"
            f"product: {tail[0]:.2f}\nrow scale: {tail[1]:.2f}",
            whole[0],
            ROWS[8],
            whole[1],
            ROWS[6] + HIGH,
            AFTER,
        ),
        _at(output, 9, whole),
    ]


def _down(x: float, above: int, below: int) -> tuple[float, float, float, float]:
    """Return an arrow from the box of one row to the box of another."""
    return x, ROWS[above], x, ROWS[below] + HIGH


_Q, _K, _V, _B, _C, _D = (
    (left + right) / 2 for left, right in (QUERY, KEY, VALUE, BOTH, CONSTANT, DIRECT)
)
_WHOLE, _RIGHT = (QUERY[0] + VALUE[1]) / 2, (CONSTANT[0] + DIRECT[1]) / 2
ARROWS = [
    _down(_Q, 0, 1),
    _down(_Q, 1, 2),
    _down(_Q, 2, 4),
    _down(_B, 0, 1),
    _down(_B, 1, 2),
    _down(_K, 2, 3),
    _down(_K, 3, 4),
    _down(_V, 2, 4),
    *(_down(x, 4, 5) for x in (_Q, _K, _V, _C, _D)),
    *(_down(_WHOLE, row, row + 1) for row in (5, 6, 7, 8)),
    _down(_D, 0, 1),
    _down(_RIGHT, 5, 6),
    _down(_RIGHT, 8, 9),
]


def _draw(axes: Any, box: Box) -> None:
    from matplotlib.patches import Rectangle

    width, height = box.right - box.left, box.top - box.bottom
    edge = "#70757f" if box.colour == "none" else box.colour
    fill = LIGHT[box.colour]
    axes.add_patch(Rectangle((box.left, box.bottom), width, height, facecolor=fill, edgecolor=edge))
    middle = (box.left + box.right) / 2, (box.bottom + box.top) / 2
    axes.text(*middle, box.text, ha="center", va="center", fontsize=10.5, linespacing=1.25)


def _arrow(axes: Any, x: float, y: float, to_x: float, to_y: float) -> None:
    style = {"arrowstyle": "-|>", "color": "#40444c", "linewidth": 1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (to_x, to_y), (x, y), arrowprops=style)


def _title(figure: Any, title: str, source: str) -> None:
    figure.text(0.02, 0.955, title, weight="bold", size=12, va="center")
    figure.text(0.02, 0.905, source, size=10, va="center")


def _legend(figure: Any, colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=label) for label, colour in colours.items()]
    figure.legend(handles=handles, loc="upper right", bbox_to_anchor=(0.99, 0.985), frameon=False)


def draw(folder: Path) -> list[Path]:
    """Write every picture into ``folder`` and return their paths."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        figures = {
            "multiply_adds": multiply_adds_figure(),
            "speedups": speedups_figure(read_measured()),
            "fold": fold_figure(),
        }
        return [_save(figure, folder / f"{name}.svg") for name, figure in figures.items()]


def _save(figure: Any, path: Path) -> Path:
    with replacing(path) as partial:
        # White, also on a dark page: the text is black.
        metadata = {"Date": None, "Creator": None}
        figure.savefig(partial, format="svg", facecolor="white", metadata=metadata)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the pictures and print their paths.

    Raises:
        MissingPackageError: Without matplotlib.
        OSError: If the folder cannot be written to.
    """
    parser = Parser("python -m benchmarks.pictures", __doc__)
    parser.add_argument("--out", type=Path, default=PICTURES, help="the folder; docs/pictures")
    options = parser.parse_args(arguments)
    require("matplotlib")
    check_folder(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    for path in draw(options.out):
        print(path)
    return 0


if __name__ == "__main__":
    run_command(main)
