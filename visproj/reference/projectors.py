"""The three projectors written out step by step: slow, and in fp64 the tests' reference.

Each function takes a state dict with upstream's keys. No code is shared with the fast
implementation: queries are repeated for every image, and attention is a matmul, a softmax and a
matmul.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": lambda x: x.clamp(min=0.0),
    "silu": lambda x: x * torch.sigmoid(x),
}


def linear_projector_ref(state: State, x: Tensor, *, eps: float = 1e-12) -> Tensor:
    """Compute the baseline projector, ``LayerNorm(x Wᵀ + b)``: ``[..., C] -> [..., D]``."""
    return _layer_norm(state, "1", _linear(state, "0", x), eps)


def vit_projector_ref(
    state: State,
    x: Tensor,
    *,
    num_heads: int,
    hidden_act: str = "quick_gelu",
    layer_norm_eps: float = 1e-5,
    eps: float = 1e-12,
) -> Tensor:
    """Compute the ViT projector, CLIP layer, Linear and LayerNorm: ``[B, S, C] -> [B, S, D]``."""
    h = _layer_norm(state, "vis_layer.layer_norm1", x, layer_norm_eps)
    attention = "vis_layer.self_attn"
    q, k, v = (
        _split_heads(_linear(state, f"{attention}.{name}_proj", h), num_heads) for name in "qkv"
    )
    probabilities = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    x = x + _linear(state, f"{attention}.out_proj", _merge_heads(probabilities @ v))
    h = _layer_norm(state, "vis_layer.layer_norm2", x, layer_norm_eps)
    h = _ACTIVATIONS[hidden_act](_linear(state, "vis_layer.mlp.fc1", h))
    x = x + _linear(state, "vis_layer.mlp.fc2", h)
    return _layer_norm(state, "projection.1", _linear(state, "projection.0", x), eps)


def perceiver_projector_ref(
    state: State,
    x: Tensor,
    *,
    num_heads: int,
    query_grid: tuple[int, int] = (16, 16),
    grid: tuple[int, int] | None = None,
    has_cls: bool = True,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    eps: float = 1e-12,
) -> tuple[Tensor, Tensor]:
    """Compute the Perceiver: ``[B, (1+)S, C]`` to ``[B, Q, D]`` and maps ``[B, heads, Q, S]``."""
    features = x[:, 1:] if has_cls else x
    batch, tokens, _ = features.shape
    grid = grid or (math.isqrt(tokens), math.isqrt(tokens))
    query_pos = state["pos_embed"]
    key_pos = _resize(query_pos, query_grid, grid)

    y = _layer_norm(state, "ln_kv", _linear(state, "kv_proj", features), eps)
    query = _layer_norm(state, "ln_q", state["query"], eps).repeat(batch, 1, 1)
    w_q, w_k, w_v = state["attn.in_proj_weight"].chunk(3)
    b_q, b_k, b_v = state["attn.in_proj_bias"].chunk(3)
    q = _split_heads((query + query_pos) @ w_q.T + b_q, num_heads)
    k = _split_heads((y + key_pos) @ w_k.T + b_k, num_heads)
    v = _split_heads(y @ w_v.T + b_v, num_heads)

    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # [B, heads, Q, S]
    if attn_mask is not None:
        per_head = attn_mask if attn_mask.ndim == 2 else attn_mask.reshape(scores.shape)
        scores = (
            scores.masked_fill(per_head, -math.inf)
            if attn_mask.dtype == torch.bool
            else scores + per_head
        )
    if key_padding_mask is not None:
        scores = scores.masked_fill(key_padding_mask[:, None, None, :], -math.inf)
    nothing_left = (scores == -math.inf).all(-1, keepdim=True)
    maps = scores.softmax(-1).masked_fill(nothing_left, 0.0)

    out = _linear(state, "attn.out_proj", _merge_heads(maps @ v))
    return _linear(state, "projection.1", _layer_norm(state, "projection.0", out, eps)), maps


def projector_ref(
    projector: Any,
    x: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Compute the reference output of a projector of :mod:`visproj.projectors` for ``x``.

    Args:
        projector: A baseline, ViT or Perceiver projector, recognised by its state-dict keys.
        x: Its input, ``[B, tokens, C]``.
        dtype: Dtype that weights, input and additive mask are cast to first.
        attn_mask: As the Perceiver takes it.
        key_padding_mask: As the Perceiver takes it.
        grid: As the Perceiver takes it.

    Returns:
        ``[B, tokens out, D]`` in ``dtype``.
    """
    state = {key: value.detach().to(dtype) for key, value in projector.state_dict().items()}
    x = x.to(dtype)
    if "query" in state:
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
        return perceiver_projector_ref(
            state,
            x,
            num_heads=projector.num_heads,
            query_grid=projector.query_grid,
            grid=grid,
            has_cls=projector.has_cls,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
        )[0]
    if "vis_layer.mlp.fc1.weight" in state:
        return vit_projector_ref(
            state,
            x,
            num_heads=projector.vis_layer.self_attn.num_heads,
            hidden_act=projector.vis_layer.mlp.hidden_act,
            layer_norm_eps=projector.vis_layer.layer_norm1.eps,
        )
    return linear_projector_ref(state, x)


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _layer_norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, heads, N, d]


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # [B, N, D]


def _resize(table: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    if source == target:
        return table
    image = table.float().reshape(1, *source, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=target, mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)
