"""The ViT projector: one CLIP encoder layer, Linear and LayerNorm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visproj.errors import InputError
from visproj.ops.checks import check_alike
from visproj.projectors.config import (
    check_features,
    check_heads,
    check_range,
    check_width,
    vision_width,
)
from visproj.projectors.fusion import is_plain, linear_layer_norm, log_called

_READS = {"projection": nn.Sequential, "projection.0": nn.Linear, "projection.1": nn.LayerNorm}


class VisionConfig(Protocol):
    """The fields of transformers' ``CLIPVisionConfig`` that a CLIP layer is built from."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float
    attention_dropout: float


def quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)``, the activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_new": gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}


class CLIPAttention(nn.Module):
    """Multi-head self-attention through SDPA, ``[B, S, C] -> [B, S, C]``."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = vision_width(config)
        self.num_heads = check_heads(width, config.num_attention_heads)
        self.dropout = check_range("attention_dropout", config.attention_dropout, 1.0)
        # Built in transformers' order, so that one seed gives both the same weights.
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every token to every token."""
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.out_proj(out.transpose(-3, -2).flatten(-2))


class CLIPMLP(nn.Module):
    """``fc2(act(fc1(x)))``."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = vision_width(config)
        if not isinstance(config.hidden_act, str) or config.hidden_act not in ACTIVATIONS:
            raise InputError(
                f"hidden_act must be one of {sorted(ACTIVATIONS)}, got {config.hidden_act!r}"
            )
        self.hidden_act = config.hidden_act
        inner = check_width("intermediate_size", config.intermediate_size)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Two Linears around the config's activation."""
        return self.fc2(ACTIVATIONS[self.hidden_act](self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    """CLIP's pre-norm transformer block with transformers' 16 state-dict keys.

    ``x = x + attention(layer_norm1(x))``, then ``x + mlp(layer_norm2(x))``, over ``[..., S, C]``.

    Source: Radford et al. 2021, CLIP; the keys of transformers' ``CLIPEncoderLayer``.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = vision_width(config)
        eps = check_range("layer_norm_eps", config.layer_norm_eps, math.inf)
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., S, C] -> [..., S, C]``."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ViTProjector(nn.Module):
    """One more CLIP layer over the visual tokens, then ``LayerNorm(x Wᵀ + b)``, eps 1e-12.

    State-dict keys: ``vis_layer.*`` (the 16 of transformers' ``CLIPEncoderLayer``),
    ``projection.0.{weight [D, C], bias [D]}``, ``projection.1.{weight [D], bias [D]}``. The CLIP
    layer keeps its config's eps and attention dropout; its attention is SDPA whatever the config's
    ``_attn_implementation`` says. Fresh weights are those that upstream draws from the same seed.

    Args:
        vis_config: A ``CLIPVisionConfig`` or any object with the fields of :class:`VisionConfig`.
        lang_dim: Width ``D`` of the language model.

    Raises:
        TypeError: If ``vis_config`` lacks a field, or one is not a number that has to be one.
        ValueError: If a width is not positive, the heads do not divide ``C``, eps or dropout is out
            of range or the activation is unknown.

    Source: DeepSpeed-VisualChat ``utils/model/vis_proj.py``, ``VisProjection_vit``.
    """

    def __init__(self, vis_config: VisionConfig, lang_dim: int) -> None:
        super().__init__()
        missing = [name for name in VisionConfig.__annotations__ if not hasattr(vis_config, name)]
        if missing:
            raise TypeError(
                f"vis_config ({type(vis_config).__name__}) lacks {', '.join(missing)}: the ViT "
                "projector needs a CLIPVisionConfig or an object with its fields"
            )
        self.vis_dim = vision_width(vis_config)
        lang_dim = check_width("lang_dim", lang_dim)
        self.vis_layer = CLIPEncoderLayer(vis_config)
        self.projection = nn.Sequential(
            nn.Linear(self.vis_dim, lang_dim), nn.LayerNorm(lang_dim, eps=1e-12)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[..., S, C] -> [..., S, D]``; CLS, if there is one, is a token like any other.

        Raises:
            TypeError: If ``x`` is not floating point or has another dtype than the weights.
            ValueError: If ``x`` has another width or device than the weights.
        """
        check_features(x, self.vis_dim)
        log_called(self, _READS)
        if isinstance(self.vis_layer, CLIPEncoderLayer):
            first = self.vis_layer.layer_norm1
            if is_plain(first, nn.LayerNorm):
                check_alike("visual features", x, "the CLIP layer", first.weight)
        x = self.vis_layer(x)
        if is_plain(self.projection, nn.Sequential) and len(self.projection) == 2:
            return linear_layer_norm(x, self.projection[0], self.projection[1])
        return self.projection(x)

    def fold(self, **options: Any) -> nn.Module:
        """Same as :func:`visproj.fold`."""
        from visproj.folding import fold

        return fold(self, **options)


VisProjection_vit = ViTProjector
