"""What the custom operations share around schemas, autograd and autocast."""

from __future__ import annotations

import typing
from collections.abc import Callable
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


class Operation:
    """A custom operation, and the short way to its body where nothing has to see the operation.

    The dispatcher's way takes a compiler, an exporter, a mode or a tensor subclass along; it costs
    some 30 µs per call, and several times that with a backward.

    Args:
        name: After ``visproj::``.
        inputs: The NamedTuple of its arguments.
        outputs: Their part of the schema.
        body: Takes what the schema says and returns that, or ``None`` for a tensor of a tuple that
            nobody asked for: the dispatcher, which has no optional results, gets an empty one.
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
        """Give the operation a backward, with the arguments of ``torch.library``'s own method."""
        self.custom.register_autograd(differentiate, setup_context=setup_context)

        # A setup_context of its own would have PyTorch inspect the signature in every call.
        def forward(ctx: Any, *inputs: Any) -> Any:
            found = self._body(*inputs)
            setup_context(ctx, inputs, found)
            return found

        methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
        self._function = type(self.custom._name, (torch.autograd.Function,), methods)

    def __call__(self, *inputs: Any, differentiable: bool) -> Any:
        """Run it; ``differentiable`` says whether a backward through it may come."""
        if _is_seen(inputs):
            return self.custom(*inputs)
        if differentiable:
            return (self._function.apply if self._function else self.custom)(*inputs)
        return self._body(*inputs)


def _is_seen(inputs: tuple[Any, ...]) -> bool:
    """Return whether a tracer, a transform, a mode or a subclass looks at operations here."""
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
    """Return what stands for y, mean and rstd where no backward needs them."""
    return like.new_empty(EMPTY), like.new_empty(EMPTY), like.new_empty(EMPTY)


def saved_like(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors in the shapes and dtypes of y and of its rows' mean and rstd."""
    mean, rstd = (y.new_empty(y.shape[:-1], dtype=torch.float32) for _ in range(2))
    return y.new_empty(y.shape), mean, rstd


def saves_for_backward(*tensors: Tensor | None) -> bool:
    """Return whether a backward through an operation on these tensors may come."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def has_autocast(kind: str) -> bool:
    """Return whether autocast exists for a type of device: "meta" has none."""
    # torch 2.11 cannot trace the question, so it is not asked where the answer is known.
    return kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)


def autocasting(kind: str) -> bool:
    """Return whether the ambient autocast acts on a type of device."""
    return has_autocast(kind) and torch.is_autocast_enabled(kind)


def norm_autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of ``nn.LayerNorm(nn.Linear(x))`` under the ambient autocast.

    CUDA's autocast runs LayerNorm in fp32 and returns fp32; a CPU's leaves it in the lower dtype.
    """
    kind = x.device.type
    if not autocasting(kind):
        return x.dtype
    return torch.float32 if kind == "cuda" else torch.get_autocast_dtype(kind)


def forbid_second_derivative(backward: Operation) -> None:
    """Make a second derivative through a backward operation an error that says what to do."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{backward.custom._qualname} has no second derivative: "
            'run the forward under visproj.use_backend("torch")'
        )

    backward.custom.register_autograd(refuse)
