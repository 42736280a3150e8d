"""The ViT projector: one CLIP encoder layer, Linear and LayerNorm."""

from __future__ import annotations

import copy
from dataclasses import asdict

import torch
from torch import Tensor, nn

from visproj.checks import check_features, check_width
from visproj.clip import CLIPMLP, CLIPAttention, CLIPEncoderLayer, VisionConfig
from visproj.errors import InputError
from visproj.folding.modules import FoldedViT, check_foldable, fold_linear, weights_digest
from visproj.fusion import Reads, is_plain, linear_layer_norm, why_not_plain
from visproj.ops.checks import check_alike

_TAIL: Reads = {
    "projection": nn.Sequential,
    "projection.0": nn.Linear,
    "projection.1": nn.LayerNorm,
}
_FIRST_NORM: Reads = {"vis_layer.layer_norm1": nn.LayerNorm}
_LAYER: Reads = {
    "vis_layer": CLIPEncoderLayer,
    "vis_layer.self_attn": CLIPAttention,
    **{f"vis_layer.self_attn.{name}_proj": nn.Linear for name in ("k", "v", "q", "out")},
    "vis_layer.mlp": CLIPMLP,
    "vis_layer.mlp.fc1": nn.Linear,
    "vis_layer.mlp.fc2": nn.Linear,
    "vis_layer.layer_norm1": nn.LayerNorm,
    "vis_layer.layer_norm2": nn.LayerNorm,
}


class ViTProjector(nn.Module):
    """The ViT projector: a CLIP layer, then ``LayerNorm(x Wᵀ + b)`` with eps 1e-12.

    State-dict keys: ``vis_layer.*`` (the 16 of transformers' ``CLIPEncoderLayer``),
    ``projection.0.{weight [D, C], bias [D]}``, ``projection.1.{weight [D], bias [D]}``. The CLIP
    layer uses its config's eps and attention dropout. Its attention is SDPA; the config's
    ``_attn_implementation`` is ignored. With the same seed, initial weights are upstream's.

    Args:
        vis_config: A ``CLIPVisionConfig`` or any object with the fields of :class:`VisionConfig`.
        lang_dim: Width ``D`` of the language model.

    Raises:
        TypeError: If ``vis_config`` lacks a field, or a numeric field is not a number.
        ValueError: If a width is not positive, the heads do not divide ``C``, eps or dropout is out
            of range or the activation is unknown.

    Source: DeepSpeed-VisualChat ``utils/model/vis_proj.py``, ``VisProjection_vit``.
    """

    def __init__(self, vis_config: object, lang_dim: int) -> None:
        super().__init__()
        config = VisionConfig.of(vis_config)
        lang_dim = check_width("lang_dim", lang_dim)
        self.vis_dim = config.hidden_size
        self.vis_layer = CLIPEncoderLayer(config)
        self.projection = nn.Sequential(
            nn.Linear(self.vis_dim, lang_dim), nn.LayerNorm(lang_dim, eps=1e-12)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Project visual tokens, CLS included: ``[..., S, C] -> [..., S, D]``.

        Raises:
            TypeError: If ``x`` is not floating point or has another dtype than the weights.
            ValueError: If ``x`` has another width or device than the weights.
        """
        check_features(x, self.vis_dim)
        if why_not_plain(self, _FIRST_NORM) is None:
            check_alike("visual features", x, "the CLIP layer", self.vis_layer.layer_norm1.weight)
        x = self.vis_layer(x)
        if is_plain(self, _TAIL):
            return linear_layer_norm(x, *self.projection)
        return self.projection(x)

    @torch.inference_mode(False)
    @torch.no_grad()
    def fold(self, *, dtype: torch.dtype | None = None) -> FoldedViT:
        """See :func:`visproj.fold`."""
        check_foldable(self, ViTProjector, {**_LAYER, **_TAIL})
        layer = self.vis_layer
        if layer.self_attn.training and layer.self_attn.dropout:
            raise InputError("cannot fold vis_layer.self_attn: its dropout is active; call eval()")
        tail = fold_linear(self.projection, dtype)
        vision = VisionConfig(
            hidden_size=self.vis_dim,
            intermediate_size=layer.mlp.fc1.out_features,
            num_attention_heads=layer.self_attn.num_heads,
            hidden_act=layer.mlp.hidden_act,
            layer_norm_eps=layer.layer_norm1.eps,
            attention_dropout=0.0,
        )
        config = {**tail.config, "vision": asdict(vision), "digest": weights_digest(self)}
        layer = copy.deepcopy(layer).eval().to(tail.like.dtype)
        layer.self_attn.dropout = 0.0
        return FoldedViT(config, layer, tail)


VisProjection_vit = ViTProjector
