"""Replacement of projectors and resamplers inside a model by visproj's, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from visproj.checks import check_module
from visproj.errors import InputError
from visproj.folding.modules import FoldedProjector
from visproj.recognition import CLIP, PROJECTORS, counterpart, kind_of

_UPSTREAM = "_upstream"

Change = Callable[[str, str, nn.Module], nn.Module | None]


def convert(
    model: nn.Module,
    fold: bool = False,
    keep: bool = False,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Replace the projectors and resamplers inside ``model`` by visproj's, in place.

    They are recognised by the names, types, shapes and order of the modules and parameters that
    they hold. None of the model's code is imported. visproj recognises DeepSpeed-VisualChat's
    ``VisProjection_perceiver``, ``VisProjection_vit`` and baseline (an ``nn.Sequential`` of Linear
    and LayerNorm under the name ``projection``), the resamplers of MiniCPM-V and Qwen-VL, and the
    projectors of Aria and Kosmos-2. The model calls its new modules as it called the old ones.
    Modules that are visproj's already are not replaced. The new modules hold the same parameter
    objects and child modules, so state dict, optimiser state, tied weights, ``requires_grad``,
    training mode and hooks of children do not change. :func:`revert` undoes the replacement. Call
    ``convert`` before adapters are added and before DeepSpeed or FSDP wrap the model.

    Args:
        model: Any module that holds such projectors.
        fold: For inference: replace them by their folded forms (:func:`visproj.fold`), including
            those that are visproj's already. The model can then not be trained, and can be saved
            only with ``keep``.
        keep: With ``fold``, also keep the original modules in memory: the model's state dict is
            then that of the originals, and :func:`revert` works.
        dtype: With ``fold``, the dtype of the folded weights; by default each module's own.

    Returns:
        The names of the modules that were replaced.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If ``model`` holds no projector, or one that cannot be replaced because it has
            hooks of its own, adapters or other replaced modules inside, additional parameters, or
            shapes that do not match; or if ``keep`` or ``dtype`` is given without ``fold``. In
            each case nothing has been replaced.

    Source: DeepSpeed-VisualChat ``utils/model/modeling_dsvl.py`` and ``vis_proj.py``, MiniCPM-V
    ``resampler.py``, Qwen-VL ``visual.py``, transformers ``models/aria`` and ``models/kosmos2``.
    """
    check_module("convert", model)
    if (keep or dtype is not None) and not fold:
        raise InputError("keep and dtype apply only to folding: pass fold=True")
    if kind_of("", model) is not None:
        raise InputError(
            f"{type(model).__name__} is a projector itself: pass the module that holds it"
        )
    change = partial(_folded, keep=keep, dtype=dtype) if fold else _converted
    return _replace(
        model,
        change,
        "holds no projector of DeepSpeed-VisualChat (VisProjection_perceiver, VisProjection_vit, "
        "or nn.Sequential(Linear, LayerNorm) under the name projection), no resampler of MiniCPM-V "
        "or Qwen-VL, and no projector of Aria or Kosmos-2",
    )


def revert(model: nn.Module) -> list[str]:
    """Put back the modules that :func:`convert` replaced, with the current parameters.

    Args:
        model: The module that was given to :func:`convert`, or a copy of it.

    Returns:
        The names of the modules that were put back.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If ``model`` holds no converted projector, or one that has hooks of its own or
            was folded without ``keep``. In each case nothing has been put back.
    """
    check_module("revert", model)
    return _replace(model, _original, "holds no projector that visproj.convert put there")


def _replace(model: nn.Module, change: Change, nothing: str) -> list[str]:
    """Replace every child for which ``change`` returns a module, after all of these are built."""
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
    """Collect the new module for every module inside ``parent``; modules used twice get one."""
    for name, child in parent._modules.items():
        if child is None or child in made:
            continue
        path = f"{prefix}{name}"
        new = change(name, path, child)  # also if it was seen before: here its name may differ
        if new is not None:
            made[child] = new
        elif child not in seen:
            seen.add(child)
            _make(child, change, f"{path}.", made, seen)


def _original(name: str, path: str, child: nn.Module) -> nn.Module | None:
    if isinstance(child, FoldedProjector) and child.replaced is not None:
        if child.replaced.original is None:
            raise InputError(
                f"{path} was folded without keep=True, so its original weights are gone: load the "
                "model again"
            )
        kept = child.replaced.original
        return _original(name, path, kept) or kept
    upstream = child.__dict__.get(_UPSTREAM)
    if upstream is None:
        return None
    _refuse_hooks(child, path)
    _hand_over(child, upstream)
    return upstream


def _converted(name: str, path: str, child: nn.Module) -> nn.Module | None:
    if isinstance(child, (*PROJECTORS, FoldedProjector)):
        return child
    kind = kind_of(name, child)
    if kind is None:
        return None
    try:
        projector = counterpart(kind, child)
    except ValueError as error:
        raise InputError(
            f"{path} is built like {kind.name}, but {error}; convert before adapters, "
            "quantisation or parametrisations are added"
        ) from error
    _refuse_hooks(child, path)
    _hand_over(child, projector)
    projector.__dict__[_UPSTREAM] = child  # nn.Module.__setattr__ would register it as a child
    return projector


def _folded(
    name: str, path: str, child: nn.Module, *, keep: bool, dtype: torch.dtype | None
) -> nn.Module | None:
    projector: Any = _converted(name, path, child)
    if projector is None or isinstance(projector, FoldedProjector):
        return projector
    _refuse_hooks(projector, path)
    folded: FoldedProjector = projector.fold(dtype=dtype)
    folded.replace(path, projector if keep else None)
    return folded.eval()


def _refuse_hooks(module: nn.Module, path: str) -> None:
    """Raise if ``module``, or a container inside it that is replaced as well, has hooks."""
    for name, child in module.named_modules():
        exchanged = child is module or name in ("vis_layer", "vis_layer.self_attn", "vis_layer.mlp")
        changed = isinstance(child, nn.MultiheadAttention) and _is_subclass(child)
        hooks = [key for key, value in vars(child).items() if key.endswith("hooks") and value]
        if "forward" in vars(child):
            hooks.append("a replaced forward")
        if (exchanged or changed) and hooks:
            where = f"{path}.{name}".removesuffix(".")
            raise InputError(
                f"{where} has {hooks[0].strip('_')}, which would be lost: remove them first, or "
                "convert before the model is wrapped"
            )


def _is_subclass(module: nn.Module) -> bool:
    return type(module) is not nn.MultiheadAttention


def _hand_over(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the parameters, buffers and children of ``source``, and its training mode."""
    target._parameters.update(source._parameters)
    target._buffers.update(source._buffers)
    target._non_persistent_buffers_set.update(source._non_persistent_buffers_set)
    target.training = source.training
    for name, child in list(target._modules.items()):
        given = source._modules.get(name)
        if child is None or given is None:  # transformers' MLP has its activation as a child
            continue
        if _stays(given, child):
            _hand_over(given, child)
        else:
            target._modules[name] = given


def _stays(given: nn.Module, child: nn.Module) -> bool:
    """Return whether ``child`` stays and gets the contents of ``given``, or is replaced by it."""
    if isinstance(child, CLIP) or isinstance(given, CLIP):
        return True
    pair = (given, child)
    if all(isinstance(module, nn.MultiheadAttention) for module in pair):
        return type(given) is not type(child)
    linears = all(isinstance(module, nn.Linear) for module in pair)
    return linears and type(given) is not type(child)
