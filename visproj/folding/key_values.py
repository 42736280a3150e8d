"""Keys and values straight from the features, and queries that go through the key weights first."""

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
    """Keys and values of features: ``rstd (x weightᵀ + bias) + shift``.

    Attributes:
        weight: ``[2 D, C]``, keys first.
        bias: ``[2 D]``.
        shift: ``[2 D]``; zero for the keys, where the softmax would cancel it.
        scale: ``factor``, ``factor_bias`` and ``floor`` of ``rstd``, or ``None`` where it is 1.
        eps: Where features are normalised first, that LayerNorm's, else ``None``.
    """

    weight: Tensor
    bias: Tensor
    shift: Tensor
    scale: tuple[Tensor, Tensor, float] | None = None
    eps: float | None = None


class Constants(NamedTuple):
    """What a fold of any resampler needs besides :class:`KeyValues`, in fp64.

    Attributes:
        queries: Projected, ``[Q, H, d]``.
        key_weight: ``[D, D]``, which projects the keys' positions.
        appended: Projected keys and values that follow those of the features, ``[A, 2, H, d]``.
    """

    queries: Tensor
    key_weight: Tensor
    appended: Tensor | None = None


class NormLinear(nn.Module):
    """A Linear, after a LayerNorm without gain and shift where ``eps`` is given.

    In PyTorch that is faster than a product whose rows are scaled.
    """

    def __init__(self, linear: nn.Linear, eps: float | None) -> None:
        super().__init__()
        self.linear = linear
        self.eps = eps

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        """``[..., L, C] -> [..., L, N]``; ``table`` is added to the first columns."""
        out = self.linear(normalised(x, self.eps))
        if table is None:
            return out
        return out + F.pad(table, (0, out.shape[-1] - table.shape[-1]))


def normalised(x: Tensor, eps: float | None) -> Tensor:
    """``x`` with mean 0 and variance 1 in every row, or as it is without ``eps``."""
    return x if eps is None else F.layer_norm(x, x.shape[-1:], eps=eps)


class AbsorbedQueries(nn.Module):
    """Attention whose queries have gone through the key weights: scores from the features.

    For head ``h`` with keys ``rstd (x A_kᵀ + a_k)``: ``U = q A_k / sqrt(d)``,
    ``u = q a_k / sqrt(d)``, ``scores = rstd (x Uᵀ + u) + T``, ``p = softmax(scores)``,
    ``out = ((p rstd) x) A_vᵀ + (Σ p rstd) a_v + (Σ p) c_v``: values are pooled in the width of the
    features. ``T`` are the scores of positions. Rows of scores are counted ``query * H + head``.
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
        """``[B, L, C] -> [B, Q, H d]``, and the maps ``[B, H, Q, L]`` (``L + A`` with appended).

        ``table`` is ``[L, Q H]``, or ``[B L, Q H]``; ``queries`` how many of them, all if ``None``.
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
        # Not the probabilities are scaled: rstd is up to 1e6 for empty rows, too much for fp16.
        rows = x if scale is None else (x * scale.mT).to(x.dtype)
        pooled = torch.bmm(weights.to(x.dtype), rows).view(*shape[:3], x.shape[-1])
        # [B, Q, H, C] -> [H, B Q, C] -> [B, Q, H, d]
        out = torch.bmm(pooled.permute(2, 0, 1, 3).flatten(1, 2), self.value_weight)
        out = out.view(heads, batch, shape[1], out.shape[-1]).permute(1, 2, 0, 3)
        # Sums are rounded once: one by one they cost a fifth of a bf16 result's accuracy.
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
        """``[B, Q H, L + A]``, at least in fp32."""
        weight, bias = self.score_weight[:rows], self.score_bias[:rows, None]
        scores = torch.baddbmm(bias, weight.expand(len(x), -1, -1), x.mT)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if scale is not None:
            scores = scores.mul_(scale)
        if table is not None:
            scores = scores.add_(table.view(-1, x.shape[1], table.shape[-1]).mT[:, :rows])
        if self.appended_scores is not None:
            late = self.appended_scores[:rows].to(scores.dtype).expand(len(x), -1, -1)
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
    """Probabilities of ``[B, Q, H, L]``, zero for queries without keys, and where those are."""
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
    """What makes keys and values of features, in one of the :data:`FORMS`."""
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
    """The buffers of :class:`AbsorbedQueries`."""
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
    """What takes a key's position to what is added: ``[D, D]``, or ``[Q H, D]`` of scores."""
    if form == "keys":
        return constants.key_weight
    _, heads, width = constants.queries.shape
    queries = constants.queries / math.sqrt(width)
    weight = constants.key_weight.double().unflatten(0, (heads, width))
    return torch.einsum("qhd,hdc->qhc", queries, weight).flatten(0, 1)


def multiply_adds(
    form: str, *, length: int, width: int, lang_dim: int, queries: int, heads: int
) -> int:
    """Multiply-adds of one image in what the two forms do not share.

    Keys and values, scores and their sum; or scores from features, pooling, and its projection.
    """
    if form == "keys":
        return 2 * length * width * lang_dim + 2 * queries * length * lang_dim
    return 2 * heads * queries * length * width + queries * width * lang_dim


def choose_form(form: str | None, **sizes: int) -> str:
    """``form``, or the one of fewer multiply-adds.

    Scores and pooled values of the absorbed form are written to memory, attention's own are not: it
    is chosen only where its scores are narrower than the keys.

    Raises:
        ValueError: If there is no such form.
    """
    if form is None:
        narrow = sizes["queries"] * sizes["heads"] < sizes["lang_dim"]
        return min(FORMS if narrow else FORMS[:1], key=lambda name: multiply_adds(name, **sizes))
    if form not in FORMS:
        raise InputError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    return form
