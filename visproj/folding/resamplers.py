"""Folded resamplers: constant queries, and keys and values computed from the features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visproj.calls import AriaCalls, Kosmos2Calls, MiniCPM2Calls, MiniCPMCalls
from visproj.folding.key_values import (
    Constants,
    KeyValues,
    choose_form,
    key_value_module,
    position_weight,
)
from visproj.folding.modules import FoldedProjector, own, weights_digest
from visproj.fusion import Reads, is_plain
from visproj.positions import Grid, sincos_axis
from visproj.resampler import Resampler


class FoldedResampler(FoldedProjector, Resampler):
    """A resampler with constant queries, and keys and values computed from the features.

    In the form ``keys`` one matmul computes keys and values. In the form ``absorbed`` the queries
    were multiplied by the key weights (:class:`AbsorbedQueries`).
    """

    queries: Tensor | None
    latent: Tensor | None  # keys and values appended to those of the features, [A, 2, H, d]

    def __init__(
        self,
        config: dict[str, Any],
        kv: nn.Module,
        tail: nn.Module,
        queries: Tensor | None,
        latent: Tensor | None = None,
        **tables: Tensor,
    ) -> None:
        super().__init__()
        self.config = config
        self.vis_dim, self.num_heads = config["vis_dim"], config["num_heads"]
        self.query_grid = tuple(config["query_grid"])
        self.has_cls = config["has_cls"]
        self.kv = kv
        self.tail = tail
        self.absorbed = config["form"] == "absorbed"
        self.register_buffer("queries", queries)
        self.register_buffer("latent", latent)
        for name, table in tables.items():
            self.register_buffer(name, table)

    @property
    def like(self) -> Tensor:
        """See :attr:`FoldedProjector.like`."""
        like: Any = self.kv.score_weight if self.absorbed else self.queries
        return like

    def resample(
        self, features: Tensor, positions: Tensor | None, return_attention: bool, **masks: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See :meth:`Resampler.resample`."""
        if not self.absorbed:
            return super().resample(features, positions, return_attention, **masks)
        count = self.query_count(features.shape[1])
        attended, maps = self.kv(features, positions, count, **masks)
        return self.tail(attended), maps if return_attention else None

    def takes_apart(self) -> bool:
        """See :meth:`Resampler.takes_apart`."""
        return not self.absorbed

    def project(self, features: Tensor, positions: Any, queries: int | None) -> tuple[Tensor, ...]:
        """See :meth:`Resampler.project`; keys and values are one tensor."""
        kv = self.kv(features, positions).unflatten(-1, (2, self.num_heads, -1))
        wanted: Any = self.queries
        wanted = wanted if queries is None else wanted[:queries]
        return wanted if wanted.dtype == kv.dtype else wanted.to(kv.dtype), kv

    def appended(self) -> tuple[Tensor, ...] | None:
        """See :meth:`Resampler.appended`."""
        return None if self.latent is None else (self.latent,)

    def finish(self, attended: Tensor) -> Tensor:
        """See :meth:`Resampler.finish`."""
        return self.tail(attended)


class FoldedPerceiver(FoldedResampler):
    """A folded ``PerceiverProjector``: one matmul computes keys and values from the features.

    ``K = rstd (x A_kᵀ + a_k) + pos_k``; ``V = rstd (x A_vᵀ + a_v) + c_v``; constant queries;
    attention ``O``; then one more :class:`ScaledLinear`, or only the output projection if the
    projector ends with it. Per image at ``C`` 1024, ``D`` 4096, 256 tokens: 9.6 GMACs in PyTorch
    and 9.3 on the Triton kernels instead of upstream's 23.1.

    Constants of ``K`` that add the same number to every score of a query cancel in the softmax and
    are left out. Those of ``V`` stay, so that a query whose keys are all masked still gets zero
    attention. On a grid other than the one folded for, positions are resized after their projection
    instead of before. If the table is separable, its rows and columns are resized separately. The
    results are the same except for the rounding of an fp32 resize.
    """

    position_table: Tensor
    rows: Tensor
    columns: Tensor
    kv_table: Tensor

    def positions(self, grid: Grid) -> Tensor:
        """See :meth:`Resampler.positions`."""
        if list(grid) == self.config["grid"]:
            return self.kv_table
        if not self.config["separable"]:
            return self._positions.resize(self.position_table, self.query_grid, grid)
        rows, columns = (
            self._positions.resize(axis, (len(axis), 1), (size, 1))
            for axis, size in zip((self.rows, self.columns), grid, strict=True)
        )
        return (rows[:, None] + columns).flatten(0, 1)


class FoldedMiniCPM2Resized(FoldedPerceiver, MiniCPM2Calls):
    """MiniCPM-V 1.0's resampler, folded."""


class AxisPositions(FoldedResampler):
    """A folded resampler whose positions are the sum of one vector per row and one per column.

    Positions are computed, never resized. Projected vectors are stored for a fixed number of rows
    and columns; for larger grids they are computed in the call.
    """

    position_weight: Tensor  # [D, D], or [Q H, D] of scores
    rows: Tensor
    columns: Tensor

    def positions(self, grid: Grid) -> Tensor:
        """See :meth:`Resampler.positions`."""
        rows, columns = self._axis("rows", grid[0]), self._axis("columns", grid[1])
        return (rows[:, None] + columns).flatten(0, 1)

    def positions_at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """See :meth:`MiniCPMCalls.positions_at`."""
        inside = (rows < len(self.rows)) & (columns < len(self.columns))
        down = self.rows[rows.clamp(max=len(self.rows) - 1)]
        found = down + self.columns[columns.clamp(max=len(self.columns) - 1)]
        return found.masked_fill(~inside[:, None], math.nan)

    def temporal_positions(self, times: Sequence[int]) -> Tensor:
        """See :meth:`MiniCPMCalls.temporal_positions`."""
        width = self.position_weight.shape[1]
        table = sincos_axis(width, [max(time, 0) for time in times])
        table[[time < 0 for time in times]] = 0
        return self._project(table, slice(None))

    def _axis(self, name: str, length: int) -> Tensor:
        known: Tensor = getattr(self, name)
        if length <= len(known):
            return known[:length]
        half = self.position_weight.shape[1] // 2
        part = slice(half, None) if name == "rows" else slice(half)
        return self._project(sincos_axis(half, range(length)), part)

    def _project(self, table: Tensor, part: slice) -> Tensor:
        weight = self.position_weight
        return F.linear(table.to(weight), weight[:, part])


class FoldedMiniCPM(AxisPositions, MiniCPMCalls):
    """The resampler of MiniCPM-V 2.5 and later, folded."""


class FoldedMiniCPM2(AxisPositions, MiniCPM2Calls):
    """MiniCPM-V 2.0's resampler, folded."""


class FoldedAria(FoldedResampler, AriaCalls):
    """Aria's projector, folded."""

    def __init__(self, config: dict[str, Any], *args: Any, **tensors: Any) -> None:
        super().__init__(config, *args, **tensors)
        self.patch_to_query_dict = dict(config["query_counts"])


class FoldedKosmos2(FoldedResampler, Kosmos2Calls):
    """Kosmos-2's projection, folded."""

    def __init__(self, config: dict[str, Any], *args: Any, **tensors: Any) -> None:
        super().__init__(config, *args, **tensors)
        self.gives_attention = config["gives_attention"]

    def with_latent(self, features: Tensor, positions: Tensor | None = None) -> tuple[Tensor, ...]:
        """See :meth:`Resampler.with_latent`; on a CPU keys and values are not copied to append.

        There one matmul per image writes to its place in the result. On a GPU one matmul for all
        images takes less time.
        """
        on_cpu = features.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if self.latent is None or not on_cpu or traced or not is_plain(self.kv, _PRODUCT):
            return super().with_latent(features, positions)
        linear: Any = self.kv.linear
        length = features.shape[1]
        rows = self.latent.flatten(1)  # [A, 2 D]
        joint = features.new_empty(features.shape[0], length + len(rows), rows.shape[1])
        joint[:, length:] = rows
        for image, out in zip(features, joint, strict=True):
            torch.addmm(linear.bias, image, linear.weight.T, out=out[:length])
        assert self.queries is not None
        return self.queries, joint.unflatten(-1, (2, self.num_heads, -1))


_PRODUCT: Reads = {"linear": nn.Linear}


def folded_resampler(
    kind: type[FoldedResampler],
    resampler: Resampler,
    parts: KeyValues,
    constants: Constants,
    tail: nn.Module,
    *,
    length: int,
    form: str | None,
    dtype: torch.dtype,
    tables: Callable[[Tensor], dict[str, Tensor]] | None = None,
    **config: Any,
) -> FoldedResampler:
    """Put a folded resampler together.

    Args:
        kind: Class of the folded resampler.
        resampler: The resampler to fold.
        parts: Weights of its keys and values, fp64.
        constants: Its other constants, fp64.
        tail: The folded module after the attention.
        length: Tokens per image, for the choice of the form.
        form: One of :data:`FORMS`, or ``None`` for the one with fewer multiply-adds.
        dtype: Dtype of the stored tensors.
        tables: Computes the stored position tables from :func:`position_weight`, or ``None``.
        config: Further entries of the configuration.
    """
    queries, heads, width = constants.queries.shape
    form = choose_form(
        form,
        length=length,
        width=parts.weight.shape[1],
        lang_dim=heads * width,
        queries=queries,
        heads=heads,
    )
    described = {
        "vis_dim": parts.weight.shape[1],
        "lang_dim": heads * width,
        "num_heads": heads,
        "query_grid": list(resampler.query_grid),
        "has_cls": resampler.has_cls,
        "form": form,
        "floor": None if parts.scale is None else parts.scale[2],
        "eps": parts.eps,
        **config,
        "digest": weights_digest(resampler),
    }
    kept: list[Tensor | None] = [None, None]
    if form == "keys":
        kept = [constants.queries, constants.appended]
    made = {} if tables is None else tables(position_weight(constants, form))
    return kind(
        described,
        key_value_module(parts, constants, form, dtype),
        tail,
        *(None if tensor is None else own(tensor, dtype) for tensor in kept),
        **{name: own(table, dtype) for name, table in made.items()},
    )
