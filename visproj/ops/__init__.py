"""Public operations: they check arguments, cast under autocast and call an implementation."""

from visproj.backend import runs_triton
from visproj.ops.cross_attention import cross_attention, cross_attention_maps
from visproj.ops.eager import row_scale, scale_rows
from visproj.ops.folded_linear import folded_linear
from visproj.ops.linear_layer_norm import linear_layer_norm
from visproj.ops.linear_norm_linear import linear_norm_linear
from visproj.ops.packed_cross_attention import packed_cross_attention

__all__ = [
    "cross_attention",
    "cross_attention_maps",
    "folded_linear",
    "linear_layer_norm",
    "linear_norm_linear",
    "packed_cross_attention",
    "row_scale",
    "runs_triton",
    "scale_rows",
]
