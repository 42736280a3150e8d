"""The Perceiver resampler: learned queries attend to the visual tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from visproj.checks import check_width, vision_width
from visproj.folding.algebra import fold_linear_norm
from visproj.folding.modules import ScaledLinear, copied
from visproj.fusion import Reads, is_plain, linear_norm_linear
from visproj.positions import Grid
from visproj.projectors.attention import OUTPUT, AttentionResampler, init_linear

_TAIL: Reads = {
    **OUTPUT,
    "projection": nn.Sequential,
    "projection.0": nn.LayerNorm,
    "projection.1": nn.Linear,
}


class PerceiverProjector(AttentionResampler):
    """The Perceiver resampler: ``[..., 1 + L, C] -> [..., Q, D]``, any number of tokens to ``Q``.

    ``y = LN_kv(x W_kvᵀ + b_kv)``; queries ``LN_q(query) + pos``, keys ``y + pos_k``, values ``y``;
    multi-head attention; then ``LN`` and ``Linear``. Every LayerNorm has eps 1e-12. ``pos`` is a
    frozen 2-D sine-cosine table over the query grid, ``pos_k`` the same table resized bicubically
    to the grid of the features. The queries are normalised and projected once per call.

    State-dict keys: ``query [Q, D]``, ``pos_embed [Q, D]``, ``kv_proj.{weight [D, C], bias}``,
    ``attn.{in_proj_weight [3D, D], in_proj_bias, out_proj.weight, out_proj.bias}``,
    ``ln_q.*``, ``ln_kv.*``, ``projection.0.*`` (LayerNorm), ``projection.1.*`` (Linear). Initial
    weights follow upstream's rule: truncated normal with standard deviation 0.02 for queries and
    Linears, zero biases, and Xavier for ``in_proj_weight``, as ``nn.MultiheadAttention`` sets it.

    Args:
        vis_config: A ``CLIPVisionConfig``, any object with ``hidden_size``, or the width ``C``.
        lang_dim: Width ``D`` of the language model, a multiple of 4.
        query_grid: Rows and columns of the learned queries; ``Q`` is their product.
        num_heads: Attention heads, ``max(1, D // 128)`` when ``None``.
        has_cls: Whether the first visual token is a CLS token, to be dropped.

    Raises:
        TypeError: If ``vis_config`` has no width, ``lang_dim`` or ``num_heads`` is not an int, or
            ``has_cls`` not a bool.
        ValueError: If the heads do not divide ``D``, ``D`` is not a multiple of 4, or a width or
            grid is not positive.

    Source: DeepSpeed-VisualChat ``utils/model/vis_proj.py``, ``VisProjection_perceiver``.
    """

    def __init__(
        self,
        vis_config: object,
        lang_dim: int,
        *,
        query_grid: Grid = (16, 16),
        num_heads: int | None = None,
        has_cls: bool = True,
    ) -> None:
        lang_dim = check_width("lang_dim", lang_dim)
        super().__init__(
            vision_width(vis_config),
            lang_dim,
            query_grid=query_grid,
            num_heads=num_heads,
            has_cls=has_cls,
            eps=1e-12,
        )
        self.projection = nn.Sequential(
            nn.LayerNorm(lang_dim, eps=1e-12), nn.Linear(lang_dim, lang_dim)
        )
        self.apply(init_linear)

    def finish(self, attended: Tensor) -> Tensor:
        """See :meth:`Resampler.finish`; ``out_proj``, LayerNorm and Linear are one operation."""
        if is_plain(self, _TAIL):
            norm: Any
            outer: Any
            norm, outer = self.projection
            return linear_norm_linear(attended, self.attn.out_proj, norm, outer.weight, outer.bias)
        return super().finish(attended)

    def finish_projected(self, x: Tensor) -> Tensor:
        """Apply LayerNorm and Linear."""
        return self.projection(x)

    def _reads(self) -> Reads:
        return _TAIL

    def _folded_tail(self, dtype: torch.dtype) -> tuple[nn.Module, dict[str, float | None]]:
        linear: Any = self.attn.out_proj
        norm: Any
        outer: Any
        norm, outer = self.projection
        inner = (linear.weight, linear.bias, norm.weight, norm.bias, norm.eps)
        scaled = fold_linear_norm(*inner, outer.weight, outer.bias)
        return ScaledLinear(copied(scaled, dtype)), {"out_floor": scaled.floor}


VisProjection_perceiver = PerceiverProjector
