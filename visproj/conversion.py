"""DeepSpeed-VisualChat's projectors inside a model exchanged for visproj's, and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from visproj.checks import check_module
from visproj.clip import ACTIVATIONS, CLIPMLP, CLIPAttention, CLIPEncoderLayer, VisionConfig
from visproj.errors import InputError
from visproj.projectors import LinearProjector, PerceiverProjector, ViTProjector, build_projector

_PROJECTORS = (LinearProjector, ViTProjector, PerceiverProjector)
# Containers of transformers' that ours take the place of; every other child is carried over.
_CLIP = (CLIPEncoderLayer, CLIPAttention, CLIPMLP)
_PERCEIVER = {"kv_proj", "attn", "ln_q", "ln_kv", "projection"}
_VIT = {"vis_layer", "projection"}
_VIS_LAYER = {"self_attn", "layer_norm1", "mlp", "layer_norm2"}
_UPSTREAM = "_upstream"

Change = Callable[[str, str, nn.Module], nn.Module | None]


def convert(model: nn.Module) -> list[str]:
    """Replace DeepSpeed-VisualChat's projectors inside ``model`` by visproj's, in place.

    Matched by structure, nothing of DeepSpeed-VisualChat's is imported: ``VisProjection_perceiver``
    and ``VisProjection_vit`` by the names, types and shapes of what they hold; the baseline, an
    ``nn.Sequential`` of Linear and LayerNorm, also by its name, ``projection``. Projectors that are
    visproj's already stay. Parameters and child modules are carried over as the objects that they
    are: state dict, optimiser state, ties, ``requires_grad``, training mode and the hooks of
    children stay what they were. :func:`revert` undoes it. Call it before DeepSpeed or FSDP wrap
    the model.

    Args:
        model: Any module that holds such projectors.

    Returns:
        The names of the modules that were replaced.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If there is no projector in ``model``, or one that cannot be replaced: with
            hooks of its own, with adapters or other replacements inside, or of shapes that do not
            go together. Then nothing has been replaced.

    Source: DeepSpeed-VisualChat ``utils/model/modeling_dsvl.py`` and ``vis_proj.py``.
    """
    check_module("convert", model)
    if _kind("", model) is not None:
        raise InputError(
            f"{type(model).__name__} is a projector itself: pass the module that holds it"
        )
    return _replace(
        model,
        _counterpart,
        "holds no projector of DeepSpeed-VisualChat's: neither VisProjection_perceiver nor "
        "VisProjection_vit, nor nn.Sequential(Linear, LayerNorm) under the name projection",
    )


def revert(model: nn.Module) -> list[str]:
    """Put the modules back that :func:`convert` replaced, with the parameters of today.

    Args:
        model: The module that was given to :func:`convert`, or a copy of it.

    Returns:
        The names of the modules that were put back.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If there is no converted projector in ``model``, or one with hooks of its own.
            Then nothing has been put back.
    """
    check_module("revert", model)
    return _replace(model, _original, "holds no projector that visproj.convert put there")


def _replace(model: nn.Module, change: Change, nothing: str) -> list[str]:
    """Exchange every child that ``change`` has a module for; all of them are made first."""
    made: dict[nn.Module, nn.Module] = {}
    _make(model, change, "", made, set())
    if not made:
        raise InputError(f"{type(model).__name__} {nothing}")
    plan = [
        (parent, name, f"{prefix}.{name}".removeprefix("."), made[child])
        for prefix, parent in model.named_modules()
        for name, child in parent._modules.items()
        if child in made and made[child] is not child
    ]
    for parent, name, _, module in plan:
        setattr(parent, name, module)
    return [path for _, _, path, _ in plan]


def _make(
    parent: nn.Module,
    change: Change,
    prefix: str,
    made: dict[nn.Module, nn.Module],
    seen: set[nn.Module],
) -> None:
    """What every module below is to become, once for one that is in two places."""
    for name, child in parent._modules.items():
        if child is None or child in made:
            continue
        path = f"{prefix}{name}"
        new = change(name, path, child)  # also where it has been seen: its name counts
        if new is not None:
            made[child] = new
        elif child not in seen:
            seen.add(child)
            _make(child, change, f"{path}.", made, seen)


def _original(name: str, path: str, child: nn.Module) -> nn.Module | None:
    upstream = child.__dict__.get(_UPSTREAM)
    if upstream is None:
        return None
    _refuse_hooks(child, path)
    _hand_over(child, upstream)
    return upstream


def _counterpart(name: str, path: str, child: nn.Module) -> nn.Module | None:
    if isinstance(child, _PROJECTORS):
        return child
    kind = _kind(name, child)
    if kind is None:
        return None
    try:
        _check_types(kind, child)
        with torch.device("meta"):
            projector = _BUILDERS[kind](child)
        _check_shapes(child, projector)
    except ValueError as error:
        raise InputError(
            f"{path} is built like DeepSpeed-VisualChat's {kind} projector, but {error}; convert "
            "before adapters, quantisation or parametrisations are added"
        ) from error
    _refuse_hooks(child, path)
    _hand_over(child, projector)
    projector.__dict__[_UPSTREAM] = child  # past nn.Module, which would make it a child
    return projector


def _kind(name: str, module: nn.Module) -> str | None:
    """Which projector has children of these names."""
    names = {name for name, child in module._modules.items() if child is not None}
    if names == _PERCEIVER:
        return "perceiver"
    if names == _VIT and set(module.get_submodule("vis_layer")._modules) == _VIS_LAYER:
        return "vit"
    if name == "projection" and type(module) is nn.Sequential and len(module) == 2:
        linear, norm = module
        if hasattr(linear, "in_features") and isinstance(norm, nn.LayerNorm):
            return "baseline"
    return None


def _check_types(kind: str, module: nn.Module) -> None:
    """Raise unless every module below has exactly the type that ours has there."""
    with torch.device("meta"):
        ours = build_projector(kind, _clip_config(4, 4, 1, "gelu", 0.0), 4)
    for name, wanted in ours.named_modules():
        if isinstance(wanted, (*_PROJECTORS, *_CLIP)):
            continue
        try:
            found = module.get_submodule(name)
        except AttributeError as error:
            raise InputError(f"it has no {name}") from error
        if type(found) is not type(wanted):
            raise InputError(
                f"its {name} is a {type(found).__module__}.{type(found).__qualname__}, not a plain "
                f"{type(wanted).__name__}"
            )


def _check_shapes(module: nn.Module, ours: nn.Module) -> None:
    """Raise unless ``module`` holds parameters of our names and shapes and no buffers."""
    found, wanted = _shapes(module), _shapes(ours)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise InputError(
                f"its {name} is {found.get(name, 'absent')} where {wanted.get(name, 'nothing')} "
                "is wanted"
            )
    if buffers := [name for name, _ in module.named_buffers()]:
        raise InputError(f"it has the buffer {buffers[0]}")


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    named = module.named_parameters(remove_duplicate=False)
    return {name: list(_shape(parameter)) for name, parameter in named}


def _shape(parameter: Tensor) -> torch.Size:
    """The whole parameter's shape, also where ZeRO-3 keeps it in pieces."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _baseline(module: Any) -> nn.Module:
    return LinearProjector(module[0].in_features, module[0].out_features)


def _vit(module: Any) -> nn.Module:
    if getattr(module.vis_layer, "gradient_checkpointing", False):
        raise InputError("its vis_layer has gradient checkpointing on, which ours does not know")
    attention, mlp = module.vis_layer.self_attn, module.vis_layer.mlp
    linear = module.projection[0]
    config = _clip_config(
        linear.in_features,
        mlp.fc1.out_features,
        attention.num_heads,
        _activation(mlp.activation_fn),
        attention.dropout,
    )
    return ViTProjector(config, linear.out_features)


def _clip_config(
    width: int, intermediate: int, heads: int, activation: str, dropout: float
) -> VisionConfig:
    return VisionConfig(
        hidden_size=width,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        hidden_act=activation,
        layer_norm_eps=1e-5,  # the LayerNorms themselves are carried over
        attention_dropout=dropout,
    )


def _activation(function: Callable[[Tensor], Tensor]) -> str:
    """Return the name of an activation, found by what it computes."""
    probe = torch.linspace(-4, 4, 33, device="cpu")
    for name, ours in ACTIVATIONS.items():
        # Two forms of one activation differ by roundings, two activations by 1e-3 and more.
        if torch.allclose(function(probe), ours(probe), rtol=1e-5, atol=1e-5):
            return name
    raise InputError(f"its activation is none of {', '.join(ACTIVATIONS)}")


def _perceiver(module: Any) -> nn.Module:
    queries, width = _shape(module.query)
    side = math.isqrt(queries)
    return PerceiverProjector(
        module.kv_proj.in_features,
        width,
        query_grid=(side, side),
        num_heads=module.attn.num_heads,
    )


_BUILDERS = {"baseline": _baseline, "vit": _vit, "perceiver": _perceiver}


def _refuse_hooks(module: nn.Module, path: str) -> None:
    """Raise if a hook sits on ``module`` or on a container below that is not carried over."""
    for name, child in module.named_modules():
        exchanged = child is module or name in ("vis_layer", "vis_layer.self_attn", "vis_layer.mlp")
        hooks = [key for key, value in vars(child).items() if key.endswith("hooks") and value]
        if "forward" in vars(child):
            hooks.append("a replaced forward")
        if exchanged and hooks:
            where = f"{path}.{name}".removesuffix(".")
            raise InputError(
                f"{where} has {hooks[0].strip('_')}, which would be lost: remove them first, or "
                "convert before the model is wrapped"
            )


def _hand_over(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the parameters and children of ``source``, and its training mode."""
    target._parameters.update(source._parameters)
    target.training = source.training
    for name, child in list(target._modules.items()):
        given = source._modules.get(name)
        if child is None or given is None:  # transformers' MLP has its activation as a child
            continue
        if isinstance(child, _CLIP) or isinstance(given, _CLIP):
            _hand_over(given, child)
        else:
            target._modules[name] = given
