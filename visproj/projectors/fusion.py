"""When a module may read its children's parameters itself, and what it does where it may not.

Reading ``child.weight`` instead of calling ``child`` is what makes fusing possible, and it is wrong
as soon as calling the child does more: LoRA adapters, quantised weights, hooks, parametrisations.
"""

from __future__ import annotations

from typing import Any, TypeGuard, TypeVar

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from visproj import ops

_PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

M = TypeVar("M", bound=nn.Module)


def is_plain(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether calling ``module`` does exactly what ``kind`` does with its own parameters.

    The type must be ``kind`` itself, its ``forward`` not replaced, the parameters plain floating
    tensors (no DTensor, nothing quantised) and no hook registered, except those that DeepSpeed
    ZeRO-3 puts on every module: its parameters carry ``ds_id`` and gather themselves when read.
    Hooks registered for all modules at once (``register_module_forward_hook``) are not looked at.
    """
    parameters = [p for p in module._parameters.values() if p is not None]
    return (
        type(module) is kind
        and all(type(p) in _PLAIN_TENSORS and p.is_floating_point() for p in parameters)
        and is_untouched(module)
    )


def is_untouched(module: nn.Module) -> bool:
    """Whether calling ``module`` runs its class's ``forward`` and nothing else.

    ZeRO-3's hooks are nothing else: a container has them too, and is known by its children's
    parameters.
    """
    if "forward" in module.__dict__:
        return False
    gather_themselves = any(hasattr(p, "ds_id") for p in module.parameters())
    return gather_themselves or not any(getattr(module, hooks) for hooks in _HOOKS)


def is_plain_attention(attention: nn.Module, width: int) -> TypeGuard[nn.MultiheadAttention]:
    """Whether ``attention`` is a plain ``nn.MultiheadAttention`` that one can take apart.

    Keys and values must have its own ``width``, and it must have neither extra key/value rows nor
    active dropout.
    """
    return (
        is_plain(attention, nn.MultiheadAttention)
        and attention.embed_dim == width
        and attention.in_proj_weight is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
        and not (attention.training and attention.dropout)
    )


def is_plain_norm(norm: Any, linear: Any) -> bool:
    """Whether ``norm`` is a plain LayerNorm with a gain over the output of a plain ``linear``."""
    return (
        (is_plain(linear, nn.Linear) or is_plain(linear, NonDynamicallyQuantizableLinear))
        and is_plain(norm, nn.LayerNorm)
        and norm.weight is not None
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
