"""No time without the right result: every implementation against the oracle in fp64."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.cases import Shape, Task

# Largest relative error of a row, see :func:`row_error`: two to twenty times what plain PyTorch was
# seen to have on a CPU, the twice being probabilities in bf16. A missing row has an error of 1.
OUTPUT_LIMIT = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}
GRADIENT_LIMIT = {"fp32": 5e-5, "fp16": 2e-2, "bf16": 1.5e-1}
# Multiply-adds of a forward in fp64 that the truth may take: seconds on two cores, and on a GPU
# for games, which is a sixty-fourth as fast in fp64 as in fp32.
BUDGET = {"cpu": 3e10, "cuda": 4e11}


@dataclass(frozen=True)
class Truth:
    """The oracle's results for some images of a batch.

    Attributes:
        images: Indices of the images.
        gradient: The output's gradient ``[B, ...]``, random for those images and zero for others,
            so that weights of a whole batch get the gradients of those images.
        output: ``[images, ...]``.
        gradients: By the name of a weight, or ``input 0`` and on.
    """

    images: list[int]
    gradient: Tensor
    output: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """Errors of an implementation, and why it fails, if it does."""

    output_error: float | None = None
    gradient_error: float | None = None
    failure: str | None = None


def checked_images(batch: int, flops: int, device: torch.device) -> list[int]:
    """As many images as the budget allows of a batch that takes ``flops`` forward; the last always.

    Images do not depend on each other, so the whole batch runs and a part of it is compared.
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
        weights: Its parameters by the names that the truth has.
        inputs: Requiring gradients where their gradients count.
        truth: Of the same inputs and weights.
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
        # Softmax ignores a bias of the keys: its gradient is zero, and noise has no relative error.
        is_zero = _rms(right) < 1e-9 * usual
        errors[name] = _rms(got) / usual if is_zero else row_error(got, right)
    worst = max(errors, key=lambda name: errors[name])
    output_error = row_error(output.detach()[truth.images], truth.output)
    return _judge(output_error, errors[worst], worst, dtype)


def row_error(got: Tensor, truth: Tensor) -> float:
    """Largest ``rms(got - truth) / rms(truth)`` over the rows, infinite if anything is not finite.

    A row whose truth is smaller than the rms of the whole is measured by the latter.
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
