"""The CLIP encoder layer, with transformers' state-dict keys, and its configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visproj.checks import check_heads, check_range, check_width, vision_width
from visproj.errors import InputError


@dataclass(frozen=True)
class VisionConfig:
    """The fields of transformers' ``CLIPVisionConfig`` that a CLIP layer is built from."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float
    attention_dropout: float

    def __post_init__(self) -> None:
        width = vision_width(self)
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            raise InputError(
                f"hidden_act must be one of {sorted(ACTIVATIONS)}, got {self.hidden_act!r}"
            )
        checked = {
            "hidden_size": width,
            "intermediate_size": check_width("intermediate_size", self.intermediate_size),
            "num_attention_heads": check_heads(width, self.num_attention_heads),
            "layer_norm_eps": check_range("layer_norm_eps", self.layer_norm_eps, math.inf),
            "attention_dropout": check_range("attention_dropout", self.attention_dropout, 1.0),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, config: object) -> VisionConfig:
        """Read these fields from any object that has them.

        Raises:
            TypeError: If ``config`` lacks a field, or a numeric field is not a number.
            InputError: If a width is not positive, the heads do not divide it, eps or dropout is
                out of range or the activation is unknown.
        """
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if not hasattr(config, name)]
        if missing:
            raise TypeError(
                f"vis_config ({type(config).__name__}) lacks {', '.join(missing)}: the ViT "
                "projector needs a CLIPVisionConfig or an object with its fields"
            )
        return cls(**{name: getattr(config, name) for name in names})


def quick_gelu(x: Tensor) -> Tensor:
    """Compute ``x * sigmoid(1.702 x)``, the activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """Compute the tanh approximation of GELU."""
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
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
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
    """The MLP of a CLIP layer, ``fc2(act(fc1(x)))``: ``[..., S, C] -> [..., S, C]``."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.hidden_act = config.hidden_act
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Apply two Linears with the config's activation between them."""
        return self.fc2(ACTIVATIONS[self.hidden_act](self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    """CLIP's pre-norm transformer block with transformers' 16 state-dict keys.

    ``x = x + attention(layer_norm1(x))``, then ``x + mlp(layer_norm2(x))``, over ``[..., S, C]``.

    Source: Radford et al. 2021, CLIP; the keys of transformers' ``CLIPEncoderLayer``.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block: ``[..., S, C] -> [..., S, C]``."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))
