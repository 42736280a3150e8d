"""The baseline projector: Linear and LayerNorm."""

from __future__ import annotations

from typing import Any, overload

from torch import Tensor, nn

from visproj.projectors.config import check_features, check_width, vision_width
from visproj.projectors.fusion import linear_layer_norm, log_called

_READS = {"0": nn.Linear, "1": nn.LayerNorm}


class LinearProjector(nn.Sequential):
    """Project visual tokens and normalise them: ``LayerNorm(x Wᵀ + b)``, eps 1e-12.

    State-dict keys: ``0.weight [D, C]``, ``0.bias [D]``, ``1.weight [D]``, ``1.bias [D]``. Fresh
    weights are ``nn.Linear``'s and ``nn.LayerNorm``'s own, as upstream's are.

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
        """``[..., S, C] -> [..., S, D]``.

        Raises:
            TypeError: If ``x`` is not floating point or has another dtype than the weights.
            ValueError: If ``x`` has another width or device than the weights.
        """
        check_features(x, self.vis_dim)
        log_called(self, _READS)
        if len(self) != 2:
            return super().forward(x)
        return linear_layer_norm(x, self[0], self[1])

    def fold(self, **options: Any) -> nn.Module:
        """Same as :func:`visproj.fold`."""
        from visproj.folding import fold

        return fold(self, **options)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...

    @overload
    def __getitem__(self, index: slice) -> nn.Sequential: ...

    def __getitem__(self, index: int | slice) -> nn.Module:
        """A child, or for a slice a plain ``nn.Sequential`` of them."""
        if isinstance(index, slice):
            return nn.Sequential(*list(self)[index])
        return super().__getitem__(index)
