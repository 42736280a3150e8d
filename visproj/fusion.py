"""The rules for when a module may read its children's parameters instead of calling them.

A fused operation reads ``child.weight`` and does not call ``child``. That is wrong if calling the
child does more than apply its weights: LoRA adapters, quantised weights, hooks, parametrisations.
The module then calls that child normally.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from visproj import ops

Reads = Mapping[str, type[nn.Module]]  # the children that a module reads, and their exact types

_PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_log = logging.getLogger("visproj")
_logged: WeakKeyDictionary[nn.Module, set[tuple[str, str]]] = WeakKeyDictionary()


def why_not_plain(module: nn.Module, reads: Reads) -> tuple[str, str] | None:
    """Return the first child of ``module`` that has to be called instead of read, and why.

    A child is plain if calling it only applies its own parameters, as its type does:

    - Its type is exactly the one in ``reads``, and its ``forward`` was not replaced.
    - Its parameters are plain floating-point tensors, not DTensors and not quantised.
    - It has no hooks. Those that DeepSpeed ZeRO-3 puts on every module do not count: its
      parameters, recognised by ``ds_id``, are gathered when they are read.
    - An ``nn.Sequential`` has the children in ``reads`` and no others.
    - A LayerNorm has a gain and normalises over one dimension.
    - An ``nn.MultiheadAttention`` has neither ``bias_k`` nor ``add_zero_attn``, the same width for
      queries, keys and values, and no active dropout.

    Global hooks (``register_module_forward_hook``) are not checked.

    Args:
        module: The module that holds the children.
        reads: Names of the children, dotted for grandchildren, and their exact types.

    Returns:
        The child's name and the reason, or ``None`` if all children are plain.
    """
    for name, kind in reads.items():
        child: Any = module
        for part in name.split("."):
            child = child._modules.get(part) if isinstance(child, nn.Module) else None
        if reason := _why_called(child, kind):
            return name, reason
        if kind is nn.Sequential:
            wanted = sum(other.startswith(f"{name}.") for other in reads)
            if len(child) != wanted:
                return name, f"it has {len(child)} children, not {wanted}"
    return None


def is_plain(module: nn.Module, reads: Reads) -> bool:
    """Return whether ``module`` may read all children in ``reads``.

    Each child that has to be called is logged once per reason, to the logger ``visproj`` at level
    DEBUG; never while compiling.
    """
    plain = why_not_plain(module, reads) is None
    if not plain and not torch.compiler.is_compiling() and _log.isEnabledFor(logging.DEBUG):
        logged = _logged.setdefault(module, set())
        for name, kind in reads.items():
            try:
                reason = _why_called(module.get_submodule(name), kind)
            except AttributeError:  # the module around it was replaced, which is logged
                continue
            if reason and (name, reason) not in logged:
                logged.add((name, reason))
                _log.debug("%s calls %s: %s", type(module).__name__, name, reason)
    return plain


def why_touched(module: nn.Module) -> str | None:
    """Return why calling ``module`` does more than run its class's ``forward``, or ``None``."""
    if "forward" in module.__dict__:
        return "its forward was replaced"
    for kind in _HOOKS:
        if getattr(module, kind):
            # ZeRO-3 puts hooks on every module. A container has them if its children's parameters
            # carry ds_id.
            if any(hasattr(p, "ds_id") for p in module.parameters()):
                return None
            return f"it has {kind.strip('_')}"
    return None


def _why_called(module: Any, kind: type[nn.Module]) -> str | None:
    if type(module) is not kind:
        return f"it is a {type(module).__module__}.{type(module).__qualname__}"
    parameters = module._parameters
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        if type(parameter) not in _PLAIN_TENSORS or not parameter.is_floating_point():
            return f"its {name} is a {type(parameter).__name__} of {parameter.dtype}"
    if parameters.get("weight", module) is None:
        return "it has no gain" if kind is nn.LayerNorm else "it has no weight"
    if kind is nn.LayerNorm:
        shape: Any = module.normalized_shape
        if len(shape) != 1:
            return f"it normalises over {len(shape)} dimensions"
    if kind is nn.MultiheadAttention:
        if module.in_proj_weight is None:
            return "its keys or values have another width than its queries"
        if module.bias_k is not None or module.add_zero_attn:
            return "it adds rows to keys and values (bias_k or add_zero_attn)"
        if module.training and module.dropout:
            return "its dropout is active"
    # The conditions of why_touched inline, because this runs for every child in every forward.
    own = module.__dict__
    if "forward" in own or any(map(own.__getitem__, _HOOKS)):
        return why_touched(module)
    return None


def linear_layer_norm(x: Tensor, linear: Any, norm: Any) -> Tensor:
    """Compute ``norm(linear(x))`` as one operation; both children must be plain."""
    return ops.linear_layer_norm(x, linear.weight, linear.bias, norm.weight, norm.bias, norm.eps)


def linear_norm_linear(
    x: Tensor,
    linear: Any,
    norm: Any,
    outer_weight: Tensor,
    outer_bias: Tensor | None,
    **others: Any,
) -> Any:
    """Compute ``norm(linear(x)) outer_weightᵀ + outer_bias`` as one operation.

    Both children must be plain. ``others`` are those of :func:`visproj.ops.linear_norm_linear`.
    """
    inner = (linear.weight, linear.bias, norm.weight, norm.bias, norm.eps)
    return ops.linear_norm_linear(x, *inner, outer_weight, outer_bias, **others)
