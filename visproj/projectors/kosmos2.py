"""Kosmos-2's projection: latent queries attend to the features and to themselves."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visproj.calls import Kosmos2Calls
from visproj.checks import check_heads, check_width
from visproj.errors import InputError
from visproj.folding.algebra import or_zeros
from visproj.folding.key_values import Constants, KeyValues
from visproj.folding.modules import check_foldable, copied_linear
from visproj.folding.resamplers import FoldedKosmos2, FoldedResampler, folded_resampler
from visproj.fusion import Reads, why_touched
from visproj.packing import Positions

_LINEARS = ("k_proj", "v_proj", "q_proj", "out_proj")
_READS: Reads = {"dense": nn.Linear, **{f"x_attn.{name}": nn.Linear for name in _LINEARS}}


class Kosmos2Attention(nn.Module):
    """The projections of Kosmos-2's attention, which :class:`Kosmos2Projection` calls."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.dropout = 0.0
        for name in _LINEARS:
            setattr(self, name, nn.Linear(width, width))


class Kosmos2Projection(Kosmos2Calls):
    """Kosmos-2's and Kosmos-2.5's projection, ``[B, L, C] -> [B, Q, D]`` and its attention.

    ``y = x W_dᵀ + b_d``; multi-head attention with the queries ``latent_query`` over ``y`` followed
    by the queries themselves. State-dict keys: ``latent_query [Q, D]``, ``dense.*``,
    ``x_attn.{k_proj, v_proj, q_proj, out_proj}.*``.

    Args:
        vis_dim: Width ``C`` of the features.
        lang_dim: Width ``D`` of the language model.
        num_queries: Number ``Q`` of queries.
        num_heads: Attention heads.

    Source: transformers ``models/kosmos2/modeling_kosmos2.py``, ``Kosmos2ImageToTextProjection``.
    """

    def __init__(
        self, vis_dim: int, lang_dim: int, *, num_queries: int = 64, num_heads: int
    ) -> None:
        super().__init__()
        self.vis_dim = check_width("vis_dim", vis_dim)
        self.embed_dim = width = check_width("lang_dim", lang_dim)
        self.num_heads = check_heads(width, num_heads)
        self.query_grid = (1, num_queries)
        self.has_cls = False
        self.dense: nn.Module = nn.Linear(self.vis_dim, width)
        self.latent_query = nn.Parameter(torch.randn(num_queries, width))
        self.x_attn: nn.Module = Kosmos2Attention(width, self.num_heads)

    @property
    def gives_attention(self) -> bool:  # type: ignore[override]
        """See :attr:`Kosmos2Calls.gives_attention`; follows the model's current configuration."""
        return self._implementation() == "eager"

    def _implementation(self) -> str | None:
        config = getattr(self.x_attn, "config", None)
        return getattr(config, "_attn_implementation", None)

    def resample(
        self, features: Tensor, positions: Tensor | None, return_attention: bool, **masks: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Resampler.resample`; ``x_attn`` is called if it may not be split."""
        if any(mask is not None for mask in masks.values()):
            raise InputError("Kosmos-2's projection takes no masks: its queries are keys as well")
        if self.takes_apart():
            return super().resample(features, positions, return_attention, **masks)
        latent = self.latent_query.expand(features.shape[0], -1, -1)
        keys = torch.cat([self.dense(features), latent], 1)
        out, maps, *_ = self.x_attn(
            hidden_states=latent,
            encoder_hidden_states=keys,
            past_key_values=None,
            attention_mask=None,
        )
        return out, maps if return_attention else None

    def takes_apart(self) -> bool:
        """See :meth:`Resampler.takes_apart`."""
        return self._whole() is None

    def project(
        self, features: Tensor, positions: Positions | None, queries: int | None
    ) -> tuple[Tensor, ...]:
        """See :meth:`Resampler.project`."""
        attn: Any = self.x_attn
        rows = self.dense(features)
        return self._heads(attn.q_proj(self.latent_query), attn.k_proj(rows), attn.v_proj(rows))

    def appended(self) -> tuple[Tensor, ...]:
        """See :meth:`Resampler.appended`."""
        attn: Any = self.x_attn
        return self._heads(attn.k_proj(self.latent_query), attn.v_proj(self.latent_query))

    def finish(self, attended: Tensor) -> Tensor:
        """See :meth:`Resampler.finish`."""
        attn: Any = self.x_attn
        return attn.out_proj(attended)

    def _heads(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.unflatten(-1, (self.num_heads, -1)) for t in tokens)

    def _whole(self) -> str | None:
        """Return why ``x_attn`` does more than projections and a softmax, or ``None``."""
        if self.x_attn.training and self.x_attn.dropout:
            return "its dropout is active: call eval() before folding"
        # Before transformers 5 it has no is_causal, and all its implementations but eager attend
        # causally.
        causal = getattr(self.x_attn, "is_causal", self._implementation() not in (None, "eager"))
        return "its attention is causal" if causal else why_touched(self.x_attn)

    @torch.inference_mode(False)
    @torch.no_grad()
    def fold(
        self,
        *,
        dtype: torch.dtype | None = None,
        form: str | None = None,
    ) -> FoldedResampler:
        """See :func:`visproj.fold`; call it in eval mode, where dropout is off."""
        check_foldable(self, FoldedKosmos2, _READS)
        attn: Any = self.x_attn
        dense: Any = self.dense
        if reason := self._whole():
            raise InputError(f"cannot fold x_attn of Kosmos2Projection: {reason}")
        dtype = self.latent_query.dtype if dtype is None else dtype
        sides = [_in_double(linear) for linear in (attn.k_proj, attn.v_proj)]
        outer, outer_bias = (torch.cat(parts) for parts in zip(*sides, strict=True))
        inner, inner_bias = _in_double(dense)
        # The appended queries are keys without dense's bias, so that this bias does not cancel.
        bias = outer @ inner_bias + outer_bias
        parts = KeyValues(outer @ inner, bias, torch.zeros_like(bias))
        latent = self.latent_query.double()
        heads = (self.num_heads, -1)
        constants = Constants(
            F.linear(latent, *_in_double(attn.q_proj)).unflatten(-1, heads),
            outer,
            F.linear(latent, outer, outer_bias).unflatten(-1, (2, *heads)),
        )
        return folded_resampler(
            FoldedKosmos2,
            self,
            parts,
            constants,
            copied_linear(attn.out_proj, dtype),
            length=_USUAL_LENGTH,
            form=form,
            dtype=dtype,
            gives_attention=self.gives_attention,
        )


_USUAL_LENGTH = 257  # tokens of CLIP-L/14 at 224 pixels, CLS among them


def _in_double(linear: Any) -> tuple[Tensor, Tensor]:
    """Return weight and bias in fp64."""
    return linear.weight.double(), or_zeros(linear.bias, linear.weight).double()
