"""Encoder, projector and language model put together."""

from visproj.vlm.compose import VisualSequence, insert_visual_tokens

__all__ = ["VisualSequence", "insert_visual_tokens"]
