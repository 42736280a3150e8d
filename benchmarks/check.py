"""The check before timing: every implementation is compared with the oracle in fp64."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.cases import Shape, Task

# Limits of a row's relative error (:func:`row_error`): two to twenty times the errors of plain
# PyTorch on a CPU. The factor is two for probabilities in bf16. A missing row has an error of 1.
OUTPUT_LIMIT = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}
GRADIENT_LIMIT = {"fp32": 5e-5, "fp16": 2e-2, "bf16": 1.5e-1}
# The most multiply-adds of the oracle's forward in fp64. They take seconds on two cores, and on a
# GPU for games, whose fp64 rate is 1/64 of its fp32 rate.
BUDGET = {"cpu": 3e10, "cuda": 4e11}


@dataclass(frozen=True)
class Truth:
    """The oracle's results for some images of a batch.

    Attributes:
        images: Indices of the images.
        gradient: The output's gradient ``[B, ...]``, random for those images and zero for others,
            so that weights of a whole batch get the gradients of those images.
        output: ``[images, ...]``.
        gradients: Gradients by the name of a weight, or ``input 0``, ``input 1``, and so on.
    """

    images: list[int]
    gradient: Tensor
    output: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """The errors of an implementation, and the reason why it fails, or ``None``."""

    output_error: float | None = None
    gradient_error: float | None = None
    failure: str | None = None


def checked_images(batch: int, flops: int, device: torch.device) -> list[int]:
    """Return the indices of the images to compare: as many as the budget allows, always the last.

    ``flops`` is the cost of a forward of the whole batch. Images do not depend on each other, so
    the whole batch runs and only some of its images are compared.
    """
    count = int(batch * BUDGET[device.type] / max(1, flops / 2))
    return [*range(min(batch, max(1, count)) - 1), batch - 1]


def find_truth(
    task: Task, shape: Shape, module: nn.Module, inputs: tuple[Tensor, ...], images: list[int]
) -> Truth:
    """Run the oracle forward and backward in fp64, with the weights of ``module``."""
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    state = {
        name: weight.detach().double().requires_grad_(name in trained)
        for name, weight in module.state_dict().items()
    }
    chosen = tuple(x[images].double().requires_grad_(task.input_gradients) for x in inputs)
    output = task.oracle(state, chosen, shape)
    gradient = inputs[0].new_zeros(shape.batch, *output.shape[1:])
    gradient[images] = torch.randn_like(gradient[images])
    leaves = {name: state[name] for name in sorted(trained)}
    if task.input_gradients:
        leaves |= {f"input {i}": x for i, x in enumerate(chosen)}
    found = torch.autograd.grad(output, list(leaves.values()), gradient[images].double())
    return Truth(images, gradient, output.detach(), dict(zip(leaves, found, strict=True)))


def check(
    call: Callable[..., Tensor],
    weights: Mapping[str, Tensor],
    inputs: tuple[Tensor, ...],
    truth: Truth,
    dtype: str,
    *,
    trains: bool,
) -> Verdict:
    """Compare ``call(*inputs)`` at its full batch, and its gradients if it trains, with the truth.

    Args:
        call: A module, compiled or not.
        weights: Its parameters by their names in the truth.
        inputs: The inputs; those whose gradients are compared require gradients.
        truth: The oracle's results for the same inputs and weights.
        dtype: Name of the dtype, for the limits.
        trains: Whether gradients are compared.
    """
    if not trains:
        with torch.no_grad():
            return _judge(row_error(call(*inputs)[truth.images], truth.output), None, "", dtype)
    leaves = {name: weight for name, weight in weights.items() if weight.requires_grad}
    leaves |= {f"input {i}": x for i, x in enumerate(inputs) if x.requires_grad}
    output = call(*inputs)
    found = torch.autograd.grad(output, list(leaves.values()), truth.gradient)
    usual = statistics.median(_rms(gradient) for gradient in truth.gradients.values())
    errors = {}
    for name, got in zip(leaves, found, strict=True):
        right = truth.gradients[name]
        got = got[truth.images] if name.startswith("input") else got
        # A bias of the keys cancels in the softmax. Its gradient is zero, so that a relative error
        # has no meaning.
        is_zero = _rms(right) < 1e-9 * usual
        errors[name] = _rms(got) / usual if is_zero else row_error(got, right)
    worst = max(errors, key=lambda name: errors[name])
    output_error = row_error(output.detach()[truth.images], truth.output)
    return _judge(output_error, errors[worst], worst, dtype)


def row_error(got: Tensor, truth: Tensor) -> float:
    """Return the largest ``rms(got - truth) / rms(truth)`` of a row, infinite if not finite.

    For a row whose rms is smaller than that of the whole tensor, the latter is the divisor.
    """
    if got.shape != truth.shape:
        return float("inf")
    got, truth = got.double(), truth.double()
    scale = truth.square().mean(-1).clamp(min=truth.square().mean())
    error = ((got - truth).square().mean(-1) / scale).max().sqrt().item()
    return error if error < float("inf") else float("inf")


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _judge(output: float, gradient: float | None, worst: str, dtype: str) -> Verdict:
    failures = []
    if output > OUTPUT_LIMIT[dtype]:
        failures.append(f"output error {output:.1e} > {OUTPUT_LIMIT[dtype]:.0e}")
    if gradient is not None and gradient > GRADIENT_LIMIT[dtype]:
        failures.append(f"gradient error of {worst} {gradient:.1e} > {GRADIENT_LIMIT[dtype]:.0e}")
    return Verdict(output, gradient, "; ".join(failures) or None)
