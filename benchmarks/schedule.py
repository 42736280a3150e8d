"""A model of the time of a call on a GPU, not a measurement: ``python -m benchmarks.schedule``.

Every launch is cut into its actual tiles, and each tile goes to the first processor that is free. A
launch with fewer tiles than processors leaves some of them idle, and so does the last round of a
larger launch. *Perfect rates* assumes that a processor reaches its share of the published peak, and
that a tile takes only the time of its arithmetic. *Sober* assumes the rates that tiles of their
size reach, and adds the time that every tile takes before and after its loop. For PyTorch's own
matmuls it assumes the library's tile size that is then the fastest. Host times are measured with
``benchmarks.host_cost`` on this machine, and a call takes the longer of host and device time.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple
from unittest import mock

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    if find_spec("triton") is None:
        sys.exit("error: triton is not installed: pip install triton")

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import host_cost, model
from benchmarks.command import Parser, positive_int, run_command
from benchmarks.peers import FairPerceiver, UpstreamPerceiver
from visproj import PerceiverProjector, fold, use_backend
from visproj.kernels import cross_attention_queries, layer_norm, tuning
from visproj.kernels.launch import Launch
from visproj.kernels.makespan import Tiles, product_tiles

WIDTH, LANG_DIM, TOKENS = 1024, 4096, 256


@dataclass(frozen=True)
class Processors:
    """A GPU in this model; rates are those of the whole GPU.

    Attributes:
        architecture: Compute capability whose configurations are used.
        count: Number of streaming multiprocessors.
        rates: Published peaks: matmuls, attention forward and backward, memory.
        l2: Bytes per second out of the L2 cache.
    """

    architecture: int
    count: int
    rates: model.Machine
    l2: float


# Peaks of H100 and A100 as in benchmarks/model.py. B200: products ThunderKittens' README (4096
# cubed), attention FlashAttention-4 (arXiv 2603.05451), its backward in the H100's proportion, 90 %
# of the published 8 TB/s. Out of L2: an estimate for the H100, the others in proportion.
MACHINES = {
    "H100": Processors(90, 132, model.MACHINES["H100"], 8.0e12),
    "A100": Processors(80, 108, model.MACHINES["A100"], 4.5e12),
    "B200": Processors(100, 148, model.Machine(1540e12, 1613e12, 1042e12, 7.2e12), 15e12),
}
AROUND = 4e-6  # seconds before and after the loop of a tile
# Fraction of attention's peak that is reached: 9.5 µs for 128 queries, 256 keys, d 128 on an H100.
ATTENTION = 0.48
GAP = 1e-6  # seconds between two launches
LIBRARY = ((128, 256), (128, 128), (64, 128), (64, 64))  # tiles that cuBLAS may take


@dataclass(frozen=True)
class Row:
    """A launch in time.

    Attributes:
        name: Name of the kernel or of PyTorch's operation.
        tiles: Number of tiles; 0 if only memory traffic counts.
        waves: Rounds of tiles.
        used: Share of the processors' time that is not idle, at perfect rates.
        perfect: Time at perfect rates, s.
        sober: Sober time, s.
    """

    name: str
    tiles: int
    waves: int
    used: float
    perfect: float
    sober: float


def row(launch: model.Launch, machine: Processors) -> Row:
    """Schedule one launch."""
    memory = launch.bytes / machine.rates.bandwidth
    if not launch.flops:
        return Row(launch.name, 0, 0, 1.0, memory, memory + GAP)
    peak = _peak(launch.name, machine.rates)

    def soberly(tiles: Tiles) -> float:
        reached, around = (tiles.reached(), AROUND) if tiles.size else (ATTENTION, 0.0)
        seconds = tiles.seconds(machine.count, peak * reached, around)
        return max(seconds, 2 * tiles.traffic / machine.l2)

    tiles = min(_tiles(launch), key=soberly)
    perfect, sober = tiles.seconds(machine.count, peak), soberly(tiles)
    count = len(tiles.work)
    return Row(
        launch.name,
        count,
        math.ceil(count / (machine.count * tiles.shared_by(machine.count))),
        sum(tiles.work) / peak / perfect,
        max(perfect, memory),
        max(sober, memory) + GAP,
    )


def _peak(name: str, rates: model.Machine) -> float:
    if "attention" not in name:
        return rates.matmul
    return rates.attention_backward if "_bwd" in name or "backward" in name else rates.attention


def _tiles(launch: model.Launch) -> list[Tiles]:
    """Cut a launch into tiles; for PyTorch's matmuls in every way that the library may."""
    started = launch.started
    if started is None:
        if "attention" in launch.name:
            *batch, queries, _ = launch.shape
            count = math.prod(batch) * math.ceil(queries / 128)
            return [Tiles([launch.flops / count] * count)]
        *batch, rows, columns = launch.shape
        depth = round(launch.flops / (2 * math.prod(launch.shape)))
        images = math.prod(batch)
        return [product_tiles(images, rows, columns, depth, (*tile, 1)) for tile in LIBRARY]
    if started.kernel.__name__ == "_linear_fwd_kernel":
        return [_own_product(started)]
    return [Tiles([launch.flops / started.programs] * started.programs)]


def _own_product(launch: Launch) -> Tiles:
    """Return the tiles of visproj's matmul in the kernel's order; triangular ones vary in depth."""
    rest = launch.rest
    sizes = rest["images"], rest["length"], rest["N"], rest["K"], launch.config.blocks
    return product_tiles(*sizes, triangular=rest["TRIANGULAR"], group=rest["GROUP_M"])


def modules() -> dict[str, nn.Module]:
    """Return the modules that are compared, in bf16."""
    projector = PerceiverProjector(WIDTH, LANG_DIM)
    found: dict[str, nn.Module] = {"folded": fold(projector, dtype=torch.bfloat16)}
    found["unfolded"] = projector.bfloat16()
    for name, kind in (("fair", FairPerceiver), ("upstream", UpstreamPerceiver)):
        with torch.device("meta"):
            module = kind(WIDTH, LANG_DIM, LANG_DIM // 128)
        found[name] = module.bfloat16().to_empty(device="cpu")
    return found


def schedules(
    modules: dict[str, nn.Module], machine: Processors, batch: int
) -> dict[tuple[str, str], list[Row]]:
    """Return the launches of every module, by its name and ``forward`` or ``backward``."""
    x = torch.empty(batch, 1 + TOKENS, WIDTH, dtype=torch.bfloat16)
    found = {}
    with ExitStack() as stack:
        stack.enter_context(host_cost.launching_nowhere(architecture=machine.architecture))
        for module in (cross_attention_queries, layer_norm, tuning):
            count = mock.patch.object(module, "multiprocessors", return_value=machine.count)
            stack.enter_context(count)
        for name, module in modules.items():
            trains = name != "folded"
            with use_backend("triton"):
                costs = model.costs(module, [x], trains=trains)
            for mode in ("forward", "backward") if trains else ("forward",):
                found[name, mode] = [row(launch, machine) for launch in costs[mode].launches]
    return found


def launch_table(title: str, rows: Sequence[Row]) -> Table:
    """Return a table with a line for every launch."""
    table = Table(title=title, title_justify="left")
    for column in ("launch", "tiles", "waves", "SMs used", "µs, perfect rates", "µs, sober"):
        table.add_column(column, justify="left" if column == "launch" else "right")
    for found in rows:
        counts = (
            (str(found.tiles), str(found.waves), f"{found.used:.0%}") if found.tiles else ("",) * 3
        )
        table.add_row(found.name, *counts, f"{1e6 * found.perfect:.1f}", f"{1e6 * found.sober:.1f}")
    return table


class Total(NamedTuple):
    """The time of a call, µs: the device at perfect rates, the device soberly, and the host."""

    launches: int
    perfect: float
    sober: float
    host: float

    @property
    def longest(self) -> float:
        """The time of the call, µs: the longer of the sober device time and the host time."""
        return max(self.sober, self.host)


def total(key: tuple[str, str], rows: Sequence[Row], host: dict[str, float]) -> Total:
    """Add up the launches of ``(name, mode)``; a backward's host time is training less forward."""
    name, mode = key
    waits = host[name] if mode == "forward" else host[f"{name}, training"] - host[name]
    perfect = 1e6 * sum(launch.perfect for launch in rows)
    return Total(len(rows), perfect, 1e6 * sum(launch.sober for launch in rows), waits)


def total_table(title: str, totals: dict[tuple[str, str], Total]) -> Table:
    """Return a table with a line for every module and mode."""
    table = Table(title=title, title_justify="left")
    columns = ("launches", "perfect rates", "sober", "host", "the longer", "upstream / it")
    for column in ("µs, a model", "mode", *columns):
        table.add_column(column, justify="right" if column in columns else "left")
    for (name, mode), found in totals.items():
        ratio = totals["upstream", mode].longest / found.longest
        times = (f"{time:.0f}" for time in (*found[1:], found.longest))
        table.add_row(name, mode, str(found.launches), *times, f"{ratio:.2f}")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every launch and the totals; the last line has the folded form's."""
    parser = Parser("python -m benchmarks.schedule", __doc__)
    parser.add_argument("--machine", choices=MACHINES, default="H100", help="GPU of the model")
    parser.add_argument(
        "--batch", type=positive_int, action="append", help="images per call; repeat for more"
    )
    parser.add_argument(
        "--rounds", type=positive_int, default=20, help="rounds of the host's timing"
    )
    options = parser.parse_args(arguments)
    machine, batches = MACHINES[options.machine], options.batch or [1, 8, 32]
    torch.set_num_threads(1)
    with host_cost.launching_nowhere(), use_backend("triton"):
        host = host_cost.microseconds(host_cost.calls(), max(2, options.rounds))
    compared = modules()
    console, folded = Console(width=110), []
    for batch in batches:
        about = f"C {WIDTH}, D {LANG_DIM}, {TOKENS} tokens, bf16, batch {batch}, {options.machine}"
        found = schedules(compared, machine, batch)
        for (name, mode), rows in found.items():
            console.print(launch_table(f"{name} {mode}, {about} (model)", rows))
        totals = {key: total(key, rows, host) for key, rows in found.items()}
        console.print(total_table(f"Perceiver, {about}", totals))
        folded.append(f"{totals['folded', 'forward'].perfect:.0f}")
    print(
        f"folded on {options.machine} at perfect rates, {' '.join(map(str, batches))} images: "
        f"{' '.join(folded)} us"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
