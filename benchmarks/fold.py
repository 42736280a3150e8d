"""The gain from folding on this machine's CPU: ``python -m benchmarks.fold``.

Measures the Perceiver, or with ``--model`` another model's published resampler. Prints times as
ratios of paired runs, peak memory above the weights in a process of its own, multiply-adds from
torch's FLOP counter, and errors against the fp64 oracle. FLOPs and bytes of the Triton kernels are
counted, not measured; their errors are measured in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # does not affect PyTorch's paths, which are timed

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks import launches, measure, model, models
from benchmarks.command import Parser, positive_int, require, run_command
from benchmarks.peers import UpstreamPerceiver
from benchmarks.runtimes import runtime_calls
from visproj import PerceiverProjector, fold, use_backend
from visproj.errors import BackendError
from visproj.reference import projector_ref

CLIP_L, LLAMA_7B, TOKENS = 1024, 4096, launches.TOKENS
MODULES = ("upstream", "fair", "folded")
PACKED_LENGTHS = (256, 576, 1024, 4096)
console = Console(width=120)


def peers(width: int, lang_dim: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return modules with the same weights; upstream's only in fp32, where that is fair."""
    torch.manual_seed(0)
    projector = PerceiverProjector(width, lang_dim).to(dtype)
    built: dict[str, nn.Module] = {"fair": projector, "folded": fold(projector)}
    if dtype == torch.float32:
        upstream = UpstreamPerceiver(width, lang_dim, projector.num_heads)
        upstream.load_state_dict(projector.state_dict())
        built = {"upstream": upstream, **built}
    return built


def inputs(batch: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return the features of one batch, CLS first."""
    return torch.randn(batch, 1 + TOKENS, width).to(dtype)


def _caller(module: Callable[..., object], *x: Tensor) -> measure.Call:
    return lambda _: module(*x)


def multiply_adds(module: nn.Module, x: Tensor) -> float:
    """Count the multiply-adds of one call."""
    return model.costs(module, [x], trains=False)["forward"].flops / 2


def peak_mib(name: str, batch: int, model_name: str | None = None) -> float:
    """Measure the peak memory of one call above the resident memory before it, in a new process.

    In that process malloc maps every larger tensor separately, and returns its memory when it is
    freed. By default it keeps some freed memory, not the same in every run: runs of one module then
    differ by up to 64 MiB.
    """
    command = [sys.executable, "-m", "benchmarks.fold", "--measure-memory", name]
    command += ["--batch", str(batch)] + (["--model", model_name] if model_name else [])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    return float(done.stdout)


def own_peak_mib(name: str, batch: int, model_name: str | None = None) -> float:
    """Measure :func:`peak_mib` in this process. Linux only: it resets the kernel's high-water mark.

    Memory that was freed before is returned to the system first. Otherwise the call would reuse it.
    """

    def status(field: str) -> int:
        found = re.search(
            rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8")
        )
        assert found
        return int(found[1])

    if model_name:
        module = models.modules(model_name, torch.float32)[name]
        first, call = (models.arguments(model_name, n, torch.float32) for n in (1, batch))
    else:
        module = peers(CLIP_L, LLAMA_7B, torch.float32)[name]
        first, call = ((inputs(n, CLIP_L, torch.float32),) for n in (1, batch))
    module(*first)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = status("VmRSS")
    module(*call)
    return (status("VmHWM") - before) / 1024


def errors(dtype: torch.dtype, outliers: bool) -> dict[str, float]:
    """Return the errors of upstream's and the folded modules at a small width, mean of 4 seeds."""
    found: dict[str, list[float]] = {"upstream": [], "folded": [], "folded, Triton": []}
    for seed in range(4):
        torch.manual_seed(seed)
        projector = PerceiverProjector(128, 512).to(dtype)
        upstream = UpstreamPerceiver(128, 512, projector.num_heads).to(dtype)
        upstream.load_state_dict(projector.state_dict())
        x = torch.randn(2, 1 + TOKENS, 128)
        if outliers:
            x[..., [7, 50, 33]] *= torch.tensor([40.0, 25.0, 15.0])
        x = x.to(dtype)
        truth = projector_ref(projector, x)
        found["upstream"].append(measure.relative_error(upstream(x), truth))
        found["folded"].append(measure.relative_error(fold(projector)(x), truth))
        with use_backend("triton"):
            found["folded, Triton"].append(measure.relative_error(fold(projector)(x), truth))
    return {name: statistics.mean(values) for name, values in found.items()}


def time_table(batch: int, pairs: int, runtimes: bool) -> Table:
    """Return medians and ratios of paired runs; with ``runtimes`` also of compilers, in fp32."""
    table = Table(title=f"Perceiver, C 1024, D 4096, {TOKENS} tokens, batch {batch}")
    table.add_column("dtype")
    table.add_column("module")
    for heading in ("s", "upstream / it", "fair / it", "GMACs\nper image"):
        table.add_column(heading, justify="right")
    for dtype in (torch.float32, torch.bfloat16):
        modules = peers(CLIP_L, LLAMA_7B, dtype)
        x = inputs(batch, CLIP_L, dtype)
        callables: dict[str, Callable[[Tensor], Tensor]] = {**modules}
        with console.status(f"timing {dtype}"):
            if runtimes and dtype == torch.float32:
                others = {name: modules[name] for name in ("fair", "folded")}
                found, missing = runtime_calls(others, x)
                callables |= found
                for reason in missing:
                    console.print(f"not measured: {reason}")
            runs = {name: _caller(call, x) for name, call in callables.items()}
            seconds = measure.paired_samples(runs, x.device, seconds=0, min_rounds=pairs)
        for name, taken in seconds.items():
            counted = (
                f"{multiply_adds(modules[name], x) / batch / 1e9:.1f}" if name in modules else "-"
            )
            table.add_row(
                str(dtype).removeprefix("torch."),
                name,
                f"{statistics.median(taken):.2f}",
                *(ratio(seconds.get(other), taken) for other in ("upstream", "fair")),
                counted,
            )
    return table


def ratio(other: list[float] | None, own: list[float]) -> str:
    """Return the median of the paired ratios, with the smallest and the largest."""
    if other is None:
        return "-"
    ratios = [a / b for a, b in zip(other, own, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def model_table(name: str, batch: int, pairs: int) -> Table:
    """Return medians and ratios of paired runs of another model's resampler, and differences."""
    tokens, form = models.MODELS[name].tokens, models.chosen(name)
    table = Table(title=f"{name}, {batch} images of {tokens} tokens; fold chooses {form}")
    table.add_column("dtype")
    table.add_column("module")
    for heading in ("ms", "published / it", "difference", "GMACs\nper image"):
        table.add_column(heading, justify="right")
    for dtype in (torch.float32, torch.bfloat16):
        modules = models.modules(name, dtype)
        call = models.arguments(name, batch, dtype)
        truth = models.features(modules["published"](*call)).double()
        with console.status(f"timing {dtype}"):
            runs = {key: _caller(module, *call) for key, module in modules.items()}
            seconds = measure.paired_samples(runs, call[0].device, seconds=0, min_rounds=pairs)
        for key, taken in seconds.items():
            found = models.features(modules[key](*call))
            cost = models.multiply_adds(modules[key], call)
            table.add_row(
                str(dtype).removeprefix("torch."),
                key,
                f"{1e3 * statistics.median(taken):.0f}",
                ratio(seconds["published"], taken),
                f"{measure.relative_error(found, truth):.1e}",
                f"{cost / batch / 1e9:.2f}",
            )
    return table


def packed_table(pairs: int) -> Table:
    """Return times of images of different sizes, packed, and padded to the largest with a mask."""
    table = Table(title=f"Images of {PACKED_LENGTHS} tokens in one batch, fp32")
    for heading in ("module", "padded s", "packed s", "padded / packed"):
        table.add_column(heading, justify="right")
    torch.manual_seed(0)
    perceiver = PerceiverProjector(CLIP_L, LLAMA_7B, has_cls=False)
    images = [torch.randn(length, CLIP_L) for length in PACKED_LENGTHS]
    grids = [(math.isqrt(length),) * 2 for length in PACKED_LENGTHS]
    x = torch.nn.utils.rnn.pad_sequence(images, batch_first=True)
    padding = torch.arange(x.shape[1]) >= torch.tensor(PACKED_LENGTHS)[:, None]
    for name, module in (("PerceiverProjector", perceiver), ("folded", fold(perceiver))):
        runs: dict[str, measure.Call] = {
            "padded": _caller(partial(module, key_padding_mask=padding), x),
            "packed": _caller(partial(module, images, grid=grids)),
        }
        seconds = measure.paired_samples(runs, x.device, seconds=0, min_rounds=pairs)
        medians = (f"{statistics.median(taken):.2f}" for taken in seconds.values())
        table.add_row(name, *medians, ratio(seconds["padded"], seconds["packed"]))
    return table


def memory_table(batch: int, name: str | None = None) -> Table:
    """Return the peak memory above the weights, by module."""
    table = Table(title=f"Peak memory above the weights, fp32, batch {batch}", title_justify="left")
    table.add_column("module")
    table.add_column("MiB", justify="right")
    which = models.FORMS if name else MODULES
    for module in track(which, "memory", console=console, transient=True):
        table.add_row(module, f"{peak_mib(module, batch, name):.0f}")
    return table


def error_table() -> Table:
    """Return the relative rms errors against the fp64 oracle."""
    table = Table(title="Relative rms error against fp64, C 128, D 512, mean of 4 seeds")
    for heading in ("dtype", "features", "upstream", "folded", "folded, Triton (interpreted)"):
        table.add_column(heading)
    for dtype in (torch.float32, torch.bfloat16):
        for outliers in (False, True):
            found = errors(dtype, outliers)
            table.add_row(
                str(dtype).removeprefix("torch."),
                "3 channels at 15 to 40 x" if outliers else "normal",
                *(f"{error:.1e}" for error in found.values()),
            )
    return table


def triton_tables() -> Iterator[Table]:
    """Yield the counted launches, FLOPs and bytes of the kernels, for one image and for eight."""
    projector = PerceiverProjector(CLIP_L, LLAMA_7B)
    folded = fold(projector, dtype=torch.bfloat16)
    for batch in (1, 8):
        x = inputs(batch, CLIP_L, torch.bfloat16)
        with use_backend("triton"):
            cost = model.costs(folded, [x], trains=False)
        costs = {**launches.count(batch), "visproj, Triton, folded": cost}
        yield launches.cost_table(costs, ("forward",), batch)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the folded Perceiver with upstream's module and with a fair baseline.

    Raises:
        MissingPackageError: Without Triton, whose kernels are interpreted.
        BackendError: On another system than Linux, whose kernel reports peak memory.
    """
    parser = Parser("python -m benchmarks.fold", __doc__)
    parser.add_argument(
        "--batch", type=positive_int, help="images per call; by default 8 for the Perceiver"
    )
    parser.add_argument("--model", choices=models.MODELS, help="another model's resampler")
    parser.add_argument(
        "--pairs", type=positive_int, default=7, help="paired runs; the median is shown"
    )
    parser.add_argument(
        "--runtimes",
        action="store_true",
        help="also time torch.compile and, if they are installed, onnxruntime and OpenVINO",
    )
    parser.add_argument(
        "--packed", action="store_true", help="time images of different sizes, packed and padded"
    )
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    name = options.model
    batch = options.batch or (models.MODELS[name].images if name else 8)
    if options.measure_memory:
        print(own_peak_mib(options.measure_memory, batch, name))
        return 0
    require("triton")
    if not Path("/proc/self/clear_refs").exists():
        raise BackendError("peak memory is read from /proc/self, which only Linux has")
    threads = torch.get_num_threads()
    console.print(
        f"torch {torch.__version__}, {threads} threads of {os.cpu_count()} on {platform.machine()}"
    )
    if options.packed:
        console.print(packed_table(options.pairs))
        return 0
    if name:
        console.print(model_table(name, batch, options.pairs))
        console.print(memory_table(batch, name))
        return 0
    console.print(
        "upstream: DeepSpeed-VisualChat's arithmetic; queries are projected once per image, and "
        "attention maps are written to memory.\nfair: the same weights in visproj's plain module, "
        "with SDPA and queries projected once per call."
    )
    console.print(time_table(batch, options.pairs, options.runtimes))
    console.print(memory_table(batch))
    console.print(error_table())
    console.print(*triton_tables())
    return 0


if __name__ == "__main__":
    run_command(main)
