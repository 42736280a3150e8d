"""Counted launches, FLOPs and bytes of the Perceiver: ``python -m benchmarks.launches``.

They are counted from the code that runs, on fake tensors, for eager modules and the Triton path.
Launches that depend on weights alone, such as the projection of the queries, are counted
separately.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

if __name__ == "__main__":
    # Counting starts no kernel; interpreting lets the Triton path be taken without a GPU.
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import model, peers
from benchmarks.command import Parser, positive_int, require, run_command
from visproj import PerceiverProjector, use_backend

TOKENS = 256


def build(width: int, lang_dim: int) -> dict[str, tuple[nn.Module, str]]:
    """Return modules in bf16, with uninitialised weights, and the backend that each runs on."""
    heads = max(1, lang_dim // 128)
    with torch.device("meta"):
        modules: dict[str, tuple[nn.Module, str]] = {
            "upstream eager": (peers.UpstreamPerceiver(width, lang_dim, heads), "torch"),
            "fair eager": (peers.FairPerceiver(width, lang_dim, heads), "torch"),
            "visproj, Triton": (PerceiverProjector(width, lang_dim), "triton"),
        }
    return {
        name: (module.bfloat16().to_empty(device="cpu"), backend)
        for name, (module, backend) in modules.items()
    }


def count(batch: int, width: int = 1024, lang_dim: int = 4096) -> dict[str, dict[str, model.Cost]]:
    """Return the costs of forward and backward, by implementation and mode."""
    x = torch.empty(batch, 1 + TOKENS, width, dtype=torch.bfloat16)
    found = {}
    for name, (module, backend) in build(width, lang_dim).items():
        with use_backend(backend):
            found[name] = model.costs(module, [x])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for each batch size."""
    parser = Parser("python -m benchmarks.launches", __doc__)
    parser.add_argument(
        "--batch", type=positive_int, action="append", help="images per call; repeat for more"
    )
    parser.add_argument(
        "--every", action="store_true", help="also list every launch of the Triton path"
    )
    options = parser.parse_args(arguments)
    require("triton")
    console = Console(width=120)
    for images in options.batch or [1, 8, 32]:
        costs = count(images)
        console.print(cost_table(costs, ("forward", "backward"), images))
        if options.every:
            for mode in ("forward", "backward"):
                for launch in costs["visproj, Triton"][mode].launches:
                    note = " (weights alone)" if launch.weights_only else ""
                    gflop, megabytes = launch.flops / 1e9, launch.bytes / 1e6
                    print(f"{mode}: {launch.name} {gflop:.1f} GFLOP {megabytes:.1f} MB{note}")
    return 0


def cost_table(
    costs: dict[str, dict[str, model.Cost]], modes: tuple[str, ...], images: int
) -> Table:
    """Return one row per implementation and mode; the first implementation must be upstream's."""
    table = Table(title=f"Perceiver, C 1024, D 4096, {TOKENS} tokens, bf16, batch {images}")
    columns = ("launches", "on weights alone", "GFLOP", "of upstream's", "MB")
    for column in ("", "mode", *columns):
        table.add_column(column, justify="left" if column in ("", "mode") else "right")
    upstream = next(iter(costs.values()))
    for name, by_mode in costs.items():
        for mode in modes:
            cost = by_mode[mode]
            alone = sum(launch.weights_only for launch in cost.launches)
            table.add_row(
                name,
                mode,
                str(len(cost.launches) - alone),
                str(alone),
                f"{cost.flops / 1e9:.0f}",
                f"{cost.flops / upstream[mode].flops:.3f}",
                f"{sum(launch.bytes for launch in cost.launches) / 1e6:.0f}",
            )
    return table


if __name__ == "__main__":
    run_command(main)
