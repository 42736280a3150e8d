"""Modules of MiniCPM-V and Qwen-VL, written out after their published structure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM = partial(nn.LayerNorm, eps=1e-6)


def axis(dim: int, positions: np.ndarray) -> np.ndarray:
    """Return sines and cosines of positions on one axis."""
    omega = np.arange(dim // 2, dtype=np.float32)
    omega /= dim / 2.0
    angles = np.einsum("m,d->md", positions.astype(np.float32), 1.0 / 10000**omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], -1)


def table(dim: int, size: Sequence[int]) -> Tensor:
    """Return the sine-cosine table ``[rows, columns, dim]``, columns first."""
    rows, columns = (axis(dim // 2, np.arange(n)) for n in size)
    across = np.broadcast_to(columns[None], (size[0], *columns.shape))
    down = np.broadcast_to(rows[:, None], (rows.shape[0], size[1], rows.shape[1]))
    return torch.from_numpy(np.concatenate([across, down], -1)).float()


class OwnAttention(nn.MultiheadAttention):
    """The subclass of some versions, whose output projection is an ordinary Linear."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.out_proj = nn.Linear(width, width)  # type: ignore[assignment]


class Attending(nn.Module):
    """The base class of the resamplers."""

    pos_embed: Tensor

    def __init__(
        self,
        vis_dim: int,
        dim: int,
        queries: int,
        heads: int,
        attention: type[nn.MultiheadAttention],
        positions: bool,
    ) -> None:
        super().__init__()
        self.num_queries, self.embed_dim, self.num_heads = queries, dim, heads
        if positions:
            side = math.isqrt(queries)
            cells = table(dim, (side, side)).flatten(0, 1)
            self.register_parameter("pos_embed", nn.Parameter(cells, requires_grad=False))
        self.query = nn.Parameter(torch.zeros(queries, dim))
        bare = vis_dim == dim
        self.kv_proj = nn.Identity() if bare else nn.Linear(vis_dim, dim, bias=False)
        self.attn = attention(dim, heads)
        self.ln_q = NORM(dim)
        self.ln_kv = NORM(dim)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, **masks: Any) -> Tensor:
        """Attend with queries that are repeated for every image."""
        batch = keys.shape[1]
        repeated = queries.unsqueeze(1).repeat(1, batch, 1)
        return self.attn(repeated, keys, values, **masks)[0].permute(1, 0, 2)

    def values(self, x: Tensor) -> Tensor:
        """Project and normalise the features: ``[B, L, C] -> [L, B, D]``."""
        return self.ln_kv(self.kv_proj(x)).permute(1, 0, 2)


def resized(positions: Tensor, size: Sequence[int]) -> Tensor:
    """Return a square table, resized to another grid."""
    side = math.isqrt(len(positions))
    planes = positions.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    planes = F.interpolate(planes, size=size, mode="bicubic", align_corners=False)
    return planes.permute(0, 2, 3, 1).flatten(0, 2).to(positions.dtype)


class QwenVL(Attending):
    """Qwen-VL's resampler, which DeepSpeed-VisualChat's Qwen-VL encoder has as well."""

    def __init__(
        self,
        vis_dim: int = 24,
        dim: int = 32,
        queries: int = 9,
        heads: int = 4,
        attention: type[nn.MultiheadAttention] = nn.MultiheadAttention,
    ) -> None:
        super().__init__(vis_dim, dim, queries, heads, attention, positions=True)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Resample ``[B, L, C] -> [B, Q, D]``."""
        side = math.isqrt(x.shape[1])
        positions = self.pos_embed
        if side * side != len(positions):
            positions = resized(positions, (side, side))
        values = self.values(x)
        queries = self.ln_q(self.query) + self.pos_embed
        return self.attend(queries, values + positions[:, None], values, attn_mask=attn_mask)


class MiniCPM2(Attending):
    """The resampler of MiniCPM-V 2.0, or with ``adaptive=False`` of 1.0."""

    def __init__(
        self,
        vis_dim: int = 24,
        dim: int = 32,
        queries: int = 9,
        heads: int = 4,
        attention: type[nn.MultiheadAttention] = nn.MultiheadAttention,
        adaptive: bool = True,
    ) -> None:
        super().__init__(vis_dim, dim, queries, heads, attention, positions=True)
        self.adaptive = adaptive
        self.ln_post = NORM(dim)
        self.proj = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))

    def forward(self, x: Tensor, tgt_size: Any = None, attn_mask: Tensor | None = None) -> Tensor:
        """Resample ``[B, L, C] -> [B, Q, D]``."""
        if self.adaptive:
            positions = table(self.embed_dim, tgt_size).flatten(0, 1).to(x)
        else:
            positions = resized(self.pos_embed, tgt_size)
        values = self.values(x)
        queries = self.ln_q(self.query) + self.pos_embed
        out = self.attend(queries, values + positions[:, None], values, attn_mask=attn_mask)
        return self.ln_post(out) @ self.proj


class MiniCPM(Attending):
    """The resampler of MiniCPM-V 2.5, 2.6, 4.0 and MiniCPM-o; with ``temporal`` of 4.5."""

    temporal_pos_embed: Tensor

    def __init__(
        self,
        vis_dim: int = 24,
        dim: int = 32,
        queries: int = 5,
        heads: int = 4,
        attention: type[nn.MultiheadAttention] = nn.MultiheadAttention,
        max_size: Sequence[int] = (6, 7),
        temporal: int = 0,
    ) -> None:
        super().__init__(vis_dim, dim, queries, heads, attention, positions=False)
        self.max_size = max_size
        self.ln_post = NORM(dim)
        self.proj = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))
        self.register_buffer("pos_embed", table(dim, max_size), persistent=False)
        if temporal:
            times = torch.from_numpy(axis(dim, np.arange(temporal))).float()
            self.register_buffer("temporal_pos_embed", times, persistent=False)

    def forward(self, x: Tensor, tgt_sizes: Any = None, temporal_ids: Any = None) -> Tensor:
        """Resample ``[B, L, C] -> [B, Q, D]``; with times, one entry per clip."""
        lengths = tgt_sizes[:, 0] * tgt_sizes[:, 1]
        high, wide = (int(n) for n in tgt_sizes.max(0).values)
        if high > self.max_size[0] or wide > self.max_size[1]:
            self.max_size = [max(high, self.max_size[0]), max(wide, self.max_size[1])]
            self.pos_embed = table(self.embed_dim, self.max_size).to(x.device)
        padding = torch.arange(int(lengths.max()), device=x.device) >= lengths[:, None].to(x.device)
        cells = [self.pos_embed[:h, :w].reshape(h * w, -1).to(x.dtype) for h, w in tgt_sizes]
        positions = nn.utils.rnn.pad_sequence(cells, batch_first=True).permute(1, 0, 2)
        values = self.values(x)
        keys, queries = values + positions, self.ln_q(self.query)
        flat = [] if temporal_ids is None else [t for clip in temporal_ids for t in clip]
        if flat and max(flat) > -1:
            zero = torch.zeros(self.embed_dim).to(x)
            times = [zero if t == -1 else self.temporal_pos_embed[t].to(x.dtype) for t in flat]
            keys = keys + torch.stack(times)
            outs, start = [], 0
            for clip in temporal_ids:
                frames = slice(start, start + len(clip))
                start += len(clip)
                joined = [
                    t[:, frames].permute(1, 0, 2).flatten(0, 1)[:, None] for t in (keys, values)
                ]
                mask = padding[frames].flatten()[None]
                outs.append(self.attend(queries, *joined, key_padding_mask=mask))
            out = torch.cat(outs)
        else:
            out = self.attend(queries, keys, values, key_padding_mask=padding)
        return self.ln_post(out) @ self.proj


class Holder(nn.Module):
    """A model with a resampler and another module."""

    def __init__(self, resampler: nn.Module) -> None:
        super().__init__()
        self.vision = nn.Linear(4, 4)
        self.resampler = resampler

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of the resampler."""
        return self.resampler(*args, **kwargs)
