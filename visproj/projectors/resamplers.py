"""The Perceiver's relatives in other models: Qwen-VL's and MiniCPM-V's resamplers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visproj.calls import MiniCPM2Calls, MiniCPMCalls
from visproj.errors import InputError
from visproj.folding.algebra import fold_linear_norm
from visproj.folding.modules import ScaledLinear, copied, copied_norm
from visproj.folding.resamplers import (
    FoldedMiniCPM,
    FoldedMiniCPM2,
    FoldedMiniCPM2Resized,
    FoldedResampler,
)
from visproj.fusion import Reads, is_plain, linear_norm_linear
from visproj.positions import Grid, by_cell, position_axes, sincos_axis
from visproj.projectors.attention import (
    OUTPUT,
    AttentionResampler,
    init_linear,
    projected_axes,
)

_TAIL: Reads = {**OUTPUT, "ln_post": nn.LayerNorm}
_FORESEEN = (70, 70)  # rows and columns whose positions a fold stores


class QwenVLResampler(AttentionResampler):
    """Qwen-VL's resampler: it ends with its attention, and has neither CLS nor ``kv_proj`` bias.

    ``[..., L, C] -> [..., Q, D]``. If ``C`` equals ``D``, there is no ``kv_proj`` weight.
    State-dict keys: ``query [Q, D]``, ``pos_embed [Q, D]``, ``kv_proj.weight [D, C]``, ``attn.*``,
    ``ln_q.*``, ``ln_kv.*``.

    Args:
        vis_dim: Width ``C`` of the features.
        embed_dim: Width ``D`` of queries, keys and values, a multiple of 4.
        query_grid: Rows and columns of the queries.
        num_heads: Attention heads, ``max(1, D // 128)`` when ``None``.
        eps: Eps of the LayerNorms.
        table: Whether there is a table ``pos_embed`` over the query grid.

    Source: Qwen-VL ``visual.py`` and DeepSpeed-VisualChat ``qwen_clip.py``, ``Resampler``.
    """

    def __init__(
        self,
        vis_dim: int,
        embed_dim: int,
        *,
        query_grid: Grid = (16, 16),
        num_heads: int | None = None,
        eps: float = 1e-6,
        table: bool = True,
    ) -> None:
        super().__init__(
            vis_dim,
            embed_dim,
            query_grid=query_grid,
            num_heads=num_heads,
            has_cls=False,
            eps=eps,
            table=table,
        )
        if vis_dim == embed_dim:
            self.kv_proj = nn.Identity()
        else:
            self.kv_proj = nn.Linear(vis_dim, embed_dim, bias=False)
            nn.init.trunc_normal_(self.kv_proj.weight, std=0.02)
        init_linear(self.attn.out_proj)


class _MiniCPMTail(QwenVLResampler):
    """Base class of MiniCPM-V's resamplers: after the attention, ``LN_post(O W_oᵀ + b_o) P``."""

    def __init__(self, vis_dim: int, embed_dim: int, **options: Any) -> None:
        super().__init__(vis_dim, embed_dim, **options)
        self.ln_post = nn.LayerNorm(embed_dim, eps=self.ln_kv.eps)
        self.proj = nn.Parameter(torch.randn(embed_dim, embed_dim) * embed_dim**-0.5)

    def finish(self, attended: Tensor) -> Tensor:
        """See :meth:`Resampler.finish`; ``out_proj``, LayerNorm and ``proj`` are one operation."""
        if is_plain(self, _TAIL) and type(self.proj) in (Tensor, nn.Parameter):
            return linear_norm_linear(attended, self.attn.out_proj, self.ln_post, self.proj.T, None)
        return super().finish(attended)

    def finish_projected(self, x: Tensor) -> Tensor:
        """Apply LayerNorm and ``proj``."""
        return self.ln_post(x) @ self.proj

    def _reads(self) -> Reads:
        return _TAIL

    def _folded_tail(self, dtype: torch.dtype) -> tuple[nn.Module, dict[str, float | None]]:
        linear: Any = self.attn.out_proj
        norm = self.ln_post
        inner = (linear.weight, linear.bias, norm.weight, norm.bias, norm.eps)
        scaled = fold_linear_norm(*inner, self.proj.T, None)
        return ScaledLinear(copied(scaled, dtype)), {"out_floor": scaled.floor}


class MiniCPMResampler(_MiniCPMTail, MiniCPMCalls):
    """The resampler of MiniCPM-V 2.5, 2.6, 4.x and MiniCPM-o.

    ``y = LN_kv(x W_kvᵀ)``; queries ``LN_q(query)``, keys ``y + pos[:h, :w]``, values ``y``;
    multi-head attention; ``LN_post(O W_oᵀ + b_o) P``. The sine-cosine table ``pos`` is sliced,
    never resized; it is extended if a grid is larger. State-dict keys: ``query [Q, D]``,
    ``proj [D, D]``, ``kv_proj.weight [D, C]`` (none if ``C`` equals ``D``), ``attn.*``, ``ln_q.*``,
    ``ln_kv.*``, ``ln_post.*``; ``pos_embed [h, w, D]`` is a buffer that is not saved.

    Args:
        vis_dim: Width ``C`` of the features.
        embed_dim: Width ``D`` of the language model, a multiple of 4.
        num_queries: Number ``Q`` of queries.
        num_heads: Attention heads, ``max(1, D // 128)`` when ``None``.
        eps: Eps of the LayerNorms.
        max_size: Rows and columns of the table.

    Source: MiniCPM-V ``resampler.py``.
    """

    folded: ClassVar[type[FoldedResampler]] = FoldedMiniCPM
    pos_embed: Tensor

    def __init__(
        self,
        vis_dim: int,
        embed_dim: int,
        *,
        num_queries: int = 64,
        num_heads: int | None = None,
        eps: float = 1e-6,
        max_size: Grid = _FORESEEN,
    ) -> None:
        super().__init__(
            vis_dim,
            embed_dim,
            query_grid=(1, num_queries),
            num_heads=num_heads,
            eps=eps,
            table=False,
        )
        self.register_buffer("pos_embed", _cells(embed_dim, max_size), persistent=False)

    def latents(self) -> Tensor:
        """See :meth:`AttentionResampler.latents`; here without positions."""
        return self.ln_q(self.query)

    def positions(self, grid: Grid) -> Tensor:
        """See :meth:`Resampler.positions`; a slice of the table, which is extended if needed."""
        table = self.pos_embed
        if grid[0] > table.shape[0] or grid[1] > table.shape[1]:
            sides = max(grid[0], table.shape[0]), max(grid[1], table.shape[1])
            with torch.inference_mode(False):  # a later backward may need the table
                table = _cells(self.embed_dim, sides).to(table)
            if not torch.compiler.is_compiling():
                self.pos_embed = table
        return table[: grid[0], : grid[1]].flatten(0, 1).to(self.query)

    def _is_separable(self) -> bool:
        high, wide, _ = self.pos_embed.shape  # a larger one is sine-cosine, which is separable
        return self._positions.is_separable(self.pos_embed, (high, wide))

    def positions_at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """See :meth:`MiniCPMCalls.positions_at`."""
        high, wide, _ = self.pos_embed.shape
        outside = (rows >= high) | (columns >= wide)
        found = self.pos_embed[rows.clamp(max=high - 1), columns.clamp(max=wide - 1)]
        return found.masked_fill(outside[:, None], math.nan).to(self.query)

    def temporal_positions(self, times: Sequence[int]) -> Tensor:
        """See :meth:`MiniCPMCalls.temporal_positions`."""
        table = sincos_axis(self.embed_dim, [max(time, 0) for time in times])
        table[[time < 0 for time in times]] = 0
        return table.to(self.query)

    def _latents_in_double(self) -> Tensor:
        return copied_norm(self.ln_q, torch.float64)(self.query.double())

    def _usual_grid(self) -> Grid:
        return 32, 32

    def _described(self) -> dict[str, Any]:
        return {"table": list(self.pos_embed.shape[:2])}

    def _tables(self, weight: Tensor, grid: Grid) -> dict[str, Tensor]:
        high, wide, _ = self.pos_embed.shape
        axes = position_axes(self.pos_embed.flatten(0, 1), (high, wide))
        if axes is None:
            raise InputError(
                "cannot fold pos_embed of MiniCPMResampler: it is not separable into one vector "
                "per row and one per column"
            )
        return {"position_weight": weight, **projected_axes(weight, *axes)}


class MiniCPM2Resampler(_MiniCPMTail, MiniCPM2Calls):
    """The resampler of MiniCPM-V 1.0 and 2.0.

    It differs from :class:`MiniCPMResampler` in two points: queries have the positions
    ``pos_embed [Q, D]``, a parameter, and the images of a batch share one grid.

    Args:
        vis_dim: Width ``C`` of the features.
        embed_dim: Width ``D`` of the language model, a multiple of 4.
        query_grid: Rows and columns of the queries.
        num_heads: Attention heads, ``max(1, D // 128)`` when ``None``.
        eps: Eps of the LayerNorms.
        adaptive: Whether the keys' positions are the sine-cosine table of their own grid (2.0), or
            ``pos_embed`` resized bicubically (1.0).

    Source: MiniCPM-V-2 ``resampler.py``.
    """

    def __init__(
        self,
        vis_dim: int,
        embed_dim: int,
        *,
        query_grid: Grid = (8, 8),
        num_heads: int | None = None,
        eps: float = 1e-6,
        adaptive: bool = True,
    ) -> None:
        super().__init__(vis_dim, embed_dim, query_grid=query_grid, num_heads=num_heads, eps=eps)
        self.adaptive = adaptive

    @property
    def folded(self) -> type[FoldedResampler]:  # type: ignore[override]
        """The folded form's class."""
        return FoldedMiniCPM2 if self.adaptive else FoldedMiniCPM2Resized

    def positions(self, grid: Grid) -> Tensor:
        """See :meth:`Resampler.positions`."""
        if not self.adaptive:
            return super().positions(grid)
        return _cells(self.embed_dim, grid).flatten(0, 1).to(self.query)

    def _described(self) -> dict[str, Any]:
        return {"table": list(_FORESEEN)} if self.adaptive else super()._described()

    def _tables(self, weight: Tensor, grid: Grid) -> dict[str, Tensor]:
        if not self.adaptive:
            return super()._tables(weight, grid)
        half = self.embed_dim // 2
        rows, columns = (sincos_axis(half, range(size)) for size in _FORESEEN)
        return {"position_weight": weight, **projected_axes(weight, rows, columns)}


def _cells(width: int, grid: Grid) -> Tensor:
    """Compute the sine-cosine table ``[h, w, D]`` of a grid, columns first, as MiniCPM-V does."""
    return by_cell(*(sincos_axis(width // 2, range(size)) for size in grid))
