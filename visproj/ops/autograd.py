"""Schemas, autograd and autocast of the custom operators."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAX_NORM_WIDTH = 16384  # the LayerNorm kernels hold a row in registers
EMPTY = (0,)  # shape of the placeholders for results that only a backward needs

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    float: "float",
    bool: "bool",
    torch.dtype: "ScalarType",
}


def schema(inputs: type, outputs: str) -> str:
    """Return the schema of a custom operator whose arguments are the fields of a NamedTuple."""
    fields = typing.get_type_hints(inputs).items()
    arguments = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in fields)
    return f"({arguments}) -> {outputs}"


class Operation:
    """A custom operator that skips PyTorch's dispatcher in calls that do not need it.

    A compiler, an exporter, a mode or a tensor subclass needs the dispatcher to see the operator.
    The dispatcher costs some 30 µs per call, and several times that with a backward.

    Args:
        name: Name after ``visproj::``.
        inputs: The NamedTuple of its arguments.
        outputs: The part of the schema for the results.
        body: Function with the arguments and results of the schema. In a tuple of results it may
            return ``None`` for a tensor that was not requested. The dispatcher, which does not
            support optional results, then gets an empty tensor.
    """

    def __init__(self, name: str, inputs: type, outputs: str, body: Callable[..., Any]) -> None:
        def complete(*inputs: Any) -> Any:
            found = body(*inputs)
            if not isinstance(found, tuple):
                return found
            return tuple(inputs[0].new_empty(EMPTY) if x is None else x for x in found)

        self._body = body
        self._function: Any = None
        self.custom = torch.library.custom_op(
            f"visproj::{name}", complete, mutates_args=(), schema=schema(inputs, outputs)
        )

    def register_autograd(
        self, differentiate: Callable[..., Any], setup_context: Callable[..., None]
    ) -> None:
        """Register a backward, with the arguments of ``torch.library.register_autograd``."""
        self.custom.register_autograd(differentiate, setup_context=setup_context)

        # With a separate setup_context PyTorch would inspect the signature in every call.
        def forward(ctx: Any, *inputs: Any) -> Any:
            found = self._body(*inputs)
            setup_context(ctx, inputs, found)
            return found

        methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
        self._function = type(self.custom._name, (torch.autograd.Function,), methods)

    def __call__(self, *inputs: Any, differentiable: bool) -> Any:
        """Run the operator; ``differentiable`` says whether a backward through it may follow."""
        if _is_seen(inputs):
            return self.custom(*inputs)
        if differentiable:
            return (self._function.apply if self._function else self.custom)(*inputs)
        return self._body(*inputs)


def _is_seen(inputs: tuple[Any, ...]) -> bool:
    """Return whether a tracer, a transform, a mode or a tensor subclass must see the operator."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or not _PLAIN.issuperset(map(type, inputs))
    )


_PLAIN = {Tensor, torch.nn.Parameter, type(None), bool, int, float, torch.dtype}


def in_order(inputs: Any, **gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return gradients in the order of the fields of a NamedTuple, ``None`` for the others."""
    return tuple(gradients.get(name) for name in inputs._fields)


def nothing_saved(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty placeholders for y, mean and rstd, which only a backward needs."""
    return like.new_empty(EMPTY), like.new_empty(EMPTY), like.new_empty(EMPTY)


def saved_like(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors in the shapes and dtypes of y and of its rows' mean and rstd."""
    mean, rstd = (y.new_empty(y.shape[:-1], dtype=torch.float32) for _ in range(2))
    return y.new_empty(y.shape), mean, rstd


def saves_for_backward(*tensors: Tensor | None) -> bool:
    """Return whether a backward through an operation on these tensors may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def has_autocast(kind: str) -> bool:
    """Return whether autocast exists for a type of device: "meta" has none."""
    # torch 2.11 cannot trace is_autocast_available, so the common devices do not call it.
    return kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)


def autocasting(kind: str) -> bool:
    """Return whether autocast is currently enabled for a type of device."""
    return has_autocast(kind) and torch.is_autocast_enabled(kind)


def norm_autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of ``nn.LayerNorm(nn.Linear(x))`` under the current autocast.

    CUDA's autocast runs LayerNorm in fp32 and returns fp32; a CPU's leaves it in the lower dtype.
    """
    kind = x.device.type
    if not autocasting(kind):
        return x.dtype
    return torch.float32 if kind == "cuda" else torch.get_autocast_dtype(kind)


def forbid_second_derivative(backward: Operation) -> None:
    """Register an error for second derivatives of a backward operator; it says what to do."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{backward.custom._qualname} has no second derivative: "
            'run the forward under visproj.use_backend("torch")'
        )

    backward.custom.register_autograd(refuse)
