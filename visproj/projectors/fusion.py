"""When a module may read its children's parameters itself, and what it does where it may not.

Reading ``child.weight`` instead of calling ``child`` is what makes fusing possible, and it is wrong
as soon as calling the child does more: LoRA adapters, quantised weights, hooks, parametrisations.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypeGuard, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from visproj import ops

_PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)
_WEIGHTED = (nn.Linear, NonDynamicallyQuantizableLinear, nn.LayerNorm)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_log = logging.getLogger("visproj")
_told: WeakKeyDictionary[nn.Module, set[tuple[str, str]]] = WeakKeyDictionary()

M = TypeVar("M", bound=nn.Module)


def is_plain(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether calling ``module`` does exactly what ``kind`` does with its own parameters.

    The type must be ``kind`` itself, its ``forward`` not replaced, the parameters plain floating
    tensors (no DTensor, nothing quantised) and no hook registered, except those that DeepSpeed
    ZeRO-3 puts on every module: its parameters carry ``ds_id`` and gather themselves when read.
    A LayerNorm must have a gain, and attention be one that can be taken apart: neither with extra
    key/value rows nor other widths for them, nor active dropout. Hooks registered for all modules
    at once (``register_module_forward_hook``) are not looked at.
    """
    return why_called(module, kind) is None


def why_called(module: Any, kind: type[nn.Module]) -> str | None:
    """Return why ``module`` is not :func:`is_plain`, or ``None``."""
    if type(module) is not kind:
        return f"it is a {type(module).__module__}.{type(module).__qualname__}"
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if type(parameter) not in _PLAIN_TENSORS or not parameter.is_floating_point():
            return f"its {name} is a {type(parameter).__name__} of {parameter.dtype}"
    if kind in _WEIGHTED and module.weight is None:
        return "it has no gain" if kind is nn.LayerNorm else "it has no weight"
    if kind is nn.MultiheadAttention and (reason := _why_whole(module)):
        return reason
    return why_touched(module)


def _why_whole(attention: Any) -> str | None:
    if attention.in_proj_weight is None:
        return "its keys or values have another width than its queries"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "it adds rows to keys and values"
    if attention.training and attention.dropout:
        return "its dropout is active"
    return None


def why_touched(module: nn.Module) -> str | None:
    """Return what calling ``module`` does besides its class's ``forward``, or ``None``."""
    if "forward" in module.__dict__:
        return "its forward was replaced"
    # ZeRO-3 hooks every module; a container is known by its children's parameters.
    if any(hasattr(p, "ds_id") for p in module.parameters()):
        return None
    hooks = [hooks.strip("_") for hooks in _HOOKS if getattr(module, hooks)]
    return f"it has {' and '.join(hooks)}" if hooks else None


def log_called(projector: nn.Module, reads: Mapping[str, type[nn.Module]]) -> None:
    """Say which children of ``projector`` are called instead of read, and why.

    To the logger ``visproj`` at level DEBUG, once for a child and reason; never while compiling.

    Args:
        projector: The projector, at the start of its ``forward``.
        reads: The children that it reads where it may, by name, and what they have to be.
    """
    if torch.compiler.is_compiling() or not _log.isEnabledFor(logging.DEBUG):
        return
    told = _told.setdefault(projector, set())
    for name, kind in reads.items():
        try:
            child = projector.get_submodule(name)
        except AttributeError:  # what holds it was replaced, and is told of itself
            continue
        reason = why_called(child, kind)
        if reason and (name, reason) not in told:
            told.add((name, reason))
            _log.debug("%s calls %s: %s", type(projector).__name__, name, reason)


def is_plain_attention(attention: nn.Module, width: int) -> TypeGuard[nn.MultiheadAttention]:
    """Whether ``attention`` is plain and takes queries, keys and values of this ``width``."""
    return is_plain(attention, nn.MultiheadAttention) and attention.embed_dim == width


def is_plain_norm(norm: Any, linear: Any) -> bool:
    """Whether ``norm`` is a plain LayerNorm with a gain over the output of a plain ``linear``."""
    return (
        (is_plain(linear, nn.Linear) or is_plain(linear, NonDynamicallyQuantizableLinear))
        and is_plain(norm, nn.LayerNorm)
        and norm.normalized_shape == (linear.out_features,)
    )


def linear_layer_norm(x: Tensor, linear: Any, norm: Any) -> Tensor:
    """``norm(linear(x))``, as one operation where both are plain."""
    if is_plain_norm(norm, linear):
        return ops.linear_layer_norm(
            x, linear.weight, linear.bias, norm.weight, norm.bias, norm.eps
        )
    return norm(linear(x))


def linear_norm_linear(
    x: Tensor,
    linear: Any,
    norm: Any,
    weight: Tensor,
    bias: Tensor | None,
    **positions: Any,
) -> Tensor:
    """``norm(linear(x)) weightᵀ + bias`` for a pair that :func:`is_plain_norm` allows."""
    pair = (linear.weight, linear.bias, norm.weight, norm.bias, norm.eps)
    return ops.linear_norm_linear(x, *pair, weight, bias, **positions)
