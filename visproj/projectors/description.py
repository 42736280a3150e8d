"""A projector's description as JSON, and a projector built from one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from visproj.clip import VisionConfig
from visproj.errors import InputError
from visproj.projectors.linear import LinearProjector
from visproj.projectors.perceiver import PerceiverProjector
from visproj.projectors.vit import ViTProjector


class _Kind(NamedTuple):
    """A kind of projector: its class, and functions that describe it and build it again."""

    type: type[nn.Module]
    options: Callable[[Any], dict[str, Any]]
    build: Callable[..., nn.Module]


def describe(projector: nn.Module) -> dict[str, Any] | None:
    """Return the description for :func:`build_described`, or ``None`` if it would be incomplete.

    It would be for any other module, and for a projector with another ``forward``, adapters,
    quantised weights or replaced children.
    """
    for name, kind in _KINDS.items():
        if isinstance(projector, kind.type) and type(projector).forward is kind.type.forward:
            try:
                description = {"kind": name, **kind.options(projector), "eps": _eps(projector)}
                with torch.device("meta"):
                    built = build_described(description)
            except (AttributeError, IndexError, TypeError, ValueError):
                return None
            return description if _alike(projector, built) else None
    return None


def build_described(description: Mapping[str, Any]) -> nn.Module:
    """Build the projector that :func:`describe` described, with fresh weights.

    Raises:
        InputError: If an entry is missing, unknown or unsuitable.
    """
    options = dict(description)
    kind, eps = options.pop("kind", None), options.pop("eps", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InputError(f"unknown kind {kind!r}, expected one of {', '.join(_KINDS)}")
    try:
        projector = _KINDS[kind].build(**options)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"the description of a {kind} projector is damaged ({reason})") from error
    norms = {n: m for n, m in projector.named_modules() if isinstance(m, nn.LayerNorm)}
    if not isinstance(eps, dict) or eps.keys() != norms.keys():
        raise InputError(f"eps must name {', '.join(norms)}, got {eps!r}")
    for name, norm in norms.items():
        norm.eps = _number(f"eps of {name}", eps[name])
    return projector


def check_described(projector: nn.Module, description: Mapping[str, Any], whose: str) -> None:
    """Raise unless a projector fits a description, except for its dropout.

    Args:
        projector: The projector, whose own description is compared if it has one.
        description: Description of the weights to load, or of the projector that is expected.
        whose: Source of the description for the message, such as ``"model.safetensors holds"``.

    Raises:
        InputError: If they differ; the message states the first difference.
    """
    for name, value in (describe(projector) or {}).items():
        if name != "dropout" and description.get(name, value) != value:
            raise InputError(f"{whose} a projector with {name} {description[name]}, not {value}")


def _eps(projector: nn.Module) -> dict[str, float]:
    norms = projector.named_modules()
    return {name: norm.eps for name, norm in norms if isinstance(norm, nn.LayerNorm)}


def _alike(projector: nn.Module, built: nn.Module) -> bool:
    """Return whether both have the same modules, and tensors of the same names and shapes.

    Modules are compared by ``forward``, not by class: FSDP2 gives every module that it shards a new
    class with the same ``forward``.
    """
    modules, ours = dict(projector.named_modules()), dict(built.named_modules())
    return (
        modules.keys() == ours.keys()
        and all(type(modules[name]).forward is type(m).forward for name, m in ours.items())
        and not any("forward" in vars(module) for module in modules.values())
        and not any(getattr(module, "add_zero_attn", False) for module in modules.values())
        and _shapes(projector) == _shapes(built)
    )


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _linear_options(projector: Any) -> dict[str, Any]:
    return {"vis_dim": projector.vis_dim, "lang_dim": projector[0].out_features}


def _vit_options(projector: Any) -> dict[str, Any]:
    attention, mlp = projector.vis_layer.self_attn, projector.vis_layer.mlp
    return {
        "vis_dim": projector.vis_dim,
        "lang_dim": projector.projection[0].out_features,
        "intermediate_size": mlp.fc1.out_features,
        "num_heads": attention.num_heads,
        "hidden_act": mlp.hidden_act,
        "dropout": attention.dropout,
    }


def _perceiver_options(projector: Any) -> dict[str, Any]:
    return {
        "vis_dim": projector.vis_dim,
        "lang_dim": projector.embed_dim,
        "query_grid": list(projector.query_grid),
        "num_heads": projector.attn.num_heads,
        "has_cls": projector.has_cls,
        "dropout": projector.attn.dropout,
    }


def _build_linear(vis_dim: int, lang_dim: int) -> nn.Module:
    return LinearProjector(vis_dim, lang_dim)


def _build_vit(
    vis_dim: int,
    lang_dim: int,
    intermediate_size: int,
    num_heads: int,
    hidden_act: str,
    dropout: float,
) -> nn.Module:
    config = VisionConfig(
        hidden_size=vis_dim,
        intermediate_size=intermediate_size,
        num_attention_heads=num_heads,
        hidden_act=hidden_act,
        layer_norm_eps=1e-5,  # each LayerNorm gets its own eps later
        attention_dropout=_number("dropout", dropout),
    )
    return ViTProjector(config, lang_dim)


def _build_perceiver(
    vis_dim: int,
    lang_dim: int,
    query_grid: Sequence[int],
    num_heads: int,
    has_cls: bool,
    dropout: float,
) -> nn.Module:
    if not isinstance(has_cls, bool):
        raise InputError(f"has_cls must be true or false, got {has_cls!r}")
    rows, columns = query_grid
    projector = PerceiverProjector(
        vis_dim, lang_dim, query_grid=(rows, columns), num_heads=num_heads, has_cls=has_cls
    )
    projector.attn.dropout = _number("dropout", dropout)
    return projector


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InputError(f"{name} must be a number from 0 to below 1, got {value!r}")
    return value


_KINDS = {
    "baseline": _Kind(LinearProjector, _linear_options, _build_linear),
    "vit": _Kind(ViTProjector, _vit_options, _build_vit),
    "perceiver": _Kind(PerceiverProjector, _perceiver_options, _build_perceiver),
}
