"""The two forms of a folded resampler: keys and values from the features, and absorbed queries."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visproj import ops
from visproj.errors import InputError
from visproj.folding.algebra import Scaled
from visproj.folding.modules import ScaledLinear, copied, frozen_linear, own
from visproj.ops.masks import check_masks, merge_masks

FORMS = ("keys", "absorbed")


class KeyValues(NamedTuple):
    """Weights of keys and values: ``rstd (x weightᵀ + bias) + shift``.

    Attributes:
        weight: ``[2 D, C]``, keys first.
        bias: ``[2 D]``.
        shift: ``[2 D]``; zero for the keys, where the softmax would cancel it.
        scale: ``factor``, ``factor_bias`` and ``floor`` of ``rstd``, or ``None`` if it is 1.
        eps: Eps of the LayerNorm that normalises the features first, or ``None`` without one.
    """

    weight: Tensor
    bias: Tensor
    shift: Tensor
    scale: tuple[Tensor, Tensor, float] | None = None
    eps: float | None = None


class Constants(NamedTuple):
    """The other constants that folding a resampler needs, in fp64.

    Attributes:
        queries: Projected queries, ``[Q, H, d]``.
        key_weight: ``[D, D]``, the weight that projects the keys' positions.
        appended: Projected keys and values that follow those of the features, ``[A, 2, H, d]``.
    """

    queries: Tensor
    key_weight: Tensor
    appended: Tensor | None = None


class NormLinear(nn.Module):
    """A Linear, after a LayerNorm without gain and shift if ``eps`` is given.

    In PyTorch this is faster than a matmul whose rows are scaled.
    """

    def __init__(self, linear: nn.Linear, eps: float | None) -> None:
        super().__init__()
        self.linear = linear
        self.eps = eps

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        """Compute ``[..., L, C] -> [..., L, N]``; ``table`` is added to the first columns."""
        out = self.linear(normalised(x, self.eps))
        if table is None:
            return out
        return out + F.pad(table, (0, out.shape[-1] - table.shape[-1]))


def normalised(x: Tensor, eps: float | None) -> Tensor:
    """Return ``x`` with mean 0 and variance 1 in every row, or ``x`` itself without ``eps``."""
    return x if eps is None else F.layer_norm(x, x.shape[-1:], eps=eps)


class AbsorbedQueries(nn.Module):
    """Attention with queries that were multiplied by the key weights, so that it needs no keys.

    For head ``h`` with keys ``rstd (x A_kᵀ + a_k)``: ``U = q A_k / sqrt(d)``,
    ``u = q a_k / sqrt(d)``, ``scores = rstd (x Uᵀ + u) + T``, ``p = softmax(scores)``,
    ``out = ((p rstd) x) A_vᵀ + (Σ p rstd) a_v + (Σ p) c_v``. Values are pooled at the width of the
    features and projected afterwards. ``T`` holds the scores of the positions. Row
    ``query * H + head`` of the scores belongs to that query and head.
    """

    appended_scores: Tensor | None
    appended_values: Tensor | None
    factor: Tensor | None
    factor_bias: Tensor | None
    score_weight: Tensor
    score_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor
    value_shift: Tensor

    def __init__(self, tensors: dict[str, Tensor | None], floor: float, eps: float | None) -> None:
        super().__init__()
        for name in ABSORBED:
            self.register_buffer(name, tensors[name])
        self.floor = floor
        self.eps = eps

    def forward(
        self,
        x: Tensor,
        table: Tensor | None,
        queries: int | None,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute ``[B, L, C] -> [B, Q, H d]`` and the maps ``[B, H, Q, L]``.

        With ``A`` appended keys the maps have ``L + A`` columns. ``table`` is ``[L, Q H]`` or
        ``[B, L, Q H]``. ``queries`` is the number of queries; ``None`` means all.
        """
        batch, length, _ = x.shape
        heads = self.value_weight.shape[0]
        x = normalised(x, self.eps)
        scale = None
        if self.factor is not None and self.factor_bias is not None:
            scale = ops.row_scale(x, self.factor, self.factor_bias, self.floor).mT  # [B, 1, L]
        scores = self._scores(x, scale, table, None if queries is None else queries * heads)
        shape = (batch, scores.shape[1] // heads, heads, scores.shape[-1])
        probabilities, dead = _softmax(scores.view(shape), attn_mask, key_padding_mask)
        weights = probabilities[..., :length].flatten(1, 2)
        sums = (weights if scale is None else weights * scale).sum(-1)
        # The features are scaled, not the probabilities: rstd is up to 1e6 for empty rows, too
        # much for fp16.
        rows = x if scale is None else (x * scale.mT).to(x.dtype)
        pooled = torch.bmm(weights.to(x.dtype), rows).view(*shape[:3], x.shape[-1])
        # [B, Q, H, C] -> [H, B Q, C] -> [B, Q, H, d]
        out = torch.bmm(pooled.permute(2, 0, 1, 3).flatten(1, 2), self.value_weight)
        out = out.view(heads, batch, shape[1], out.shape[-1]).permute(1, 2, 0, 3)
        # The terms are summed before rounding: rounding each costs a fifth of a bf16 result's
        # accuracy.
        wide = weights.dtype
        shift, bias = self.value_shift.to(wide), self.value_bias.to(wide)
        out = out + torch.addcmul(shift, sums.view(*shape[:3], 1), bias)
        if self.appended_values is not None:
            late = probabilities[..., length:], self.appended_values.to(wide)
            out = out + torch.einsum("bqha,ahd->bqhd", *late)
        out = (out if dead is None else out.masked_fill(dead, 0.0)).to(x.dtype)
        return out.flatten(-2), probabilities.transpose(1, 2)

    def _scores(
        self, x: Tensor, scale: Tensor | None, table: Tensor | None, rows: int | None
    ) -> Tensor:
        """Return the scores ``[B, Q H, L + A]``, at least in fp32."""
        weight, bias = self.score_weight[:rows], self.score_bias[:rows, None]
        scores = torch.baddbmm(bias, weight.expand(x.shape[0], -1, -1), x.mT)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if scale is not None:
            scores = scores.mul_(scale)
        if table is not None:
            scores = scores.add_(table.view(-1, x.shape[1], table.shape[-1]).mT[:, :rows])
        if self.appended_scores is not None:
            late = self.appended_scores[:rows].to(scores.dtype).expand(x.shape[0], -1, -1)
            scores = torch.cat([scores, late], -1)
        return scores


ABSORBED = (
    "score_weight",
    "score_bias",
    "value_weight",
    "value_bias",
    "value_shift",
    "factor",
    "factor_bias",
    "appended_scores",
    "appended_values",
)


def _softmax(
    scores: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the softmax of ``[B, Q, H, L]``, zero for fully masked queries, and their mask."""
    if attn_mask is None and key_padding_mask is None:
        return scores.softmax(-1), None
    batch, queries, heads, length = scores.shape
    check_masks(scores, (batch, heads, queries, length), attn_mask, key_padding_mask)
    found = merge_masks(attn_mask, key_padding_mask, batch, heads, scores.dtype)
    mask, dead = (t.transpose(1, 2) for t in found)
    closed = mask.dtype == torch.bool
    scores = scores.masked_fill(~mask, -math.inf) if closed else scores + mask
    return scores.softmax(-1).masked_fill(dead, 0.0), dead


def key_value_module(
    parts: KeyValues, constants: Constants, form: str, dtype: torch.dtype
) -> nn.Module:
    """Return the module for keys and values in one of the :data:`FORMS`."""
    weight, bias, shift = parts.weight, parts.bias, parts.shift
    if form == "absorbed":
        floor = 0.0 if parts.scale is None else parts.scale[2]
        tensors = {
            name: None if tensor is None else own(tensor, dtype)
            for name, tensor in _absorbed(parts, constants).items()
        }
        return AbsorbedQueries(tensors, floor, parts.eps)
    if parts.scale is None:
        linear = frozen_linear(own(weight, dtype), own(bias + shift, dtype))
        return NormLinear(linear, parts.eps)
    factor, factor_bias, floor = parts.scale
    return ScaledLinear(copied(Scaled(weight, bias, factor, factor_bias, shift, floor), dtype))


def _absorbed(parts: KeyValues, constants: Constants) -> dict[str, Tensor | None]:
    """Compute the buffers of :class:`AbsorbedQueries`."""
    _, heads, width = constants.queries.shape
    queries = constants.queries / math.sqrt(width)
    key, value = (t.unflatten(0, (heads, width)) for t in parts.weight.double().chunk(2))
    key_bias, value_bias = (t.view(heads, width) for t in parts.bias.double().chunk(2))
    value_shift = parts.shift.double().chunk(2)[1].view(heads, width)
    appended = constants.appended
    factor, factor_bias = (None, None) if parts.scale is None else parts.scale[:2]
    late = None
    if appended is not None:
        late = (queries * appended[:, None, 0]).sum(-1).flatten(1).T  # [Q H, A]
    return {
        "score_weight": torch.einsum("qhd,hdc->qhc", queries, key).flatten(0, 1),
        "score_bias": (queries * key_bias).sum(-1).flatten(),
        "value_weight": value.transpose(1, 2),
        "value_bias": value_bias,
        "value_shift": value_shift,
        "factor": factor,
        "factor_bias": factor_bias,
        "appended_scores": late,
        "appended_values": None if appended is None else appended[:, 1],
    }


def position_weight(constants: Constants, form: str) -> Tensor:
    """Return the weight that projects positions to keys ``[D, D]``, or to scores ``[Q H, D]``."""
    if form == "keys":
        return constants.key_weight
    _, heads, width = constants.queries.shape
    queries = constants.queries / math.sqrt(width)
    weight = constants.key_weight.double().unflatten(0, (heads, width))
    return torch.einsum("qhd,hdc->qhc", queries, weight).flatten(0, 1)


def multiply_adds(
    form: str, *, length: int, width: int, lang_dim: int, queries: int, heads: int
) -> int:
    """Count the multiply-adds for one image in the stages that differ between the two forms.

    ``"keys"`` computes keys and values, scores, and the weighted sum of values. ``"absorbed"``
    computes scores from the features, the weighted sum of features, and its projection.
    """
    if form == "keys":
        return 2 * length * width * lang_dim + 2 * queries * length * lang_dim
    return 2 * heads * queries * length * width + queries * width * lang_dim


def choose_form(form: str | None, **sizes: int) -> str:
    """Return ``form``, or if it is ``None`` the form with fewer multiply-adds.

    The absorbed form writes scores and pooled values to memory, which fused attention does not. So
    it is chosen only if the scores of one token are fewer than the elements of its key.

    Raises:
        ValueError: If ``form`` is not one of :data:`FORMS`.
    """
    if form is None:
        narrow = sizes["queries"] * sizes["heads"] < sizes["lang_dim"]
        return min(FORMS if narrow else FORMS[:1], key=lambda name: multiply_adds(name, **sizes))
    if form not in FORMS:
        raise InputError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    return form
