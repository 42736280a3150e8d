"""The baselines: modules with visproj's state-dict keys that do not use visproj's operations.

*Upstream* is DeepSpeed-VisualChat's arithmetic as it runs there: attention probabilities are
written to memory, and queries are repeated and projected once per image. *Fair* is the same formula
as one would write it today: SDPA, and queries projected once per call.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visproj.clip import CLIPAttention, VisionConfig
from visproj.positions import (
    Grid,
    PositionCache,
    grid_of,
    resize_position_table,
    sincos_position_table,
)
from visproj.projectors.vit import ViTProjector


class UpstreamPerceiver(nn.Module):
    """DeepSpeed-VisualChat's arithmetic, with its state-dict keys.

    Queries are repeated and projected once per image. ``nn.MultiheadAttention`` has its default
    ``need_weights=True``, so scores and probabilities are written to memory. Positions are resized
    in every call. Features without CLS, which upstream does not take, get the same arithmetic.
    """

    def __init__(
        self,
        vis_dim: int,
        lang_dim: int,
        heads: int,
        grid: Grid = (16, 16),
        *,
        has_cls: bool = True,
    ) -> None:
        super().__init__()
        self.grid, self.has_cls = grid, has_cls
        self.pos_embed = nn.Parameter(sincos_position_table(lang_dim, grid), requires_grad=False)
        self.query = nn.Parameter(torch.zeros(grid[0] * grid[1], lang_dim))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.kv_proj = nn.Linear(vis_dim, lang_dim)
        self.attn = nn.MultiheadAttention(lang_dim, heads)
        self.ln_q = nn.LayerNorm(lang_dim, eps=1e-12)
        self.ln_kv = nn.LayerNorm(lang_dim, eps=1e-12)
        self.projection = nn.Sequential(
            nn.LayerNorm(lang_dim, eps=1e-12), nn.Linear(lang_dim, lang_dim)
        )
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.constant_(module.bias, 0)

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        """Resample ``[B, (1 +) L, C] -> [B, Q, D]``."""
        y = self.ln_kv(self.kv_proj(x[:, 1:] if self.has_cls else x)).transpose(0, 1)
        pos = self.pos_embed[:, None]
        key_pos = resize_position_table(self.pos_embed, self.grid, grid_of(len(y), None))
        queries = self.ln_q(self.query)[:, None].repeat(1, y.shape[1], 1) + pos
        out = self.attn(queries, y + key_pos[:, None], y, **masks)[0]
        return self.projection(out.transpose(0, 1))


class FairPerceiver(UpstreamPerceiver):
    """The same function with SDPA, and with queries and positions prepared once per call."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._positions = PositionCache()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Resample ``[B, (1 +) L, C] -> [B, Q, D]``."""
        y = self.ln_kv(self.kv_proj(x[:, 1:] if self.has_cls else x))
        key_pos = self._positions.resize(self.pos_embed, self.grid, grid_of(y.shape[1], None))
        q, k, v = (
            F.linear(tokens, weight, bias)
            .unflatten(-1, (self.attn.num_heads, -1))
            .transpose(-3, -2)
            for tokens, weight, bias in zip(
                (self.ln_q(self.query) + self.pos_embed, y + key_pos, y),
                self.attn.in_proj_weight.chunk(3),
                self.attn.in_proj_bias.chunk(3),
                strict=True,
            )
        )
        out = F.scaled_dot_product_attention(q.expand(len(x), -1, -1, -1), k, v)
        return self.projection(self.attn.out_proj(out.transpose(1, 2).flatten(-2)))


class FairViT(ViTProjector):
    """The ViT projector that calls its children: SDPA, then Linear and LayerNorm separately."""

    def forward(self, x: Tensor) -> Tensor:
        """Project ``[B, S, C] -> [B, S, D]``."""
        return self.projection(self.vis_layer(x))


class UpstreamViT(FairViT):
    """The same with unfused attention, as in the transformers that upstream was made for."""

    def __init__(self, vis_config: VisionConfig, lang_dim: int) -> None:
        super().__init__(vis_config, lang_dim)
        self.vis_layer.self_attn = _UnfusedAttention(vis_config)


class _UnfusedAttention(CLIPAttention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
        return self.out_proj((scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2))


class FairAttention(nn.Module):
    """SDPA with queries that the batch shares: keys, values ``[B, L, H, d] -> [B, Q, H, d]``."""

    def __init__(self, queries: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, heads, head_width))

    def forward(self, k: Tensor, v: Tensor) -> Tensor:
        """Attend without a mask."""
        q = self.queries.transpose(0, 1).expand(len(k), -1, -1, -1)
        out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)


class UpstreamAttention(FairAttention):
    """The same with repeated queries; scores, probabilities and their mean go to memory."""

    def forward(self, k: Tensor, v: Tensor) -> Tensor:
        """Attend without a mask; the mean over the heads is computed, but not used."""
        q = self.queries.repeat(len(k), 1, 1, 1).transpose(1, 2)
        scores = (q / math.sqrt(q.shape[-1])) @ k.permute(0, 2, 3, 1)
        probabilities = scores.softmax(-1)
        probabilities.mean(1)
        return (probabilities @ v.transpose(1, 2)).transpose(1, 2)


def liger_missing(device: torch.device) -> str | None:
    """Return why Liger's LayerNorm cannot run here, or ``None``."""
    if device.type != "cuda":
        return "Liger's kernels need a GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    return None


class LigerLinearNorm(nn.Sequential):
    """``F.linear`` and Liger's LayerNorm, with the keys of ``nn.Sequential(Linear, LayerNorm)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Project ``[B, S, C] -> [B, S, D]``."""
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        linear: Any = self[0]
        norm: Any = self[1]
        y = F.linear(x, linear.weight, linear.bias)
        return LigerLayerNormFunction.apply(y, norm.weight, norm.bias, norm.eps)
