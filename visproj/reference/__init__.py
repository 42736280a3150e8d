"""Plain PyTorch: the operations as a CPU runs them, and the literal projectors as an oracle."""

from visproj.reference.cross_attention import cross_attention_maps_ref, cross_attention_ref
from visproj.reference.folded_linear import folded_linear_ref
from visproj.reference.linear_layer_norm import linear_layer_norm_ref
from visproj.reference.linear_norm_linear import linear_norm_linear_ref
from visproj.reference.projectors import (
    linear_projector_ref,
    perceiver_projector_ref,
    projector_ref,
    vit_projector_ref,
)

__all__ = [
    "cross_attention_maps_ref",
    "cross_attention_ref",
    "folded_linear_ref",
    "linear_layer_norm_ref",
    "linear_norm_linear_ref",
    "linear_projector_ref",
    "perceiver_projector_ref",
    "projector_ref",
    "vit_projector_ref",
]
