"""Build, check and time the implementations of a group, and return rows of results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn

from benchmarks import measure, model
from benchmarks.cases import (
    BASELINES,
    DTYPES,
    GRAPH_MODE,
    Group,
    Implementation,
    Shape,
    Task,
)
from benchmarks.ceilings import Ceilings
from benchmarks.check import Truth, Verdict, check, checked_images, find_truth
from benchmarks.results import FAILED, LEFT_OUT, Row

MIB = 2**20
# Autograd or CUDA graphs kept at once. Each holds more memory than its inputs, so that a few of
# them fill the cache.
MOST_GRAPHS = 8


@dataclass
class Candidate:
    """An implementation at a shape: its callable, its costs, and the result of its check.

    ``left_out`` says why it did not run; ``call`` is then ``None``.
    """

    entry: Implementation
    left_out: str | None = None
    module: nn.Module | None = None
    call: Callable[..., Tensor] | None = None
    costs: dict[str, model.Cost] | None = None
    verdict: Verdict = field(default_factory=Verdict)

    @property
    def fit(self) -> bool:
        """True if it may be timed."""
        return self.call is not None and self.verdict.failure is None

    def has(self, mode: str) -> bool:
        """Return whether it has a backward, if ``mode`` needs one."""
        return self.entry.trains or mode in ("forward", GRAPH_MODE)

    def cost(self, mode: str) -> model.Cost:
        """Return the counted cost of a call; a CUDA graph has that of the forward."""
        assert self.costs is not None
        return self.costs["forward" if mode == GRAPH_MODE else mode]


@dataclass
class Prepared:
    """A group ready to be timed."""

    group: Group
    device: torch.device
    inputs: list[tuple[Tensor, ...]]
    truth: Truth
    candidates: list[Candidate]

    def calls(self, mode: str) -> tuple[dict[str, measure.Call], dict[str, str]]:
        """Return the calls to time, and the errors of those that would not run, both by name.

        A call that raises, because memory is short or it cannot be captured, must not stop the
        others.
        """
        calls, failures = {}, {}
        for candidate in self.candidates:
            if candidate.fit and candidate.has(mode):
                assert candidate.module is not None
                candidate.module.train(mode not in ("forward", GRAPH_MODE))
                try:
                    call = self.call(candidate, mode)
                    call(0)
                    calls[candidate.entry.name] = call
                except Exception as error:
                    failures[candidate.entry.name] = _one_line(error)
        return calls, failures

    def working_sets(self, mode: str) -> set[int]:
        """Return the bytes that each candidate must at least read and write in this mode."""
        return {
            candidate.cost(mode).min_bytes
            for candidate in self.candidates
            if candidate.fit and candidate.has(mode)
        }

    def call(self, candidate: Candidate, mode: str) -> measure.Call:
        """Return a call of a candidate that chooses its inputs by the number it is given.

        For a backward alone, the autograd graphs are built here, one per input up to a limit.
        """
        run, count = candidate.call, len(self.inputs)
        assert run is not None
        if mode == "forward":
            return lambda i: run(*self.inputs[i % count])
        if mode == GRAPH_MODE:
            return measure.graphed(lambda i: run(*self.inputs[i]), min(count, MOST_GRAPHS))
        gradient = self.truth.gradient
        assert candidate.module is not None
        weights = list(candidate.module.parameters())
        leaves = [[x for x in (*weights, *inputs) if x.requires_grad] for inputs in self.inputs]
        if mode == "forward+backward":
            return lambda i: torch.autograd.grad(
                run(*self.inputs[i % count]), leaves[i % count], gradient
            )
        outputs = [run(*inputs) for inputs in self.inputs[:MOST_GRAPHS]]
        return lambda i: torch.autograd.grad(
            outputs[i % len(outputs)], leaves[i % len(outputs)], gradient, retain_graph=True
        )


def prepare(group: Group, device: torch.device) -> Prepared:
    """Build and check a group's candidates."""
    torch.manual_seed(0)
    task, shape = group.task, group.shape
    dtype = DTYPES[shape.dtype]
    with torch.device(device):
        reference = _roughen(task.reference(shape)).to(dtype)
    make = _input_maker(task, shape, device)
    inputs = [make()]
    count = measure.copies(sum(x.nbytes for x in inputs[0]), device)
    inputs += [make() for _ in range(count - 1)]
    flops = model.costs(reference, inputs[0], trains=False)["forward"].flops
    images = checked_images(shape.batch, flops, device)
    truth = find_truth(task, shape, reference, tuple(x.detach() for x in inputs[0]), images)
    candidates = [
        _candidate(entry, group, reference, inputs[0], truth) for entry in group.implementations()
    ]
    return Prepared(group, device, inputs, truth, candidates)


def _roughen(module: nn.Module) -> nn.Module:
    """Add noise to biases and gains, because at 0 and 1 errors in them would not show."""
    with torch.no_grad():
        for weight in module.parameters():
            if weight.requires_grad and weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
    return module


def _input_maker(
    task: Task, shape: Shape, device: torch.device
) -> Callable[[], tuple[Tensor, ...]]:
    def make() -> tuple[Tensor, ...]:
        return tuple(
            torch.randn(size, device=device)
            .to(DTYPES[shape.dtype])
            .requires_grad_(task.input_gradients)
            for size in task.inputs(shape)
        )

    return make


def _candidate(
    entry: Implementation,
    group: Group,
    reference: nn.Module,
    inputs: tuple[Tensor, ...],
    truth: Truth,
) -> Candidate:
    """Build and check an implementation; if it raises, it has failed."""
    shape, device = group.shape, inputs[0].device
    if reason := entry.missing(shape, device):
        return Candidate(entry, left_out=reason)
    candidate = Candidate(entry)
    try:
        with torch.device("meta"):
            module = entry.build(shape)
        # All implementations share the same tensors.
        module.load_state_dict(reference.state_dict(), assign=True)
        if entry.convert:
            module = entry.convert(module, shape)
        candidate.module = module
        candidate.costs = model.costs(
            module, inputs, trains=entry.trains, input_gradients=group.task.input_gradients
        )
        candidate.call = _compiled(module) if entry.compiled else module
        candidate.verdict = check(
            candidate.call,
            dict(module.named_parameters()),
            inputs,
            truth,
            shape.dtype,
            trains=entry.trains and group.modes != ("forward",),
        )
    except Exception as error:  # the other implementations go on
        candidate.verdict = Verdict(failure=_one_line(error))
    return candidate


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _compiled(module: nn.Module) -> Callable[..., Tensor]:
    # Earlier shapes count towards a limit beyond which the compiler gives up.
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, dynamic=False)


def measured(
    group: Group,
    device: torch.device,
    ceilings: Ceilings,
    *,
    seconds: float,
    graphs: bool = False,
) -> Iterator[list[Row]]:
    """Check a group, then time it mode by mode; yield the rows of each mode.

    Args:
        group: The group to measure.
        device: Device to run on.
        ceilings: The machine's peak rates, which are measured again with every mode.
        seconds: Time for all implementations together in one mode, s; the minimum number of samples
            may take longer.
        graphs: Whether to time the forward from CUDA graphs as well.
    """
    # A compiled backward would otherwise free what it needs to run again.
    with torch._functorch.config.patch(donated_buffer=False):
        prepared = prepare(group, device)
        with_graphs = (GRAPH_MODE,) if graphs and device.type == "cuda" else ()
        for mode in (*group.modes, *with_graphs):
            with torch.set_grad_enabled(mode not in ("forward", GRAPH_MODE)):
                yield _rows(prepared, mode, ceilings, seconds)


def _rows(prepared: Prepared, mode: str, ceilings: Ceilings, seconds: float) -> list[Row]:
    calls, failures = prepared.calls(mode)
    working_sets = prepared.working_sets(mode)
    ceilings.observe(prepared.group.shape, working_sets)
    samples = measure.paired_samples(calls, prepared.device, seconds)
    ceilings.observe(prepared.group.shape, working_sets)
    rows = []
    for candidate in prepared.candidates:
        if not candidate.has(mode):
            continue
        name = candidate.entry.name
        row = _untimed(prepared, candidate, mode, ceilings)
        if name in calls:
            profile = measure.profiled(calls[name], prepared.device)
            row = _timed(row, samples, profile)
        elif name in failures:
            row = replace(row, status=FAILED, reason=failures[name])
        rows.append(row)
    return rows


def _untimed(prepared: Prepared, candidate: Candidate, mode: str, ceilings: Ceilings) -> Row:
    """Return the row of a candidate without its times."""
    shape, verdict = prepared.group.shape, candidate.verdict
    row = Row(
        task=prepared.group.task.name,
        implementation=candidate.entry.name,
        mode=mode,
        encoder=shape.encoder.name,
        vision_width=shape.encoder.width,
        tokens=shape.encoder.tokens,
        lang_dim=shape.lang_dim,
        batch=shape.batch,
        dtype=shape.dtype,
    )
    if candidate.left_out:
        return replace(row, status=LEFT_OUT, reason=candidate.left_out)
    row = replace(
        row,
        output_error=verdict.output_error,
        gradient_error=verdict.gradient_error,
        checked_images=len(prepared.truth.images),
    )
    if verdict.failure:
        return replace(row, status=FAILED, reason=verdict.failure)
    cost = candidate.cost(mode)
    floor = ceilings.floor_seconds(cost, shape.dtype)
    row = replace(
        row,
        model_gflop=cost.flops / 1e9,
        model_min_mb=cost.min_bytes / 1e6,
        model_floor_us=1e6 * floor,
    )
    if not candidate.entry.compiled:  # what a compiler fuses cannot be counted
        row = replace(row, model_launches=len(cost.launches))
    return row


def _timed(row: Row, samples: dict[str, list[float]], profile: measure.Profile) -> Row:
    own = samples[row.implementation]
    time = measure.spread([1e6 * seconds for seconds in own])
    values: dict[str, Any] = {
        "samples": len(own),
        "time_us": time.median,
        "time_us_p20": time.p20,
        "time_us_p80": time.p80,
        "peak_mib": profile.peak / MIB,
        "launches": profile.launches,
        "kernel_us": None if profile.kernel_seconds is None else 1e6 * profile.kernel_seconds,
    }
    for baseline in BASELINES:
        if baseline in samples and baseline != row.implementation:
            ratio = measure.ratios(samples[baseline], own)
            values[f"vs_{baseline}"] = ratio.median
            values[f"vs_{baseline}_p20"], values[f"vs_{baseline}_p80"] = ratio.p20, ratio.p80
    assert row.model_floor_us is not None
    values["share_of_model_floor"] = row.model_floor_us / time.median
    return replace(row, **values)
