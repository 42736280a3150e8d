"""The Perceiver resampler: learned queries attend to the visual tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from visproj import ops
from visproj.checks import check_heads, check_width, vision_width
from visproj.errors import InputError
from visproj.folding.algebra import fold_linear_norm, key_value_table, or_zeros
from visproj.folding.modules import (
    FoldedPerceiver,
    ScaledLinear,
    check_foldable,
    copied,
    copied_linear,
    copied_norm,
    own,
    weights_digest,
)
from visproj.fusion import Reads, is_plain, linear_layer_norm, linear_norm_linear
from visproj.ops.cross_attention import cast_mask, check_masks
from visproj.positions import Grid, check_grid, resize_position_table, sincos_position_table
from visproj.resampler import Resampler

_NORMALISED: Reads = {"kv_proj": nn.Linear, "ln_kv": nn.LayerNorm}
_ATTENTION: Reads = {"attn": nn.MultiheadAttention}
_OUTPUT: Reads = {"attn.out_proj": NonDynamicallyQuantizableLinear}
_TAIL: Reads = {
    **_OUTPUT,
    "projection": nn.Sequential,
    "projection.0": nn.LayerNorm,
    "projection.1": nn.Linear,
}
_QUERIES: Reads = {"ln_q": nn.LayerNorm}


class AttentionResampler(Resampler):
    """Learned queries and ``nn.MultiheadAttention`` over normalised features.

    ``y = LN_kv(x W_kvᵀ + b_kv)``; queries ``LN_q(query) + pos``, keys ``y + pos_k``, values ``y``;
    multi-head attention. ``pos`` is a frozen 2-D sine-cosine table over the query grid, ``pos_k``
    the same table resized bicubically to the grid of the features. The queries are normalised and
    projected once per call. A child that does more than apply its weights (LoRA, hooks) is called
    instead of being fused, at the cost of its own stage alone.

    Args:
        vis_dim: Width ``C`` of the features.
        embed_dim: Width ``D`` of queries, keys and values, a multiple of 4.
        query_grid: Rows and columns of the queries.
        num_heads: Attention heads, ``max(1, D // 128)`` when ``None``.
        has_cls: Whether the first visual token is a CLS token, to be dropped.
        eps: Of the LayerNorms.
    """

    def __init__(
        self,
        vis_dim: int,
        embed_dim: int,
        *,
        query_grid: Grid,
        num_heads: int | None = None,
        has_cls: bool,
        eps: float,
    ) -> None:
        super().__init__()
        embed_dim = check_width("lang_dim", embed_dim)
        if not isinstance(has_cls, bool):
            raise TypeError(f"has_cls must be a bool, got {has_cls!r}")
        self.vis_dim = vis_dim
        self.embed_dim = embed_dim
        self.query_grid = check_grid(query_grid)
        self.num_queries = math.prod(self.query_grid)
        default_heads = max(1, embed_dim // 128)
        self.num_heads = check_heads(embed_dim, default_heads if num_heads is None else num_heads)
        self.has_cls = has_cls

        table = sincos_position_table(embed_dim, self.query_grid)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.query = nn.Parameter(torch.empty(self.num_queries, embed_dim))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.kv_proj: nn.Module = nn.Linear(vis_dim, embed_dim)
        self.attn = nn.MultiheadAttention(embed_dim, self.num_heads)
        self.ln_q = nn.LayerNorm(embed_dim, eps=eps)
        self.ln_kv = nn.LayerNorm(embed_dim, eps=eps)

    def resample(
        self, features: Tensor, grid: Grid, return_attention: bool, **masks: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`Resampler.resample`, attention called whole where it cannot be taken apart."""
        if is_plain(self, _ATTENTION):
            return super().resample(features, grid, return_attention, **masks)
        values = self._normalised(features)
        queries, positions = self._queries_and_positions(grid)
        out, maps = self._call_attention(
            queries, values + positions, values, return_attention, **masks
        )
        return self.finish_projected(out), maps

    def project(self, features: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
        """As :meth:`Resampler.project`.

        On the kernels keys and values come from one product, and so do the keys' positions for all
        images.
        """
        queries, positions = self._queries_and_positions(grid)
        attn, width = self.attn, self.embed_dim
        weight, bias = attn.in_proj_weight, attn.in_proj_bias
        heads = (self.num_heads, -1)
        if ops.runs_triton(features) and is_plain(self, _NORMALISED):
            kv, q = linear_norm_linear(
                features,
                self.kv_proj,
                self.ln_kv,
                weight,
                bias,
                positions=positions,
                positioned=width,
                queries=queries,
                queried=width,
            )
            # [Q, H, d] and [B, L, 2, H, d]
            return q.unflatten(-1, heads), kv.unflatten(-1, (2, *heads)), None
        values = self._normalised(features)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        rows = queries, values + positions, values
        q, k, v = (
            F.linear(*parts).unflatten(-1, heads)
            for parts in zip(rows, weight.chunk(3), biases, strict=True)
        )
        return q, k, v

    def finish(self, attended: Tensor) -> Tensor:
        """As :meth:`Resampler.finish`."""
        return self.finish_projected(self.attn.out_proj(attended))

    def finish_projected(self, x: Tensor) -> Tensor:
        """Everything after the attention's own output projection."""
        return x

    def _queries_and_positions(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Queries ``[Q, D]`` and the keys' positions ``[L, D]``."""
        positions = self._resized(self.pos_embed, self.query_grid, grid)
        return self.ln_q(self.query) + self.pos_embed, positions

    def _normalised(self, features: Tensor) -> Tensor:
        """``LN_kv(x W_kvᵀ + b_kv)``, ``[B, L, D]``."""
        if is_plain(self, _NORMALISED):
            return linear_layer_norm(features, self.kv_proj, self.ln_kv)
        return self.ln_kv(self.kv_proj(features))

    def _call_attention(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        return_attention: bool,
        **masks: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The same by calling ``self.attn``, whatever has taken its place."""
        batch, length, _ = keys.shape
        check_masks(keys, (batch, self.num_heads, self.num_queries, length), **masks)
        if not batch:  # nn.MultiheadAttention takes one image at least: give it one, keep none
            keys, values = (F.pad(tokens, (0, 0, 0, 0, 0, 1)) for tokens in (keys, values))
            masks = dict.fromkeys(masks)
            out, maps = self._call_attention(queries, keys, values, return_attention, **masks)
            return out[:0], None if maps is None else maps[:0]
        mask = masks["attn_mask"]
        if mask is not None and mask.is_floating_point():
            masks["attn_mask"] = cast_mask(mask, keys.dtype)
        q = queries.expand(batch, -1, -1)  # [B, Q, D]
        batch_first = getattr(self.attn, "batch_first", False)
        tokens = [t if batch_first else t.transpose(0, 1) for t in (q, keys, values)]
        out = self.attn(*tokens, need_weights=False, **masks)[0]
        out = out if batch_first else out.transpose(0, 1)
        if not return_attention:
            return out, None
        if self.attn.training and getattr(self.attn, "dropout", None):
            raise InputError("attention maps need attn.dropout off: call eval() first")
        maps = self.attn(*tokens, average_attn_weights=False, **masks)[1]
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        # nn.MultiheadAttention gives NaN maps, and a sound output, where all keys are masked.
        sound = ~out.isnan().any(-1)[:, None, :, None]
        return out, maps.masked_fill(sound & maps.isnan(), 0.0)

    @torch.inference_mode(False)
    @torch.no_grad()
    def fold(
        self,
        *,
        dtype: torch.dtype | None = None,
        grid: Grid | None = None,
        triton: bool | None = None,
    ) -> FoldedPerceiver:
        """As :func:`visproj.fold`; there is one form, whatever ``triton`` says."""
        check_foldable(self, Resampler, {**_NORMALISED, **_QUERIES, **_ATTENTION, **self._reads()})
        linear: Any = self.kv_proj
        norm, attn = self.ln_kv, self.attn
        dtype = linear.weight.dtype if dtype is None else dtype
        grid = self.query_grid if grid is None else check_grid(grid)
        w_q, w_k, w_v = attn.in_proj_weight.chunk(3)
        b_q, b_k, b_v = or_zeros(attn.in_proj_bias, attn.in_proj_weight).chunk(3)
        kv = fold_linear_norm(
            linear.weight,
            linear.bias,
            norm.weight,
            norm.bias,
            norm.eps,
            torch.cat([w_k, w_v]),
            torch.cat([b_k, b_v]),
        )
        # The keys' part of the shift adds one number to every score of a query, and is left out.
        value_shift = kv.shift[self.embed_dim :]
        resized = resize_position_table(self.pos_embed, self.query_grid, grid)
        queries = copied_norm(self.ln_q, torch.float64)(self.query.double())
        projected = F.linear(queries + self.pos_embed.double(), w_q.double(), b_q.double())
        constants = {
            "queries": projected.unflatten(-1, (self.num_heads, -1)),
            "position_table": key_value_table(self.pos_embed, w_k, value_shift),
            "kv_table": key_value_table(resized, w_k, value_shift),
        }
        tail, tail_config = self._folded_tail(dtype)
        config = {
            "vis_dim": self.vis_dim,
            "lang_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "query_grid": list(self.query_grid),
            "grid": list(grid),
            "has_cls": self.has_cls,
            "floor": kv.floor,
            **tail_config,
            "digest": weights_digest(self),
        }
        scaled = ScaledLinear(copied(kv, dtype), shifted=False)
        constants = {name: own(constant, dtype) for name, constant in constants.items()}
        return FoldedPerceiver(config, scaled, constants, tail)

    def _reads(self) -> Reads:
        """The children after the attention that a fold reads."""
        return _OUTPUT

    def _folded_tail(self, dtype: torch.dtype) -> tuple[nn.Module, dict[str, float | None]]:
        """What follows the attention in the folded form, and what its configuration says of it."""
        return copied_linear(self.attn.out_proj, dtype), {"out_eps": None, "out_floor": None}


class PerceiverProjector(AttentionResampler):
    """Resample any number of visual tokens into a fixed number of language-model tokens.

    ``y = LN_kv(x W_kvᵀ + b_kv)``; queries ``LN_q(query) + pos``, keys ``y + pos_k``, values ``y``;
    multi-head attention; then ``LN`` and ``Linear``. Every LayerNorm has eps 1e-12. ``pos`` is a
    frozen 2-D sine-cosine table over the query grid, ``pos_k`` the same table resized bicubically
    to the grid of the features. The queries are normalised and projected once a call.

    State-dict keys: ``query [Q, D]``, ``pos_embed [Q, D]``, ``kv_proj.{weight [D, C], bias}``,
    ``attn.{in_proj_weight [3D, D], in_proj_bias, out_proj.weight, out_proj.bias}``,
    ``ln_q.*``, ``ln_kv.*``, ``projection.0.*`` (LayerNorm), ``projection.1.*`` (Linear). Fresh
    weights follow upstream's rule: truncated normal of deviation 0.02 for queries and Linears,
    zero biases, Xavier for ``in_proj_weight``, which that rule does not touch.

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
        """As :meth:`Resampler.finish`: ``out_proj``, LayerNorm and Linear as one operation."""
        if is_plain(self, _TAIL):
            norm: Any
            outer: Any
            norm, outer = self.projection
            return linear_norm_linear(attended, self.attn.out_proj, norm, outer.weight, outer.bias)
        return super().finish(attended)

    def finish_projected(self, x: Tensor) -> Tensor:
        """LayerNorm and Linear."""
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
        return ScaledLinear(copied(scaled, dtype)), {
            "out_eps": norm.eps,
            "out_floor": scaled.floor,
        }


def init_linear(module: nn.Module) -> None:
    """Upstream's rule, which passes over ``in_proj_weight`` because it is not an ``nn.Linear``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


VisProjection_perceiver = PerceiverProjector
