"""The call signatures of other models' resamplers, the same before and after folding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from visproj.errors import InputError
from visproj.packing import Packed, Placed, read_grids
from visproj.positions import Grid
from visproj.resampler import Resampled, Resampler


class MiniCPMCalls(Resampler):
    """The call signature of MiniCPM-V 2.5 and later: padded images and the grid of each.

    A subclass also implements :meth:`positions_at` and :meth:`temporal_positions`.
    """

    def forward(  # type: ignore[override]
        self,
        x: Tensor | Sequence[Tensor],
        tgt_sizes: Tensor | Sequence[Grid] | None = None,
        temporal_ids: Sequence[Sequence[int]] | None = None,
        **options: Any,
    ) -> Resampled:
        """Resample padded images, or any input that :meth:`Resampler.forward` accepts.

        Args:
            x: ``[B, L, C]``, each image padded to ``L`` tokens.
            tgt_sizes: ``[B, 2]``, rows and columns of each image, as a tensor or a sequence. A
                tensor on a GPU is read once per call. While ``torch.compile`` traces or a CUDA
                graph is recorded it is not read, and a grid that is larger than the position table
                gives NaN.
            temporal_ids: For video, one list per clip with the time of each of its frames, ``-1``
                for a frame without a time. The frames are the images of ``x``, clip by clip. All
                frames of a clip share one set of queries.
            **options: Keyword arguments of :meth:`Resampler.forward`, which is called if
                ``tgt_sizes`` is ``None``. Otherwise only ``return_attention``.

        Returns:
            ``[B, Q, D]``; one entry per clip instead of per image if ``temporal_ids`` hold times.
            With ``return_attention`` also a list of ``[heads, Q, L_i]``.

        Raises:
            TypeError: As :meth:`Resampler.forward`.
            ValueError: As :meth:`Resampler.forward`, and if a grid is not positive or has more
                cells than there are tokens, or ``temporal_ids`` do not have one time per image.
        """
        if tgt_sizes is None:
            if temporal_ids is not None:
                raise InputError("temporal_ids need tgt_sizes")
            return super().forward(x, **options)
        maps = options.pop("return_attention", False)
        if options or not isinstance(x, Tensor) or x.ndim != 3:
            shape = list(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise InputError(
                "with tgt_sizes the features must be one tensor [B, L, C] and return_attention is "
                f"the only other option; got {shape} and the options {[*options]}"
            )
        self.check(x, None)
        if isinstance(tgt_sizes, Tensor) and _is_recorded(tgt_sizes) and not temporal_ids:
            return self._unread(x, tgt_sizes, maps)
        grids = read_grids(tgt_sizes, x.shape[0], x.shape[1])
        clips = self._clips(temporal_ids, len(grids))
        grids = grids or [(1, x.shape[1])]  # for an empty batch
        uniform = len(set(grids)) == 1 and math.prod(grids[0]) == x.shape[1]
        if uniform and clips is None:
            out, found = self.resample(
                x, self.positions(grids[0]), maps, attn_mask=None, key_padding_mask=None
            )
            return out if found is None else (out, list(found))
        return self._without_padding(x, grids, clips, maps)

    def _without_padding(
        self, x: Tensor, grids: list[Grid], clips: list[list[int]] | None, return_attention: bool
    ) -> Resampled:
        """Resample images of different sizes, or clips, packed without their padding."""
        lengths = [math.prod(grid) for grid in grids]
        rows = torch.cat([image[:length] for image, length in zip(x, lengths, strict=True)])
        positions: Any = self.packed_positions(grids)
        if clips is not None:
            times = self.temporal_positions([time for clip in clips for time in clip])
            repeats = torch.tensor(lengths, device=x.device)
            frames = torch.arange(len(times), device=x.device)
            frames = frames.repeat_interleave(repeats, output_size=len(rows))
            if isinstance(positions, Placed):
                positions = positions.plus(times, frames)
            else:
                positions = positions + times[frames]
            starts = [0, *accumulate(map(len, clips))]
            lengths = [sum(lengths[a:b]) for a, b in pairwise(starts)]
        packed = Packed(rows, lengths, grids)
        out, maps = self.resample_packed(packed, return_attention, positions)
        return out if maps is None else (out, maps)

    def _unread(self, x: Tensor, sizes: Tensor, return_attention: bool) -> Resampled:
        """Resample without reading the sizes: padding tokens get a position and are masked."""
        length = x.shape[1]
        rows, columns = sizes.to(x.device, torch.int64).unbind(1)
        index = torch.arange(length, device=x.device)
        padding = index >= (rows * columns)[:, None]
        down = (index // columns[:, None]).masked_fill(padding, 0)
        across = (index % columns[:, None]).masked_fill(padding, 0)
        positions = self.positions_at(down.flatten(), across.flatten()).unflatten(0, padding.shape)
        out, maps = self.resample(
            x, positions, return_attention, attn_mask=None, key_padding_mask=padding
        )
        return out if maps is None else (out, list(maps))

    def _clips(self, temporal_ids: Any, images: int) -> list[list[int]] | None:
        """Return the times of each clip, or ``None`` if no frame has one."""
        if temporal_ids is None:
            return None
        clips = [[int(time) for time in clip] for clip in temporal_ids]
        if sum(map(len, clips)) != images or not all(clips):
            raise InputError(
                f"temporal_ids hold {[len(clip) for clip in clips]} frames for {images} images"
            )
        return clips if max(map(max, clips)) > -1 else None

    def positions_at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the positions of the cells at ``rows [N]`` and ``columns [N]``, one row each.

        A cell outside the position table gets NaN.
        """
        raise NotImplementedError

    def temporal_positions(self, times: Sequence[int]) -> Tensor:
        """Return what each time adds to the positions of a frame's keys; zeros for ``-1``."""
        raise NotImplementedError


def _is_recorded(tensor: Tensor) -> bool:
    """Return whether a tensor must not be read, because a graph is being traced or captured."""
    recording = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    return recording or torch.compiler.is_compiling()


class MiniCPM2Calls(Resampler):
    """The call signature of MiniCPM-V 1.0 and 2.0, whose second argument is the images' grid."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor | Sequence[Tensor],
        tgt_size: Grid | None = None,
        attn_mask: Tensor | None = None,
        **options: Any,
    ) -> Resampled:
        """Call :meth:`Resampler.forward` with ``grid=tgt_size``."""
        if tgt_size is not None:
            options["grid"] = int(tgt_size[0]), int(tgt_size[1])
        return super().forward(x, attn_mask, **options)


class AriaCalls(Resampler):
    """The call signature of Aria, where the number of tokens decides the number of queries.

    Attributes:
        patch_to_query_dict: The number of queries for each number of tokens.
    """

    positioned = False
    patch_to_query_dict: dict[int, int]

    def forward(  # type: ignore[override]
        self,
        key_value_states: Tensor | Sequence[Tensor],
        attn_mask: Tensor | None = None,
        **options: Any,
    ) -> Resampled:
        """Call :meth:`Resampler.forward` with ``key_padding_mask=attn_mask``.

        Args:
            key_value_states: ``[B, L, C]``.
            attn_mask: bool ``[B, L]``, True = padding.
            **options: Keyword arguments of :meth:`Resampler.forward`.

        Raises:
            KeyError: If ``patch_to_query_dict`` has no entry for the number of tokens.
            ValueError: As :meth:`Resampler.forward`, and if images of one batch have different
                numbers of queries.
        """
        if attn_mask is not None:
            options["key_padding_mask"] = attn_mask
        return super().forward(key_value_states, None, **options)

    def query_count(self, *lengths: int) -> int:
        """See :meth:`Resampler.query_count`."""
        for length in lengths:
            # Compared, not hashed: a symbolic length cannot be hashed while exporting.
            if not any(length == patches for patches in self.patch_to_query_dict):
                raise KeyError(
                    f"Number of patches {length} not found in patch_to_query_dict amongst possible "
                    f"values {self.patch_to_query_dict.keys()}."
                )
        counts = {
            queries
            for patches, queries in self.patch_to_query_dict.items()
            if any(length == patches for length in lengths)
        }
        if len(counts) > 1:
            raise InputError(
                f"images of {sorted(set(lengths))} tokens have {sorted(counts)} queries: pass "
                "images with different numbers of queries in separate calls"
            )
        return counts.pop()


class Kosmos2Calls(Resampler):
    """The call signature of Kosmos-2 and 2.5, which returns features and attention or ``None``.

    Attributes:
        gives_attention: Whether attention is returned by default, as the model does if its
            attention implementation is eager.
    """

    positioned = False
    gives_attention: bool

    def forward(  # type: ignore[override]
        self, features: Tensor | Sequence[Tensor], **options: Any
    ) -> tuple[Tensor, Tensor | list[Tensor] | None]:
        """Call :meth:`Resampler.forward` and always return two results.

        Args:
            features: ``[B, L, C]``.
            **options: Keyword arguments of :meth:`Resampler.forward`.

        Returns:
            ``[B, Q, D]``, and ``[B, heads, Q, L + Q]`` or ``None``.
        """
        options.setdefault("return_attention", self.gives_attention)
        found: Any = super().forward(features, **options)
        if not options["return_attention"]:
            return found, None
        out, maps = found
        if isinstance(maps, Tensor):
            maps = maps.to(out.dtype)
        return out, maps
