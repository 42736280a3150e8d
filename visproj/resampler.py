"""The forward that every resampler has: learned queries attend to the features of an image."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from visproj import ops
from visproj.checks import check_features
from visproj.positions import Grid, PositionedModule, grid_of


class Resampler(PositionedModule):
    """Turn any number of visual tokens into a fixed number of language-model tokens.

    A subclass gives the stages: :meth:`project` makes queries, keys and values, :meth:`finish`
    takes what attention gives to the output. Folded and unfolded resamplers differ in these alone.

    Attributes:
        vis_dim: Width ``C`` of the features.
        query_grid: Rows and columns of the queries; ``Q`` is their product.
        num_heads: Attention heads ``H``.
        has_cls: Whether the first visual token is a CLS token, to be dropped.
    """

    vis_dim: int
    query_grid: Grid
    num_heads: int
    has_cls: bool

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
            for an fp64 projector). A query whose keys are all masked gets zero attention. Where
            PyTorch's own Linear returns a view of its product, and with other than one leading
            dimension, the result is a view, of which FSDP2 warns: that is harmless unless the
            result is changed in place (write ``out = out + y``, not ``out += y``).

        Raises:
            TypeError: If ``x`` or a mask has an unsuitable dtype.
            ValueError: If the tokens fit no grid or ``grid`` does not fit them, or if a shape or
                device does not fit.
        """
        self.check(x, attn_mask)
        features = x[..., 1:, :] if self.has_cls else x
        *lead, length, width = features.shape
        batch = math.prod(lead)
        if isinstance(key_padding_mask, Tensor) and key_padding_mask.shape == (*lead, length):
            key_padding_mask = key_padding_mask.reshape(batch, length)
        out, maps = self.resample(
            features.reshape(batch, length, width),
            grid_of(length, grid),
            return_attention,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
        )
        if len(lead) != 1:
            out = out.reshape(*lead, *out.shape[1:])
            maps = None if maps is None else maps.reshape(*lead, *maps.shape[1:])
        return out if maps is None else (out, maps)

    def check(self, x: Tensor, attn_mask: Tensor | None) -> None:
        """Raise unless the features can be resampled."""
        check_features(x, self.vis_dim)

    def resample(
        self, features: Tensor, grid: Grid, return_attention: bool, **masks: Any
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, L, C] -> [B, Q, D]``, and the maps ``[B, H, Q, L]`` where they are wanted."""
        q, k, v = self.project(features, grid)
        attended = ops.cross_attention(q, k, v, **masks).flatten(-2)
        if not return_attention:
            return self.finish(attended), None
        keys = k if v is not None else k[:, :, 0]
        return self.finish(attended), ops.cross_attention_maps(q, keys, **masks)

    def project(self, features: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries ``[Q, H, d]``; keys and values ``[B, L, H, d]``, or packed ``[B, L, 2, H, d]``.

        Where they are packed, the third is ``None``.
        """
        raise NotImplementedError

    def finish(self, attended: Tensor) -> Tensor:
        """Everything after the attention: ``[B, Q, H * d] -> [B, Q, D]``."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What the children do not show."""
        return f"query_grid={self.query_grid}, num_heads={self.num_heads}, has_cls={self.has_cls}"
