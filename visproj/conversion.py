"""Projectors and resamplers inside a model exchanged for visproj's, folded or not, and back."""

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

    Found by structure (names, types, shapes and order of what they hold), nothing of the model's
    code is imported: DeepSpeed-VisualChat's ``VisProjection_perceiver``, ``VisProjection_vit`` and
    baseline, an ``nn.Sequential`` of Linear and LayerNorm under the name ``projection``; the
    resamplers of MiniCPM-V and Qwen-VL; Aria's and Kosmos-2's projectors. They are called as the
    model calls them today. What is visproj's already stays. Parameters and child modules are
    carried over as the objects that they are: state dict, optimiser state, ties,
    ``requires_grad``, training mode and the hooks of children stay what they were. :func:`revert`
    undoes it. Call it before adapters are added and before DeepSpeed or FSDP wrap the model.

    Args:
        model: Any module that holds such projectors.
        fold: For inference: replace them by their folded forms (:func:`visproj.fold`), those that
            are visproj's already as well. The model can then not be saved without ``keep``, and not
            be trained.
        keep: With ``fold``, keep the originals beside the folded forms, in memory too: the model's
            state dict is then that of the originals, and :func:`revert` works.
        dtype: With ``fold``, that of the folded weights, by default each module's own.

    Returns:
        The names of the modules that were replaced.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If there is no projector in ``model``, or one that cannot be replaced: with
            hooks of its own, with adapters or other replacements inside, with a parameter too many,
            or of shapes that do not go together; or if ``keep`` or ``dtype`` come without ``fold``.
            Then nothing has been replaced.

    Source: DeepSpeed-VisualChat ``utils/model/modeling_dsvl.py`` and ``vis_proj.py``, MiniCPM-V
    ``resampler.py``, Qwen-VL ``visual.py``, transformers ``models/aria`` and ``models/kosmos2``.
    """
    check_module("convert", model)
    if (keep or dtype is not None) and not fold:
        raise InputError("keep and dtype are for folding: pass fold=True")
    if kind_of("", model) is not None:
        raise InputError(
            f"{type(model).__name__} is a projector itself: pass the module that holds it"
        )
    change = partial(_folded, keep=keep, dtype=dtype) if fold else _converted
    return _replace(
        model,
        change,
        "holds no projector of DeepSpeed-VisualChat's: neither VisProjection_perceiver nor "
        "VisProjection_vit, nor nn.Sequential(Linear, LayerNorm) under the name projection; and no "
        "resampler of MiniCPM-V or Qwen-VL, and no projector of Aria's or Kosmos-2's",
    )


def revert(model: nn.Module) -> list[str]:
    """Put the modules back that :func:`convert` replaced, with the parameters of today.

    Args:
        model: The module that was given to :func:`convert`, or a copy of it.

    Returns:
        The names of the modules that were put back.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If there is no converted projector in ``model``, or one with hooks of its own,
            or one that was folded without ``keep``. Then nothing has been put back.
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
    if isinstance(child, FoldedProjector) and child.replaced is not None:
        if child.replaced.original is None:
            raise InputError(
                f"{path} was folded without keep=True, so its own weights are gone: load the model "
                "again"
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
    projector.__dict__[_UPSTREAM] = child  # past nn.Module, which would make it a child
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
    """Raise if a hook sits on ``module`` or on a container below that is not carried over."""
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
    """Whether ``child`` takes what ``given`` holds, instead of being replaced by it."""
    if isinstance(child, CLIP) or isinstance(given, CLIP):
        return True
    pair = (given, child)
    if all(isinstance(module, nn.MultiheadAttention) for module in pair):
        return type(given) is not type(child)
    linears = all(isinstance(module, nn.Linear) for module in pair)
    return linears and type(given) is not type(child)
