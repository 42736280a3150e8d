"""Weights of a trained projector combined, in fp64, into those of its folded form."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from visproj.backend import runs_triton
from visproj.errors import InputError
from visproj.folding.modules import (
    FoldedLinear,
    FoldedPerceiver,
    FoldedProjector,
    FoldedViT,
    weights_digest,
)
from visproj.positions import Grid, check_grid, resize_position_table
from visproj.projectors import LinearProjector, PerceiverProjector, ViTProjector
from visproj.projectors.description import check_module
from visproj.projectors.fusion import why_called, why_touched
from visproj.projectors.vit import CLIPMLP, CLIPAttention, CLIPEncoderLayer, VisionConfig

_CLIP_PARTS = {
    "vis_layer": CLIPEncoderLayer,
    "vis_layer.self_attn": CLIPAttention,
    "vis_layer.mlp": CLIPMLP,
    "vis_layer.layer_norm1": nn.LayerNorm,
    "vis_layer.layer_norm2": nn.LayerNorm,
}


def fold(
    projector: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    grid: Grid | None = None,
    triton: bool | None = None,
) -> FoldedProjector:
    """Turn a trained projector into its exact inference form.

    The projector is left as it is. The result is called like it, holds the combined weights as
    buffers, refuses gradients, and is saved with ``folded.save(path)`` and read back with
    :func:`load_folded`. Folded weights are not quantised by tools that exchange modules
    (``quantize_dynamic``, torchao's ``quantize_``): they find no ``nn.Linear`` and do nothing.

    Args:
        projector: A :class:`LinearProjector`, :class:`ViTProjector` or
            :class:`PerceiverProjector`.
        dtype: Of the folded weights; the projector's own when ``None``. They are combined in fp64.
        grid: The grid of the features that a Perceiver will see most, for which positions are kept
            ready; its query grid when ``None``. Other grids stay possible.
        triton: Whether to fold for the Triton kernels, which skip the zero half of a triangular
            factor, or for PyTorch, which does not; when ``None`` for whichever runs on the
            projector's device. Either form runs on both; the other is merely slower there. Set it
            to fold on one machine for another.

    Raises:
        TypeError: If ``projector`` is something else, or ``grid`` is given for one without grid.
        ValueError: If the projector or a layer of it carries an adapter, a hook or a
            parametrisation, is quantised or sharded, has no weights, or if the attention has
            dropout, ``bias_k`` or ``add_zero_attn``; the message names the layer and says why.
            Under ZeRO-3 gather its parameters around the call.
    """
    check_module("fold", projector)
    _check_whole(projector)
    kind = _kind(projector)
    if grid is not None and kind is not PerceiverProjector:
        raise TypeError(f"{kind.__name__} has no grid to fold for")
    if triton is None:
        triton = _will_run_triton(projector, dtype)
    with torch.no_grad(), torch.inference_mode(False):
        if isinstance(projector, PerceiverProjector):
            return _fold_perceiver(projector, dtype, grid, triton)
        if isinstance(projector, ViTProjector):
            return _fold_vit(projector, dtype, triton)
        tail = _fold_linear(projector, dtype, triton)
        tail.config["digest"] = weights_digest(projector)
        return tail


def _will_run_triton(projector: nn.Module, dtype: torch.dtype | None) -> bool:
    weight = next(projector.parameters())
    dtype = weight.dtype if dtype is None else dtype
    return dtype != torch.float64 and runs_triton(weight.new_empty(0, dtype=dtype))


def _check_whole(projector: nn.Module) -> None:
    """Raise where ZeRO-3 keeps a parameter in pieces, or there is none."""
    for name, parameter in projector.named_parameters():
        if parameter.is_meta:
            raise InputError(
                f"cannot fold {type(projector).__name__}: its {name} is on the device meta and has "
                "no numbers"
            )
        if getattr(parameter, "ds_shape", parameter.shape) != parameter.shape:
            raise InputError(
                f"cannot fold {type(projector).__name__}: ZeRO-3 keeps its {name} in pieces; fold "
                "inside deepspeed.zero.GatheredParameters"
            )


def _kind(projector: nn.Module) -> type[nn.Module]:
    """Which of the three it is, if calling it does what that class does."""
    for kind in (PerceiverProjector, ViTProjector, LinearProjector):
        if isinstance(projector, kind):
            name = type(projector).__name__
            if type(projector).forward is not kind.forward:
                raise InputError(f"cannot fold {name}: its class has a forward of its own")
            if reason := why_touched(projector):
                raise InputError(f"cannot fold {name}: {reason}, which would be lost")
            return kind
    raise TypeError(
        f"cannot fold a {type(projector).__name__}: fold takes a LinearProjector, ViTProjector or "
        "PerceiverProjector"
    )


def _pair(pair: Any, name: str, *kinds: type[nn.Module]) -> list[Any]:
    """The two plain layers of a Sequential, which is called ``name`` or is the projector."""
    if name and (reason := why_called(pair, nn.Sequential)):
        raise InputError(f"cannot fold {name}: {reason}")
    if len(pair) != len(kinds):
        raise InputError(f"cannot fold {name or 'the projector'}: it has {len(pair)} layers, not 2")
    prefix = f"{name}." if name else "layer "
    _check_plain({f"{prefix}{i}": both for i, both in enumerate(zip(pair, kinds, strict=True))})
    return list(pair)


def _fold_linear(
    pair: Any, dtype: torch.dtype | None, triton: bool, prefix: str = ""
) -> FoldedLinear:
    linear, norm = _pair(pair, prefix, nn.Linear, nn.LayerNorm)
    shift = _or_zeros(norm.bias, norm.weight)
    floor = None
    if triton and linear.in_features < linear.out_features:
        centred = _centred(linear)
        stats_weight, stats_bias, floor = _row_scale(centred, norm.eps)
        weight, bias = _augmented(norm.weight.double()[:, None] * centred)
        constants = {"stats_weight": stats_weight, "stats_bias": stats_bias}
    else:
        weight, bias = linear.weight, _or_zeros(linear.bias, linear.weight)
        constants = {"gain": norm.weight}
    constants |= {"weight": weight, "bias": bias, "shift": shift}
    config = {
        "vis_dim": linear.in_features,
        "lang_dim": linear.out_features,
        "eps": norm.eps,
        "floor": floor,
    }
    return FoldedLinear(config, _copies(constants, dtype or linear.weight.dtype))


def _fold_vit(projector: ViTProjector, dtype: torch.dtype | None, triton: bool) -> FoldedViT:
    tail = _fold_linear(projector.projection, dtype, triton, "projection")
    layer = projector.vis_layer
    parts = layer.named_modules(prefix="vis_layer")
    _check_plain({n: (m, _CLIP_PARTS.get(n, nn.Linear)) for n, m in parts})
    if layer.self_attn.dropout:
        raise InputError(
            f"cannot fold vis_layer.self_attn: its dropout is {layer.self_attn.dropout}, not 0"
        )
    vision = dict(
        zip(
            VisionConfig.__annotations__,
            (
                projector.vis_dim,
                layer.mlp.fc1.out_features,
                layer.self_attn.num_heads,
                layer.mlp.hidden_act,
                layer.layer_norm1.eps,
                layer.self_attn.dropout,
            ),
            strict=True,
        )
    )
    config = {**tail.config, "vision": vision, "digest": weights_digest(projector)}
    return FoldedViT(config, copy.deepcopy(layer).eval().to(tail.weight.dtype), tail)


def _fold_perceiver(
    projector: PerceiverProjector, dtype: torch.dtype | None, grid: Grid | None, triton: bool
) -> FoldedPerceiver:
    attn: Any = projector.attn
    _check_plain(
        {
            "kv_proj": (projector.kv_proj, nn.Linear),
            "ln_q": (projector.ln_q, nn.LayerNorm),
            "ln_kv": (projector.ln_kv, nn.LayerNorm),
            "attn": (attn, nn.MultiheadAttention),
            "attn.out_proj": (getattr(attn, "out_proj", None), NonDynamicallyQuantizableLinear),
        }
    )
    if attn.dropout:
        raise InputError(f"cannot fold attn: its dropout is {attn.dropout}, not 0")
    if attn.embed_dim != projector.embed_dim:
        raise InputError(
            f"cannot fold attn: it is {attn.embed_dim} wide, the queries {projector.embed_dim}"
        )
    # The resampler inside Qwen-VL's encoder ends with its attention.
    has_projection = type(projector.projection) is not nn.Identity
    if not has_projection and (reason := why_touched(projector.projection)):
        raise InputError(f"cannot fold projection: {reason}")
    if has_projection:
        final_norm, _ = _pair(projector.projection, "projection", nn.LayerNorm, nn.Linear)
    grid = projector.query_grid if grid is None else check_grid(grid)
    constants, floor = _fold_keys_and_values(projector, grid)
    behind, out_floor = _fold_output(attn.out_proj, projector.projection, triton)
    config = {
        "vis_dim": projector.vis_dim,
        "lang_dim": projector.embed_dim,
        "num_heads": attn.num_heads,
        "query_grid": list(projector.query_grid),
        "grid": list(grid),
        "has_cls": projector.has_cls,
        "floor": floor,
        "out_eps": final_norm.eps if has_projection else None,
        "out_floor": out_floor,
        "digest": weights_digest(projector),
    }
    dtype = dtype or projector.kv_proj.weight.dtype
    return FoldedPerceiver(config, _copies(constants | behind, dtype))


def _fold_keys_and_values(
    projector: PerceiverProjector, grid: Grid
) -> tuple[dict[str, Tensor], float]:
    """The constants in front of the attention, and what is added to the mean square."""
    attn: Any = projector.attn
    positions = projector.pos_embed.detach()
    resized = resize_position_table(positions, projector.query_grid, grid)
    w_q, w_k, w_v = attn.in_proj_weight.double().chunk(3)
    b_q, _, b_v = _or_zeros(attn.in_proj_bias, attn.in_proj_weight).double().chunk(3)
    centred = _centred(projector.kv_proj)  # [D, C + 1]
    stats_weight, stats_bias, floor = _row_scale(centred, projector.ln_kv.eps)
    gain = projector.ln_kv.weight.double()
    shift = _or_zeros(projector.ln_kv.bias, gain).double()
    kv_weight, kv_bias = _augmented(torch.cat([w_k, w_v]) @ (gain[:, None] * centred))
    value_shift = w_v @ shift + b_v

    def table(positions: Tensor) -> Tensor:
        keys = positions.double() @ w_k.T
        return torch.cat([keys, value_shift.expand_as(keys)], 1)

    query = _layer_norm(projector.ln_q, projector.query.double()) + positions.double()
    return {
        "stats_weight": stats_weight,
        "stats_bias": stats_bias,
        "kv_weight": kv_weight,
        "kv_bias": kv_bias,
        "queries": F.linear(query, w_q, b_q).unflatten(-1, (attn.num_heads, -1)),
        "position_table": table(positions),
        "kv_table": table(resized),
    }, floor


def _fold_output(
    linear: Any, projection: Any, triton: bool
) -> tuple[dict[str, Tensor], float | None]:
    """The constants behind the attention; with the second fold what is added to the mean square.

    In PyTorch the statistics' zero half is multiplied as well, and nothing would be gained.
    """
    first = {"out_weight": linear.weight, "out_bias": _or_zeros(linear.bias, linear.weight)}
    if type(projection) is nn.Identity:
        return first, None
    norm, final = projection
    shift = _or_zeros(norm.bias, norm.weight)
    bias = _or_zeros(final.bias, final.weight)
    if not triton:
        behind = {"gain": norm.weight, "shift": shift}
        return first | behind | {"final_weight": final.weight, "final_bias": bias}, None
    centred, last = _centred(linear), final.weight.double()
    stats_weight, stats_bias, floor = _row_scale(centred, norm.eps)
    weight, folded_bias = _augmented(last @ (norm.weight.double()[:, None] * centred))
    return {
        "out_stats_weight": stats_weight,
        "out_stats_bias": stats_bias,
        "final_weight": weight,
        "final_bias": folded_bias,
        "final_shift": last @ shift.double() + bias.double(),
    }, floor


def _row_scale(centred: Tensor, eps: float) -> tuple[Tensor, Tensor, float]:
    """``R``, ``r`` and ``floor``: the variance of a row is ``‖x Rᵀ + r‖² + floor - eps``.

    The squares are those of a mean, not of a sum, so that fp16 holds what it holds unfolded.
    """
    factor = torch.linalg.qr(centred, mode="r").R / math.sqrt(centred.shape[0])
    floor = eps
    if factor.shape[0] == factor.shape[1]:  # [min(D, C + 1), C + 1]
        # The last row is zero but for its corner: a constant, kept out of the product.
        floor += factor[-1, -1].item() ** 2
        factor = factor[:-1]
    return *_augmented(factor), floor


def _augmented(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[W | b]`` taken apart."""
    return weight[:, :-1], weight[:, -1]


def _centred(linear: nn.Linear) -> Tensor:
    """``[W | b]`` minus its mean over the outputs, fp64 ``[D, C + 1]``."""
    bias = _or_zeros(linear.bias, linear.weight)
    augmented = torch.cat([linear.weight, bias[:, None]], 1).double()
    return augmented - augmented.mean(0)


def _or_zeros(bias: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else bias


def _copies(constants: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.detach().to(dtype, copy=True).contiguous() for k, v in constants.items()}


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    shift = _or_zeros(norm.bias, norm.weight).double()
    return F.layer_norm(x, norm.normalized_shape, norm.weight.double(), shift, norm.eps)


def _check_plain(children: dict[str, tuple[Any, type[nn.Module]]]) -> None:
    for name, (child, kind) in children.items():
        if reason := why_called(child, kind):
            raise InputError(
                f"cannot fold {name}: it must be a plain {kind.__name__}, and {reason}"
            )
