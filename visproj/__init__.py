"""Vision-to-language projectors: drop-in modules, plain PyTorch and fused kernels."""

from pathlib import Path as _Path

# The kernels live in the top-level folder kernels/ and are installed as visproj.kernels. From a
# clone that is not installed, or installed in editable mode, find them beside this package.
_root = _Path(__file__).resolve().parent.parent
if not (_root / "visproj" / "kernels").is_dir() and (_root / "kernels" / "support.py").is_file():
    __path__.append(str(_root))

from visproj.projectors import (  # noqa: E402
    LinearProjector,
    PerceiverProjector,
    VisProjection_perceiver,
    VisProjection_vit,
    ViTProjector,
    build_projector,
)
from visproj.vlm.compose import VisualSequence, insert_visual_tokens  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "LinearProjector",
    "PerceiverProjector",
    "ViTProjector",
    "VisProjection_perceiver",
    "VisProjection_vit",
    "VisualSequence",
    "build_projector",
    "insert_visual_tokens",
]
