"""Aria's projector: the number of visual tokens decides the number of queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from visproj.calls import AriaCalls
from visproj.checks import check_heads, check_width
from visproj.errors import InputError
from visproj.folding.algebra import fold_linear_norm, or_zeros
from visproj.folding.key_values import Constants, KeyValues
from visproj.folding.modules import (
    ScaledLinear,
    check_foldable,
    copied,
    copied_linear,
    copied_norm,
)
from visproj.folding.resamplers import FoldedAria, FoldedResampler, folded_resampler
from visproj.fusion import Reads, why_touched
from visproj.packing import Positions
from visproj.projectors.attention import MultiheadResampler

_LINEARS = ("q_proj", "k_proj", "v_proj", "linear")
_NORMS = ("layer_norm", "layer_norm_kv")
_READS: Reads = {
    **{f"cross_attn.{name}": nn.Linear for name in _LINEARS},
    **{f"cross_attn.{name}": nn.LayerNorm for name in _NORMS},
    "cross_attn.multihead_attn": nn.MultiheadAttention,
    "cross_attn.multihead_attn.out_proj": NonDynamicallyQuantizableLinear,
    "layer_norm": nn.LayerNorm,
    "feed_forward.linear_in": nn.Linear,
    "feed_forward.linear_out": nn.Linear,
}


class AriaCrossAttention(nn.Module):
    """The layers of Aria's cross-attention, which :class:`AriaProjector` calls one by one."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.multihead_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.0)
        self.layer_norm = nn.LayerNorm(width)
        self.layer_norm_kv = nn.LayerNorm(width)


class AriaMLP(nn.Module):
    """Aria's MLP: ``gelu(x W_inᵀ) W_outᵀ`` with the tanh approximation of GELU."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(width, hidden, bias=False)
        self.linear_out = nn.Linear(hidden, out, bias=False)
        self.act = nn.GELU("tanh")

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP: ``[..., C] -> [..., D]``."""
        return self.linear_out(self.act(self.linear_in(x)))


class AriaProjector(MultiheadResampler, AriaCalls):
    """Aria's projector, ``[B, L, C] -> [B, Q, D]``, where ``L`` decides ``Q``.

    ``y = LN_kv(x)``; queries ``LN(query) W_qᵀ``, keys ``y W_kᵀ``, values ``y W_vᵀ``; multi-head
    attention; a Linear, a LayerNorm, and ``gelu(z W_inᵀ) W_outᵀ``. State-dict keys: ``query``,
    ``cross_attn.{q_proj, k_proj, v_proj}.weight``, ``cross_attn.multihead_attn.*``,
    ``cross_attn.{linear, layer_norm, layer_norm_kv}.*``, ``layer_norm.*``,
    ``feed_forward.{linear_in, linear_out}.weight``.

    Args:
        vis_dim: Width ``C`` of the features, the queries and the attention.
        lang_dim: Width ``D`` of the language model.
        patch_to_query_dict: The number of queries for each number of tokens.
        num_heads: Attention heads.
        num_queries: Rows of ``query``; the largest number in ``patch_to_query_dict`` when ``None``.
        hidden: Width inside the MLP, ``D`` when ``None``.

    Source: transformers ``models/aria/modeling_aria.py``, ``AriaProjector``.
    """

    attention: ClassVar[str] = "cross_attn.multihead_attn"

    def __init__(
        self,
        vis_dim: int,
        lang_dim: int,
        *,
        patch_to_query_dict: Mapping[int, int],
        num_heads: int,
        num_queries: int | None = None,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        width, lang_dim = check_width("vis_dim", vis_dim), check_width("lang_dim", lang_dim)
        self.vis_dim = self.embed_dim = width
        self.num_heads = check_heads(width, num_heads)
        self.has_cls = False
        self.patch_to_query_dict = dict(patch_to_query_dict)
        rows = max(self.patch_to_query_dict.values()) if num_queries is None else num_queries
        self.query_grid = (1, rows)
        self.query = nn.Parameter(torch.zeros(rows, width))
        self.cross_attn: nn.Module = AriaCrossAttention(width, self.num_heads)
        self.layer_norm = nn.LayerNorm(width)
        self.feed_forward: nn.Module = AriaMLP(width, hidden or lang_dim, lang_dim)

    def resample(
        self, features: Tensor, positions: Tensor | None, return_attention: bool, **masks: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Resampler.resample`; ``cross_attn`` is called if it was changed."""
        if why_touched(self.cross_attn) is None:
            return super().resample(features, positions, return_attention, **masks)
        if return_attention:
            raise InputError("attention maps need cross_attn without hooks: remove them first")
        batch, length, _ = features.shape
        queries = self.query[: self.query_count(length)].expand(batch, -1, -1)
        mask = masks["key_padding_mask"]
        if mask is not None:
            mask = mask.repeat_interleave(self.num_heads, 0)[:, None]
            mask = mask.expand(-1, queries.shape[1], -1)
        attended = self.cross_attn(features, queries, attn_mask=mask)
        return self.feed_forward(self.layer_norm(attended)), None

    def takes_apart(self) -> bool:
        """See :meth:`Resampler.takes_apart`."""
        return why_touched(self.cross_attn) is None and super().takes_apart()

    def tokens(
        self, features: Tensor, positions: Positions | None, queries: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`MultiheadResampler.tokens`."""
        cross: Any = self.cross_attn
        latents = cross.q_proj(cross.layer_norm(self.query[:queries]))
        states = cross.layer_norm_kv(features)
        return latents, cross.k_proj(states), cross.v_proj(states)

    def finish_projected(self, x: Tensor) -> Tensor:
        """Apply Linear, LayerNorm and MLP."""
        cross: Any = self.cross_attn
        return self.feed_forward(self.layer_norm(cross.dropout(cross.linear(x))))

    @torch.inference_mode(False)
    @torch.no_grad()
    def fold(
        self,
        *,
        dtype: torch.dtype | None = None,
        form: str | None = None,
    ) -> FoldedResampler:
        """See :func:`visproj.fold`."""
        check_foldable(self, FoldedAria, _READS)
        cross: Any = self.cross_attn
        mlp: Any = self.feed_forward
        self._check_whole(cross, mlp)
        dtype = self.query.dtype if dtype is None else dtype
        attn, norm, width = cross.multihead_attn, cross.layer_norm_kv, self.vis_dim
        weight, bias = attn.in_proj_weight, or_zeros(attn.in_proj_bias, attn.in_proj_weight)
        w_q, w_k, w_v = (t.double() for t in weight.chunk(3))
        b_q, _, b_v = (t.double() for t in bias.chunk(3))
        outer = torch.cat([w_k @ cross.k_proj.weight.double(), w_v @ cross.v_proj.weight.double()])
        shift = outer @ or_zeros(norm.bias, norm.weight).double()
        shift[width:] += b_v
        shift[:width] = 0  # one number for every score of a query, which the softmax cancels
        gained = outer * norm.weight.double()
        parts = KeyValues(gained, torch.zeros_like(shift), shift, eps=norm.eps)
        latents = copied_norm(cross.layer_norm, torch.float64)(self.query.double())
        queries = F.linear(latents @ cross.q_proj.weight.double().T, w_q, b_q)
        constants = Constants(queries.unflatten(-1, (self.num_heads, -1)), w_k)
        inner = cross.linear.weight.double() @ attn.out_proj.weight.double()
        out_bias = or_zeros(attn.out_proj.bias, attn.out_proj.weight).double()
        inner_bias = F.linear(out_bias, cross.linear.weight.double())
        inner_bias = inner_bias + or_zeros(cross.linear.bias, cross.linear.weight).double()
        last = self.layer_norm
        scaled = fold_linear_norm(
            inner,
            inner_bias,
            last.weight,
            last.bias,
            last.eps,
            mlp.linear_in.weight,
            mlp.linear_in.bias,
        )
        tail = nn.Sequential(
            ScaledLinear(copied(scaled, dtype)),
            nn.GELU("tanh"),
            copied_linear(mlp.linear_out, dtype),
        )
        return folded_resampler(
            FoldedAria,
            self,
            parts,
            constants,
            tail,
            length=max(self.patch_to_query_dict),
            form=form,
            dtype=dtype,
            hidden=mlp.linear_in.out_features,
            out_dim=mlp.linear_out.out_features,
            query_counts=[list(pair) for pair in self.patch_to_query_dict.items()],
            out_floor=scaled.floor,
        )

    def _check_whole(self, cross: Any, mlp: Any) -> None:
        """Raise unless ``cross_attn`` and ``feed_forward`` compute what they compute in Aria."""
        probe = torch.linspace(-4, 4, 33)
        # Two ways to write this approximation differ by roundings, other forms by 1e-4 and more.
        if not torch.allclose(mlp.act(probe), F.gelu(probe, approximate="tanh"), atol=1e-5):
            raise InputError("cannot fold feed_forward of AriaProjector: act is not gelu_new")
        for name, child in (("cross_attn", cross), ("feed_forward", mlp)):
            if reason := why_touched(child):
                raise InputError(f"cannot fold {name} of AriaProjector: {reason}")
        if cross.dropout.training and cross.dropout.p:
            raise InputError("cannot fold cross_attn of AriaProjector: its dropout is active")
