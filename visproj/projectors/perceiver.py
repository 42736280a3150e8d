"""The Perceiver resampler: learned queries attend to the visual tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from visproj import ops
from visproj.errors import InputError
from visproj.ops.cross_attention import cast_mask, check_masks
from visproj.positions import Grid, PositionedModule, check_grid, grid_of, sincos_position_table
from visproj.projectors.config import check_features, check_heads, check_width, vision_width
from visproj.projectors.fusion import (
    is_plain,
    is_plain_attention,
    is_plain_norm,
    linear_layer_norm,
    linear_norm_linear,
    log_called,
)

_READS = {
    "kv_proj": nn.Linear,
    "ln_kv": nn.LayerNorm,
    "attn": nn.MultiheadAttention,
    "attn.out_proj": NonDynamicallyQuantizableLinear,
    "projection": nn.Sequential,
    "projection.0": nn.LayerNorm,
    "projection.1": nn.Linear,
}


class PerceiverProjector(PositionedModule):
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
        TypeError: If ``vis_config`` has no width.
        ValueError: If the heads do not divide ``D``, ``D`` is no multiple of 4, or a width or grid
            is not positive.

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
        super().__init__()
        check_width("lang_dim", lang_dim)
        self.vis_dim = vision_width(vis_config)
        self.embed_dim = lang_dim
        self.query_grid = check_grid(query_grid)
        self.num_queries = math.prod(self.query_grid)
        default_heads = max(1, lang_dim // 128)
        self.num_heads = check_heads(lang_dim, default_heads if num_heads is None else num_heads)
        self.has_cls = has_cls

        table = sincos_position_table(lang_dim, self.query_grid)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.query = nn.Parameter(torch.empty(self.num_queries, lang_dim))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.kv_proj = nn.Linear(self.vis_dim, lang_dim)
        self.attn = nn.MultiheadAttention(lang_dim, self.num_heads)
        self.ln_q = nn.LayerNorm(lang_dim, eps=1e-12)
        self.ln_kv = nn.LayerNorm(lang_dim, eps=1e-12)
        self.projection = nn.Sequential(
            nn.LayerNorm(lang_dim, eps=1e-12), nn.Linear(lang_dim, lang_dim)
        )
        self.apply(_init_weights)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        grid: Grid | None = None,
        return_attention: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Resample visual tokens.

        Args:
            x: ``[..., 1 + L, C]`` with CLS, ``[..., L, C]`` with ``has_cls=False``. ``B`` below is
                the product of the leading dimensions.
            attn_mask: ``[Q, L]`` or ``[B * heads, Q, L]`` with index ``b * heads + h``; bool, True
                = masked out, or floating, added to the scores.
            key_padding_mask: bool ``[..., L]``, True = padding.
            grid: Rows and columns that the ``L`` tokens lie on; a square when ``None``.
            return_attention: Also return the attention probabilities.

        Returns:
            ``[..., Q, D]``, and with ``return_attention`` also ``[..., heads, Q, L]`` in fp32 (fp64
            for an fp64 projector). A query whose keys are all masked gets zero attention.

        Raises:
            TypeError: If ``x`` or a mask has an unsuitable dtype.
            ValueError: If the tokens fit no grid or ``grid`` does not fit them, or if a shape or
                device does not fit.
        """
        check_features(x, self.vis_dim)
        log_called(self, _READS)
        features, key_padding_mask = flatten_batch(x, key_padding_mask, self.has_cls)
        grid = grid_of(features.shape[1], grid)

        queries = self.ln_q(self.query) + self.pos_embed  # [Q, D]
        positions = self._resized(self.pos_embed, self.query_grid, grid)  # [L, D]
        masks: dict[str, Any] = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        if ops.runs_triton(features) and self._is_plain():
            out, maps = self._resample_fused(
                features, queries, positions, return_attention, **masks
            )
            return unflatten_batch(out, maps, x.shape[:-2])

        values = linear_layer_norm(features, self.kv_proj, self.ln_kv)  # [B, L, D]
        keys = values + positions
        attend = (
            self._attend
            if is_plain_attention(self.attn, self.embed_dim)
            else self._attend_by_module
        )
        out, maps = attend(queries, keys, values, return_attention, **masks)
        return unflatten_batch(self.projection(out), maps, x.shape[:-2])

    def _is_plain(self) -> bool:
        """Whether every child may be read instead of called."""
        return (
            is_plain_norm(self.ln_kv, self.kv_proj)
            and is_plain_attention(self.attn, self.embed_dim)
            and is_plain(self.attn.out_proj, NonDynamicallyQuantizableLinear)
            and is_plain(self.projection, nn.Sequential)
            and len(self.projection) == 2
            and is_plain_norm(self.projection[0], self.attn.out_proj)
            and is_plain(self.projection[1], nn.Linear)
        )

    def _resample_fused(
        self,
        features: Tensor,
        queries: Tensor,
        positions: Tensor,
        return_attention: bool,
        **masks: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """All of it from the children's weights: ``[B, Q, D]``, maps ``[B, heads, Q, L]``.

        Keys and values come from one product, and so do the keys' positions for all images.
        """
        split = (self.embed_dim, 2 * self.embed_dim)
        w_q, w_kv = self.attn.in_proj_weight.split(split)
        b_q, b_kv = (
            (None, None) if self.attn.in_proj_bias is None else self.attn.in_proj_bias.split(split)
        )
        kv = linear_norm_linear(
            features,
            self.kv_proj,
            self.ln_kv,
            w_kv,
            b_kv,
            positions=positions,
            positioned=self.embed_dim,
        )
        q = F.linear(queries, w_q, b_q)
        q = q.unflatten(-1, (self.attn.num_heads, -1))  # [Q, H, d]
        kv = kv.unflatten(-1, (2, self.attn.num_heads, -1))  # [B, L, 2, H, d]
        out = ops.cross_attention(q, kv, **masks).flatten(-2)
        norm: Any
        linear: Any
        norm, linear = self.projection
        out = linear_norm_linear(out, self.attn.out_proj, norm, linear.weight, linear.bias)
        return out, ops.cross_attention_maps(q, kv[:, :, 0], **masks) if return_attention else None

    def _attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        return_attention: bool,
        **masks: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention with the weights of ``self.attn``: ``[B, Q, D]``, maps ``[B, heads, Q, L]``."""
        weights = self.attn.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.attn.in_proj_bias is None else self.attn.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(tokens, weight, bias).unflatten(-1, (self.attn.num_heads, -1))
            for tokens, weight, bias in zip((queries, keys, values), weights, biases, strict=True)
        )
        out = self.attn.out_proj(ops.cross_attention(q, k, v, **masks).flatten(-2))
        return out, ops.cross_attention_maps(q, k, **masks) if return_attention else None

    def _attend_by_module(
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

    def fold(self, **options: Any) -> nn.Module:
        """Same as :func:`visproj.fold`."""
        from visproj.folding import fold

        return fold(self, **options)

    def extra_repr(self) -> str:
        """What the children do not show."""
        return f"query_grid={self.query_grid}, num_heads={self.num_heads}, has_cls={self.has_cls}"


def flatten_batch(
    x: Tensor, key_padding_mask: Tensor | None, has_cls: bool
) -> tuple[Tensor, Tensor | None]:
    """``[..., (1+)L, C] -> [B, L, C]`` without CLS, and the mask ``[..., L] -> [B, L]`` alike."""
    features = x[..., 1:, :] if has_cls else x
    *lead, length, width = features.shape
    batch = math.prod(lead)
    if key_padding_mask is not None and key_padding_mask.shape == (*lead, length):
        key_padding_mask = key_padding_mask.reshape(batch, length)
    return features.reshape(batch, length, width), key_padding_mask


def unflatten_batch(
    out: Tensor, maps: Tensor | None, lead: torch.Size
) -> Tensor | tuple[Tensor, Tensor]:
    """Give the leading dimensions back to ``[B, Q, D]`` and, if there are any, to the maps."""
    out = out.reshape(*lead, *out.shape[1:])
    return out if maps is None else (out, maps.reshape(*lead, *maps.shape[1:]))


def _init_weights(module: nn.Module) -> None:
    """Upstream's rule, which passes over ``in_proj_weight`` because that is no ``nn.Linear``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


VisProjection_perceiver = PerceiverProjector
