"""The forward of every resampler: learned queries attend to the features of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from visproj import ops
from visproj.checks import check_features
from visproj.errors import InputError
from visproj.packing import Packed, Positions, pack, place, whole
from visproj.positions import Grid, PositionedModule, grid_of

Resampled = Tensor | tuple[Tensor, Tensor | list[Tensor]]


class Resampler(PositionedModule):
    """A module that turns any number of visual tokens into a fixed number of tokens.

    A subclass implements the stages: :meth:`positions` returns the positions of the keys,
    :meth:`project` computes queries, keys and values, and :meth:`finish` computes the output from
    the result of the attention. Folded and unfolded resamplers differ only in these stages.

    Attributes:
        vis_dim: Width ``C`` of the features.
        query_grid: Rows and columns of the queries; ``Q`` is their product.
        num_heads: Attention heads ``H``.
        has_cls: Whether the first visual token is a CLS token, to be dropped.
        positioned: Whether keys have positions, so that tokens must lie on a grid.
    """

    vis_dim: int
    query_grid: Grid
    num_heads: int
    has_cls: bool
    positioned: ClassVar[bool] = True

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        attn_mask: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        grid: Grid | Sequence[Grid] | None = None,
        cu_seqlens: Tensor | None = None,
        return_attention: bool = False,
    ) -> Resampled:
        """Resample visual tokens.

        Args:
            x: ``[..., 1 + L, C]`` with CLS, ``[..., L, C]`` with ``has_cls=False``. ``B`` below is
                the product of the leading dimensions. Images of different sizes are given as a list
                of ``[L_i, C]``, or packed as ``[T, C]`` with ``cu_seqlens``; with CLS each image
                starts with its own.
            attn_mask: ``[Q, L]`` or ``[B * heads, Q, L]`` with index ``b * heads + h``; bool, True
                = masked out, or floating, added to the scores.
            key_padding_mask: bool ``[..., L]``, True = padding.
            grid: Rows and columns of the grid that the ``L`` tokens lie on; a square when ``None``.
                For images of different sizes, one grid per image.
            cu_seqlens: int32 ``[B + 1]``: the first row of each image in ``[T, C]``, then ``T``, as
                FlashAttention takes it. Its values are read: if it is on a GPU, the call waits for
                the device. While ``torch.compile`` traces, the lengths are those of the grids.
            return_attention: Also return the attention probabilities.

        Returns:
            ``[..., Q, D]``; with ``return_attention`` also ``[..., heads, Q, L]`` in fp32 (fp64 for
            an fp64 projector). For images of different sizes, ``[B, Q, D]`` and a list of
            ``[heads, Q, L_i]``. A query whose keys are all masked gets zero attention.

            The result is a view if PyTorch's own Linear computes it as one, and if ``x`` does not
            have exactly one leading dimension. FSDP2 warns about a view. That is harmless unless
            the result is changed in place: write ``out = out + y``, not ``out += y``.

        Raises:
            TypeError: If ``x``, ``cu_seqlens`` or a mask has an unsuitable dtype.
            ValueError: If the tokens fit no grid or ``grid`` does not fit them, if a shape or
                device does not fit, if ``cu_seqlens`` does not rise from 0 to ``T``, or if masks
                come with images of different sizes, which have no padding to mask.
        """
        if cu_seqlens is not None or isinstance(x, (list, tuple)):
            if attn_mask is not None or key_padding_mask is not None:
                raise InputError("images of different sizes take no masks: pass no padding tokens")
            several: Any = grid
            packed = pack(
                x,
                cu_seqlens,
                several,
                width=self.vis_dim,
                has_cls=self.has_cls,
                positioned=self.positioned,
            )
            self.check(packed.rows, None)
            out, several_maps = self.resample_packed(packed, return_attention)
            return out if several_maps is None else (out, several_maps)
        single: Any = x
        return self._resample_batch(single, attn_mask, key_padding_mask, grid, return_attention)

    def _resample_batch(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        grid: Any,
        return_attention: bool,
    ) -> Resampled:
        """Resample images of one size: flatten the leading dimensions, and restore them."""
        self.check(x, attn_mask)
        features = x[..., 1:, :] if self.has_cls else x
        *lead, length, width = features.shape
        batch = math.prod(lead)
        if isinstance(key_padding_mask, Tensor) and key_padding_mask.shape == (*lead, length):
            key_padding_mask = key_padding_mask.reshape(batch, length)
        positions = None
        if self.positioned:
            positions = self.positions(grid_of(length, grid))
        elif grid is not None or not length:
            grid_of(length, grid)
        out, maps = self.resample(
            features.reshape(batch, length, width),
            positions,
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
        self, features: Tensor, positions: Tensor | None, return_attention: bool, **masks: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Resample ``[B, L, C] -> [B, Q, D]``; with ``return_attention`` also ``[B, H, Q, L]``.

        ``positions`` are ``[L, ...]``, or ``[B, L, ...]`` if each image has its own.
        """
        q, *keys_values = self.with_latent(features, positions)
        attended = ops.cross_attention(q, *keys_values, **masks).flatten(-2)
        if not return_attention:
            return self.finish(attended), None
        keys = keys_values[0] if len(keys_values) == 2 else keys_values[0][:, :, 0]
        return self.finish(attended), ops.cross_attention_maps(q, keys, **masks)

    def resample_packed(
        self, packed: Packed, return_attention: bool, positions: Positions | None = None
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Resample ``[T, C] -> [B, Q, D]``; with ``return_attention`` also maps ``[H, Q, L_i]``.

        ``positions`` are those of all tokens, by default those of the grids.
        """
        if positions is None:
            positions = self.packed_positions(packed.grids)
        lengths = packed.lengths
        if not self.takes_apart():
            return self._one_by_one(packed, return_attention, positions)
        q, *given = self.project(packed.rows[None], positions, self.query_count(*lengths))
        keys_values = [t[0] for t in given]
        if latent := self.appended():
            keys_values = [
                torch.cat([part for image in packed.split(t) for part in (image, u)])
                for t, u in zip(keys_values, latent, strict=True)
            ]
            lengths = [length + len(latent[0]) for length in lengths]
        attended = ops.packed_cross_attention(q, *keys_values, lengths=lengths)
        out = self.finish(attended.flatten(-2))
        if not return_attention:
            return out, None
        keys = keys_values[0] if len(keys_values) == 2 else keys_values[0][:, 0]
        return out, [ops.cross_attention_maps(q, image[None])[0] for image in keys.split(lengths)]

    def _one_by_one(
        self, packed: Packed, return_attention: bool, positions: Positions | None
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Compute :meth:`resample_packed` with one :meth:`resample` per image."""
        self.query_count(*packed.lengths)  # raises if images have different numbers of queries
        images = packed.split(packed.rows)
        tables = [None] * len(images) if positions is None else packed.split(whole(positions))
        masks = {"attn_mask": None, "key_padding_mask": None}
        found = [
            self.resample(rows[None], table, return_attention, **masks)
            for rows, table in zip(images, tables, strict=True)
        ]
        maps = [maps[0] for _, maps in found if maps is not None]
        return torch.cat([out for out, _ in found]), maps if return_attention else None

    def with_latent(self, features: Tensor, positions: Tensor | None = None) -> tuple[Tensor, ...]:
        """Call :meth:`project` for a batch, and append the keys and values of :meth:`appended`."""
        batch, length, _ = features.shape
        if positions is None or positions.ndim == 2:
            q, *keys_values = self.project(features, positions, self.query_count(length))
        else:
            rows = features.reshape(1, batch * length, -1)
            q, *given = self.project(rows, positions.flatten(0, 1), self.query_count(length))
            keys_values = [t.unflatten(1, (batch, length))[0] for t in given]
        if latent := self.appended():
            pairs = zip(keys_values, latent, strict=True)
            keys_values = [torch.cat([t, u.expand(batch, *u.shape)], 1) for t, u in pairs]
        return q, *keys_values

    def packed_positions(self, grids: Sequence[Grid]) -> Positions | None:
        """Return the positions of the keys of several images, one row per token or placed."""
        if not self.positioned:
            return None
        made = {grid: self.positions(grid) for grid in dict.fromkeys(grids)}
        if self.takes_placed():
            return place(made, grids)
        return torch.cat([made[grid] for grid in grids])

    def positions(self, grid: Grid) -> Tensor:
        """Return what is added to the keys of a grid, one row per token."""
        raise NotImplementedError

    def project(
        self, features: Tensor, positions: Positions | None, queries: int | None
    ) -> tuple[Tensor, ...]:
        """Compute queries ``[Q, H, d]``, and keys and values ``[B, L, H, d]``.

        Keys and values may also be one tensor ``[B, L, 2, H, d]``. ``queries`` is the number of
        queries to return; ``None`` means all.
        """
        raise NotImplementedError

    def takes_placed(self) -> bool:
        """Return whether :meth:`project` takes the positions of several images placed."""
        return False

    def takes_apart(self) -> bool:
        """Return whether :meth:`resample` runs :meth:`project`, attention and :meth:`finish`."""
        return True

    def query_count(self, *lengths: int) -> int | None:
        """Return the number of queries for images of these lengths; ``None`` means all."""
        return None

    def appended(self) -> tuple[Tensor, ...] | None:
        """Return keys and values to append, shaped as by :meth:`project` but without the batch."""
        return None

    def finish(self, attended: Tensor) -> Tensor:
        """Compute everything after the attention: ``[B, Q, H * d] -> [B, Q, D]``."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return the settings that the children do not show."""
        return f"query_grid={self.query_grid}, num_heads={self.num_heads}, has_cls={self.has_cls}"
