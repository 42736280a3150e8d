"""Resamplers with an ``nn.MultiheadAttention``, and their folding."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from visproj import ops
from visproj.checks import check_heads, check_width
from visproj.errors import InputError
from visproj.folding.algebra import fold_linear_norm, or_zeros
from visproj.folding.key_values import Constants, KeyValues
from visproj.folding.modules import check_foldable, copied_linear, copied_norm
from visproj.folding.resamplers import FoldedPerceiver, FoldedResampler, folded_resampler
from visproj.fusion import Reads, is_plain, linear_layer_norm, linear_norm_linear
from visproj.ops.cross_attention import cast_mask, check_masks
from visproj.packing import Placed, Positions, whole
from visproj.positions import (
    Grid,
    check_grid,
    position_axes,
    resize_position_table,
    sincos_position_table,
)
from visproj.resampler import Resampler

_ATTENTION: Reads = {"attn": nn.MultiheadAttention}
OUTPUT: Reads = {"attn.out_proj": NonDynamicallyQuantizableLinear}
_NORM: Reads = {"ln_kv": nn.LayerNorm}
_NORMALISED: Reads = {"kv_proj": nn.Linear, **_NORM}
_QUERIES: Reads = {"ln_q": nn.LayerNorm}


class MultiheadResampler(Resampler):
    """A resampler that reads the parameters of its ``nn.MultiheadAttention``, if that is plain.

    A subclass implements :meth:`tokens`, which computes the inputs of the attention, and
    :meth:`finish_projected`.

    Attributes:
        attention: Name of the attention module.
    """

    attention: ClassVar[str] = "attn"

    def tokens(
        self, features: Tensor, positions: Positions | None, queries: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the inputs of the attention: queries ``[Q, D]``, keys, values ``[B, L, D]``."""
        raise NotImplementedError

    def finish_projected(self, x: Tensor) -> Tensor:
        """Compute everything after the attention's own output projection."""
        return x

    def takes_apart(self) -> bool:
        """See :meth:`Resampler.takes_apart`; true if the attention's parameters may be read."""
        return is_plain(self, {self.attention: nn.MultiheadAttention})

    def _attention(self) -> Any:
        return self.get_submodule(self.attention)

    def resample(
        self, features: Tensor, positions: Tensor | None, return_attention: bool, **masks: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Resampler.resample`; the attention is called if it may not be split."""
        if self.takes_apart():
            return super().resample(features, positions, return_attention, **masks)
        if positions is not None:
            positions = positions.view(-1, features.shape[1], positions.shape[-1])
        tokens = self.tokens(features, positions, self.query_count(features.shape[1]))
        out, maps = call_attention(
            self._attention(), *tokens, self.num_heads, return_attention, **masks
        )
        return self.finish_projected(out), maps

    def project(
        self, features: Tensor, positions: Positions | None, queries: int | None
    ) -> tuple[Tensor, ...]:
        """See :meth:`Resampler.project`."""
        attn = self._attention()
        bias = attn.in_proj_bias
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        rows = zip(
            self.tokens(features, positions, queries),
            attn.in_proj_weight.chunk(3),
            biases,
            strict=True,
        )
        return tuple(F.linear(*parts).unflatten(-1, (self.num_heads, -1)) for parts in rows)

    def finish(self, attended: Tensor) -> Tensor:
        """See :meth:`Resampler.finish`."""
        return self.finish_projected(self._attention().out_proj(attended))


class AttentionResampler(MultiheadResampler):
    """A resampler with learned queries and ``nn.MultiheadAttention`` over normalised features.

    ``y = LN_kv(x W_kvᵀ + b_kv)``; queries ``LN_q(query) + pos``, keys ``y + pos_k``, values ``y``;
    multi-head attention. ``pos`` is a frozen 2-D sine-cosine table over the query grid, ``pos_k``
    the same table resized bicubically to the grid of the features. The queries are normalised and
    projected once per call. A child that does more than apply its weights (LoRA, hooks) is called
    instead of being fused; only its own stage becomes slower. If ``kv_proj`` is an ``nn.Identity``,
    the features are normalised directly.

    Args:
        vis_dim: Width ``C`` of the features.
        embed_dim: Width ``D`` of queries, keys and values, a multiple of 4.
        query_grid: Rows and columns of the queries.
        num_heads: Attention heads, ``max(1, D // 128)`` when ``None``.
        has_cls: Whether the first visual token is a CLS token, to be dropped.
        eps: Eps of the LayerNorms.
        table: Whether there is a table ``pos_embed`` over the query grid.
    """

    folded: ClassVar[type[FoldedResampler]] = FoldedPerceiver
    pos_embed: Tensor

    def __init__(
        self,
        vis_dim: int,
        embed_dim: int,
        *,
        query_grid: Grid,
        num_heads: int | None = None,
        has_cls: bool,
        eps: float,
        table: bool = True,
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

        if table:
            positions = sincos_position_table(embed_dim, self.query_grid)
            self.register_parameter("pos_embed", nn.Parameter(positions, requires_grad=False))
        self.query = nn.Parameter(torch.empty(self.num_queries, embed_dim))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.kv_proj: nn.Module = nn.Linear(vis_dim, embed_dim)
        self.attn = nn.MultiheadAttention(embed_dim, self.num_heads)
        self.ln_q = nn.LayerNorm(embed_dim, eps=eps)
        self.ln_kv = nn.LayerNorm(embed_dim, eps=eps)

    def positions(self, grid: Grid) -> Tensor:
        """See :meth:`Resampler.positions`."""
        return self._resized(self.pos_embed, self.query_grid, grid)

    def takes_placed(self) -> bool:
        """See :meth:`Resampler.takes_placed`; true on the kernels for separable positions."""
        return ops.runs_triton(self.query) and self._is_separable()

    def _is_separable(self) -> bool:
        """Return whether the keys' positions are known to be separable for every grid."""
        return self._positions.is_separable(self.pos_embed, self.query_grid)

    def latents(self) -> Tensor:
        """Compute the queries ``[Q, D]`` as inputs of the attention."""
        return self.ln_q(self.query) + self.pos_embed

    def project(
        self, features: Tensor, positions: Positions | None, queries: int | None
    ) -> tuple[Tensor, ...]:
        """See :meth:`Resampler.project`.

        On the kernels one matmul computes keys and values, and the positions of the keys are
        projected once for all images.
        """
        if ops.runs_triton(features) and is_plain(self, _NORMALISED):
            vectors, places = positions if isinstance(positions, Placed) else (positions, None)
            kv, q = linear_norm_linear(
                features,
                self.kv_proj,
                self.ln_kv,
                self.attn.in_proj_weight,
                self.attn.in_proj_bias,
                positions=vectors,
                places=places,
                positioned=self.embed_dim,
                queries=self.latents(),
                queried=self.embed_dim,
            )
            heads = (self.num_heads, -1)  # [Q, H, d] and [B, L, 2, H, d]
            return q.unflatten(-1, heads), kv.unflatten(-1, (2, *heads))
        return super().project(features, positions, queries)

    def tokens(
        self, features: Tensor, positions: Positions | None, queries: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`MultiheadResampler.tokens`."""
        values = self._normalised(features)
        return self.latents(), values if positions is None else values + whole(positions), values

    def _normalised(self, features: Tensor) -> Tensor:
        """Compute ``LN_kv(x W_kvᵀ + b_kv)``, ``[B, L, D]``."""
        if is_plain(self, _NORMALISED):
            return linear_layer_norm(features, self.kv_proj, self.ln_kv)
        return self.ln_kv(self.kv_proj(features))

    @torch.inference_mode(False)
    @torch.no_grad()
    def fold(
        self,
        *,
        dtype: torch.dtype | None = None,
        grid: Grid | None = None,
        form: str | None = None,
    ) -> FoldedResampler:
        """See :func:`visproj.fold`."""
        bare = isinstance(self.kv_proj, nn.Identity)
        normalised: Reads = {"kv_proj": nn.Identity, **_NORM} if bare else _NORMALISED
        reads = {**normalised, **_QUERIES, **_ATTENTION, **self._reads()}
        check_foldable(self, self.folded, reads)
        dtype = self.query.dtype if dtype is None else dtype
        parts, constants = self._parts()
        tail, described = self._folded_tail(dtype)
        sides = self._usual_grid() if grid is None else check_grid(grid)
        return folded_resampler(
            self.folded,
            self,
            parts,
            constants,
            tail,
            length=math.prod(sides),
            form=form,
            dtype=dtype,
            tables=lambda weight: self._tables(weight, sides),
            grid=list(sides),
            **self._described(),
            **described,
        )

    def _parts(self) -> tuple[KeyValues, Constants]:
        """Return the folded weights of keys and values, and the other constants, in fp64."""
        linear: Any = self.kv_proj
        norm, attn = self.ln_kv, self.attn
        weight, bias = attn.in_proj_weight, or_zeros(attn.in_proj_bias, attn.in_proj_weight)
        (w_q, w_kv), (b_q, b_kv) = (
            t.double().tensor_split([self.embed_dim]) for t in (weight, bias)
        )
        inner = norm.weight, norm.bias, norm.eps
        if isinstance(linear, nn.Linear):
            kv = fold_linear_norm(linear.weight, linear.bias, *inner, w_kv, b_kv)
            parts = KeyValues(kv.weight, kv.bias, kv.shift, (kv.factor, kv.factor_bias, kv.floor))
        else:
            shift = w_kv @ or_zeros(norm.bias, norm.weight).double() + b_kv
            parts = KeyValues(
                w_kv * norm.weight.double(), torch.zeros_like(shift), shift, None, norm.eps
            )
        # The keys' part of the shift adds one number to every score of a query, which cancels in
        # the softmax.
        parts.shift[: self.embed_dim] = 0
        queries = F.linear(self._latents_in_double(), w_q, b_q)
        heads = (self.num_heads, -1)
        return parts, Constants(queries.unflatten(-1, heads), w_kv[: self.embed_dim])

    def _latents_in_double(self) -> Tensor:
        """Compute :meth:`latents` in fp64."""
        return copied_norm(self.ln_q, torch.float64)(self.query.double()) + self.pos_embed.double()

    def _usual_grid(self) -> Grid:
        """Return the grid that a fold prepares for by default."""
        return self.query_grid

    def _tables(self, weight: Tensor, grid: Grid) -> dict[str, Tensor]:
        """Return the position tables that the folded form stores, multiplied by ``weight``."""
        resized = resize_position_table(self.pos_embed, self.query_grid, grid)
        ready = {"kv_table": resized.double() @ weight.T}
        axes = position_axes(self.pos_embed, self.query_grid)
        if axes is None:
            return {**ready, "position_table": self.pos_embed.double() @ weight.T}
        return {**ready, **projected_axes(weight, *axes)}

    def _described(self) -> dict[str, Any]:
        """Return further entries of the folded configuration."""
        return {"separable": position_axes(self.pos_embed, self.query_grid) is not None}

    def _reads(self) -> Reads:
        """Return the children after the attention that a fold reads."""
        return OUTPUT

    def _folded_tail(self, dtype: torch.dtype) -> tuple[nn.Module, dict[str, float | None]]:
        """Return the folded module after the attention, and its entries in the configuration."""
        return copied_linear(self.attn.out_proj, dtype), {"out_floor": None}


def projected_axes(weight: Tensor, rows: Tensor, columns: Tensor) -> dict[str, Tensor]:
    """Project the vectors per row and per column of a separable table; columns come first in it."""
    half = columns.shape[-1]
    return {
        "rows": F.linear(rows.to(weight), weight[:, half:]),
        "columns": F.linear(columns.to(weight), weight[:, :half]),
    }


def call_attention(
    attn: nn.Module,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
    return_attention: bool,
    **masks: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend from shared queries ``[Q, D]`` to ``[B, L, D]`` by calling ``attn``."""
    batch, length, _ = keys.shape
    check_masks(keys, (batch, heads, len(queries), length), **masks)
    if not batch:  # nn.MultiheadAttention needs at least one image: add one and drop its result
        keys, values = (F.pad(tokens, (0, 0, 0, 0, 0, 1)) for tokens in (keys, values))
        masks = dict.fromkeys(masks)
        out, maps = call_attention(attn, queries, keys, values, heads, return_attention, **masks)
        return out[:0], None if maps is None else maps[:0]
    mask = masks["attn_mask"]
    if mask is not None and mask.is_floating_point():
        masks["attn_mask"] = cast_mask(mask, keys.dtype)
    q = queries.expand(batch, -1, -1)  # [B, Q, D]
    batch_first = getattr(attn, "batch_first", False)
    tokens = [t if batch_first else t.transpose(0, 1) for t in (q, keys, values)]
    out = attn(*tokens, need_weights=False, **masks)[0]
    out = out if batch_first else out.transpose(0, 1)
    if not return_attention:
        return out, None
    if attn.training and getattr(attn, "dropout", None):
        raise InputError("attention maps need attn.dropout off: call eval() first")
    maps = attn(*tokens, average_attn_weights=False, **masks)[1]
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    # For a fully masked query nn.MultiheadAttention returns NaN maps, but an output without NaN.
    sound = ~out.isnan().any(-1)[:, None, :, None]
    return out, maps.masked_fill(sound & maps.isnan(), 0.0)


def init_linear(module: nn.Module) -> None:
    """Initialise an ``nn.Linear`` by upstream's rule; ``in_proj_weight`` is not part of one."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
