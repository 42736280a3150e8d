"""Public operations: arguments checked, dtypes settled, then handed to an implementation."""

from visproj.ops.cross_attention import cross_attention, cross_attention_maps
from visproj.ops.linear_layer_norm import linear_layer_norm

__all__ = ["cross_attention", "cross_attention_maps", "linear_layer_norm"]
