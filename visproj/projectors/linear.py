"""The baseline projector: Linear and LayerNorm."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn

from visproj.checks import check_features, check_width, vision_width
from visproj.errors import InputError
from visproj.folding.modules import FoldedLinear, check_foldable, fold_linear, weights_digest
from visproj.fusion import Reads, is_plain, linear_layer_norm

_READS: Reads = {"0": nn.Linear, "1": nn.LayerNorm}


class LinearProjector(nn.Sequential):
    """The baseline projector: ``LayerNorm(x Wᵀ + b)`` with eps 1e-12.

    State-dict keys: ``0.weight [D, C]``, ``0.bias [D]``, ``1.weight [D]``, ``1.bias [D]``. Initial
    weights are those of ``nn.Linear`` and ``nn.LayerNorm``, as upstream's are.

    Args:
        vis_config: A ``CLIPVisionConfig``, any object with ``hidden_size``, or the width ``C``.
        lang_dim: Width ``D`` of the language model.

    Raises:
        TypeError: If ``vis_config`` has no width, or a width is not an int.
        ValueError: If a width is not positive.

    Source: DeepSpeed-VisualChat ``utils/model/modeling_dsvl.py``, ``build_projection``.
    """

    def __init__(self, vis_config: object, lang_dim: int) -> None:
        width = vision_width(vis_config)
        lang_dim = check_width("lang_dim", lang_dim)
        super().__init__(nn.Linear(width, lang_dim), nn.LayerNorm(lang_dim, eps=1e-12))
        self.vis_dim = width

    def forward(self, x: Tensor) -> Tensor:
        """Project visual tokens: ``[..., S, C] -> [..., S, D]``.

        Raises:
            TypeError: If ``x`` is not floating point or has another dtype than the weights.
            ValueError: If ``x`` has another width or device than the weights.
        """
        check_features(x, self.vis_dim)
        if len(self) == 2 and is_plain(self, _READS):
            return linear_layer_norm(x, *self)
        return super().forward(x)

    @torch.inference_mode(False)
    @torch.no_grad()
    def fold(self, *, dtype: torch.dtype | None = None) -> FoldedLinear:
        """See :func:`visproj.fold`."""
        if len(self) != 2:
            raise InputError(f"cannot fold LinearProjector: it has {len(self)} children, not 2")
        check_foldable(self, LinearProjector, _READS)
        folded = fold_linear(self, dtype)
        folded.config["digest"] = weights_digest(self)
        return folded

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...

    @overload
    def __getitem__(self, index: slice) -> nn.Sequential: ...

    def __getitem__(self, index: int | slice) -> nn.Module:
        """Return a child, or for a slice a plain ``nn.Sequential`` of children."""
        if isinstance(index, slice):
            return nn.Sequential(*list(self)[index])
        return super().__getitem__(index)
