"""DeepSpeed-VisualChat's projectors as ``nn.Module``s with upstream's state-dict keys."""

from visproj.projectors.build import KINDS, build_projector
from visproj.projectors.linear import LinearProjector
from visproj.projectors.perceiver import PerceiverProjector, VisProjection_perceiver
from visproj.projectors.vit import VisProjection_vit, ViTProjector

__all__ = [
    "KINDS",
    "LinearProjector",
    "PerceiverProjector",
    "ViTProjector",
    "VisProjection_perceiver",
    "VisProjection_vit",
    "build_projector",
]
