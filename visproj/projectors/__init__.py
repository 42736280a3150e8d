"""Projectors and resamplers as ``nn.Module``s with their models' state-dict keys."""

from visproj.projectors.aria import AriaProjector
from visproj.projectors.build import KINDS, build_projector
from visproj.projectors.kosmos2 import Kosmos2Projection
from visproj.projectors.linear import LinearProjector
from visproj.projectors.perceiver import PerceiverProjector, VisProjection_perceiver
from visproj.projectors.resamplers import (
    MiniCPM2Resampler,
    MiniCPMResampler,
    QwenVLResampler,
)
from visproj.projectors.vit import VisProjection_vit, ViTProjector

__all__ = [
    "KINDS",
    "AriaProjector",
    "Kosmos2Projection",
    "LinearProjector",
    "MiniCPM2Resampler",
    "MiniCPMResampler",
    "PerceiverProjector",
    "QwenVLResampler",
    "ViTProjector",
    "VisProjection_perceiver",
    "VisProjection_vit",
    "build_projector",
]
