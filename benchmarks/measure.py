"""Timing, spreads, errors and profiles of calls."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# A call takes the number of the repetition, to choose among rotated inputs.
Call = Callable[[int], object]

# Shorter samples measure the clock and the scheduler instead of the code, s.
MIN_SAMPLE = 2e-3
MIN_ROUNDS, MAX_ROUNDS = 7, 100
MAX_COPIES = 128


@dataclass(frozen=True)
class Spread:
    """Median of some samples and the middle 60 % of them."""

    median: float
    p20: float
    p80: float


def spread(samples: Sequence[float]) -> Spread:
    """Return the median, the 20th and the 80th percentile."""
    if len(samples) < 2:
        return Spread(samples[0], samples[0], samples[0])
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return Spread(statistics.median(samples), p20, p80)


def ratios(others: Sequence[float], own: Sequence[float]) -> Spread:
    """Return how many times longer the other takes, pair by pair: a slowdown of both cancels."""
    return spread([a / b for a, b in zip(others, own, strict=True)])


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Return ``rms(got - truth) / rms(truth)``."""
    return ((got.double() - truth).square().mean() / truth.square().mean()).sqrt().item()


def synchronise(device: torch.device) -> None:
    """Wait for the GPU, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample(call: Call, device: torch.device, repeats: int, first: int = 0) -> float:
    """Return seconds per call, mean of ``repeats`` in a row: wall clock, on a GPU CUDA events."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        for i in range(first, first + repeats):
            call(i)
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3 / repeats
    start = time.perf_counter()
    for i in range(first, first + repeats):
        call(i)
    return (time.perf_counter() - start) / repeats


def paired_samples(
    calls: Mapping[str, Call], device: torch.device, seconds: float, min_rounds: int = MIN_ROUNDS
) -> dict[str, list[float]]:
    """Return samples of seconds per call, measured in turn: A B C A B C.

    Args:
        calls: Calls by name. Each runs twice before the clock starts.
        device: Device that they run on.
        seconds: How long to go on, s; at least ``min_rounds`` and at most ``MAX_ROUNDS`` rounds.
        min_rounds: Minimum number of samples of each call.
    """
    repeats = {}
    for name, call in calls.items():
        call(0)
        repeats[name] = max(1, math.ceil(MIN_SAMPLE / max(1e-7, sample(call, device, 1))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= min_rounds and time.perf_counter() - start > seconds:
            break
        for name, call in calls.items():
            samples[name].append(sample(call, device, repeats[name], done * repeats[name]))
    return samples


def copies(nbytes: int, device: torch.device) -> int:
    """Return how many inputs of ``nbytes`` to rotate so that none is still in the L2 cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_COPIES, 1 + math.ceil(cache / max(1, nbytes)))


def graphed(call: Call, count: int) -> Call:
    """Capture ``call(0)`` to ``call(count - 1)`` in a CUDA graph each, and return their replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(0)
    torch.cuda.current_stream().wait_stream(side)
    graphs = []
    for i in range(count):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(i)
        graphs.append(graph)
    return lambda i: graphs[i % count].replay()


@dataclass(frozen=True)
class Profile:
    """The memory and launches of one call.

    Attributes:
        peak: Peak memory above what was allocated before the call, bytes.
        launches: Number of GPU kernels, copies and fills; ``None`` on a CPU or without permission
            to profile.
        kernel_seconds: Sum of their durations, s; ``None`` in the same cases.
    """

    peak: int
    launches: int | None = None
    kernel_seconds: float | None = None


def profiled(call: Call, device: torch.device) -> Profile:
    """Run ``call`` under the profiler."""
    if device.type != "cuda":
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call(0)
        return Profile(_allocator_peak(profiler))
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call(0)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call(0)
        torch.cuda.synchronize(device)
    kernels = [
        event
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    elapsed = sum(event.time_range.elapsed_us() for event in kernels)
    if not kernels:  # no permission to profile
        return Profile(peak)
    return Profile(peak, len(kernels), elapsed / 1e6)


def _allocator_peak(profiler: Any) -> int:
    """Return the highest sum of allocations and releases that torch's CPU allocator reports."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
