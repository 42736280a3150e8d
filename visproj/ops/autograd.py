"""What the custom operations share around schemas, autograd and autocast."""

from __future__ import annotations

import typing
from typing import Any

import torch
from torch import Tensor

MAX_NORM_WIDTH = 16384  # the LayerNorm kernels hold a row in registers
EMPTY = (0,)  # the shape of what an operation without a backward does not return

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    float: "float",
    bool: "bool",
    torch.dtype: "ScalarType",
}


def schema(inputs: type, outputs: str) -> str:
    """Return the schema of a custom operation whose arguments are the fields of a NamedTuple."""
    fields = typing.get_type_hints(inputs).items()
    arguments = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in fields)
    return f"({arguments}) -> {outputs}"


def in_order(inputs: Any, **gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return gradients in the order of the fields of a NamedTuple, ``None`` for the others."""
    return tuple(gradients.get(name) for name in inputs._fields)


def nothing_saved(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what stands for y, mean and rstd where no backward needs them."""
    return like.new_empty(EMPTY), like.new_empty(EMPTY), like.new_empty(EMPTY)


def saved_like(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors in the shapes and dtypes of y and of its rows' mean and rstd."""
    mean, rstd = (y.new_empty(y.shape[:-1], dtype=torch.float32) for _ in range(2))
    return y.new_empty(y.shape), mean, rstd


def saves_for_backward(*tensors: Tensor | None) -> bool:
    """Return whether a backward through an operation on these tensors may come."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def norm_autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of ``nn.LayerNorm(nn.Linear(x))`` under the ambient autocast.

    CUDA's autocast runs LayerNorm in fp32 and returns fp32; a CPU's leaves it in the lower dtype.
    """
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.float32 if kind == "cuda" else torch.get_autocast_dtype(kind)


def forbid_second_derivative(backward: Any) -> None:
    """Make a second derivative through a backward operation an error that says what to do."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{backward._qualname} has no second derivative: "
            'run the forward under visproj.use_backend("torch")'
        )

    backward.register_autograd(refuse)
