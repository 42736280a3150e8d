"""The Qwen-VL vision encoder: the module, its extraction from a checkpoint, and the way back."""

from visproj.qwen_vl.config import QwenVisionConfig
from visproj.qwen_vl.extract import ExtractionSummary, extract_vision_encoder, render_summary
from visproj.qwen_vl.keys import checkpoint_key, encoder_key, expected_shapes
from visproj.qwen_vl.merge import merge_into
from visproj.qwen_vl.model import QwenVisionTransformer

__all__ = [
    "ExtractionSummary",
    "QwenVisionConfig",
    "QwenVisionTransformer",
    "checkpoint_key",
    "encoder_key",
    "expected_shapes",
    "extract_vision_encoder",
    "merge_into",
    "render_summary",
]
