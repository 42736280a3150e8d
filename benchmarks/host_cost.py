"""The host time of a call: ``python -m benchmarks.host_cost``, without a GPU.

The kernels are compiled for an H100 and launched by a driver that does nothing. The time is that of
everything that Python and PyTorch do before the driver, in one thread. The tensors are on the CPU
and so small that their arithmetic takes hardly any time. Not included is what a GPU's device guard,
and a driver that packs arguments, would add. Upstream's eager module is timed in turn with ours.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from unittest import mock

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    if find_spec("triton") is None:
        sys.exit("error: triton is not installed: pip install triton")

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from benchmarks.command import Parser, positive_int, run_command
from benchmarks.driver import AbsentDriver
from benchmarks.peers import FairPerceiver, UpstreamPerceiver
from visproj import PerceiverProjector, backend, fold, use_backend
from visproj.kernels import device

WIDTH, LANG_DIM, GRID, HEADS, TOKENS = 8, 16, (2, 2), 1, 4
REPEATS = 10


@contextmanager
def launching_nowhere(
    launched: Callable[..., None] = lambda *arguments: None, architecture: int = 90
) -> Iterator[None]:
    """Inside the block, launches for an absent GPU call ``launched`` and run no kernel."""
    target = GPUTarget("cuda", architecture, 32)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.dict(os.environ, VISPROJ_CACHE_DIR=folder))
        for owner, name, value in (
            (driver, "_active", AbsentDriver(target, launched)),
            (backend, "_why_not", lambda where: None),
            (torch.cuda, "get_device_name", lambda where=None: "absent"),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (triton.testing, "do_bench", lambda run, **options: 1.0),  # chooses the first one
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        device.architecture.cache_clear()
        stack.callback(device.architecture.cache_clear)
        yield


def calls() -> dict[str, Callable[[], object]]:
    """Return calls with one image by name; those with ", training" include the backward."""
    x = torch.randn(1, 1 + TOKENS, WIDTH)
    projector = PerceiverProjector(WIDTH, LANG_DIM, query_grid=GRID, num_heads=HEADS)
    upstream = UpstreamPerceiver(WIDTH, LANG_DIM, HEADS, GRID)
    fair = FairPerceiver(WIDTH, LANG_DIM, HEADS, GRID)
    return {
        "upstream": _infers(upstream, x),
        "fair": _infers(fair, x),
        "folded": _infers(fold(projector, form="keys"), x),
        "unfolded": _infers(projector, x),
        "upstream, training": _trains(upstream, x),
        "fair, training": _trains(fair, x),
        "unfolded, training": _trains(projector, x),
    }


def _infers(module: nn.Module, x: Tensor) -> Callable[[], object]:
    return torch.no_grad()(lambda: module(x))


def _trains(module: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: module(x).sum().backward()


def microseconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the thread time per call, µs, all measured in turn: the 10th percentile of rounds."""
    for call in calls.values():
        call()
        call()  # the second call uses the plans that the first has cached
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.thread_time()
            for _ in range(REPEATS):
                call()
            found[name].append((time.thread_time() - begin) / REPEATS)
    return {name: 1e6 * statistics.quantiles(times, n=10)[0] for name, times in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, and in the last line the ratios to upstream's eager module."""
    parser = Parser("python -m benchmarks.host_cost", __doc__)
    parser.add_argument("--rounds", type=positive_int, default=60, help="rounds of ten calls each")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with launching_nowhere(), use_backend("triton"):
        found = microseconds(calls(), max(2, options.rounds))
    title = f"Perceiver, C {WIDTH}, D {LANG_DIM}, fp32, one image, triton {triton.__version__}"
    table = Table(title=title, title_justify="left")
    for column in ("", "µs of the host", "of upstream's"):
        table.add_column(column, justify="right" if column else "left")
    ratios = {}
    for name, value in found.items():
        whole = "upstream, training" if name.endswith("training") else "upstream"
        ratios[name] = f"{value / found[whole]:.2f}"
        table.add_row(name, f"{value:.0f}", ratios[name])
    Console(width=100).print(table)
    print(
        f"host time of upstream's: folded {ratios['folded']} unfolded {ratios['unfolded']} "
        f"training {ratios['unfolded, training']}"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
