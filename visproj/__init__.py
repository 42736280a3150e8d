"""Vision-to-language projectors: drop-in modules, plain PyTorch and fused kernels."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

# The kernels live in the top-level folder kernels/ and are installed as visproj.kernels. From a
# clone that is not installed, or installed in editable mode, find them beside this package.
_root = _Path(__file__).resolve().parent.parent
if not (_root / "visproj" / "kernels").is_dir() and (_root / "kernels" / "support.py").is_file():
    __path__.append(str(_root))

from visproj.backend import use_backend  # noqa: E402
from visproj.folding import fold, graphed, load_folded  # noqa: E402
from visproj.projectors import (  # noqa: E402
    LinearProjector,
    PerceiverProjector,
    VisProjection_perceiver,
    VisProjection_vit,
    ViTProjector,
    build_projector,
)
from visproj.vlm.compose import VisualSequence, insert_visual_tokens  # noqa: E402

if TYPE_CHECKING:
    from visproj.conversion import convert, revert
    from visproj.qwen_vl import extract_vision_encoder
    from visproj.vlm.model import VisualLanguageModel
    from visproj.vlm.pretrained import PretrainedProjector
    from visproj.weights import load_projector, load_visualchat_projector, save_projector

__version__ = "0.1.0"

__all__ = [
    "LinearProjector",
    "PerceiverProjector",
    "PretrainedProjector",
    "ViTProjector",
    "VisProjection_perceiver",
    "VisProjection_vit",
    "VisualLanguageModel",
    "VisualSequence",
    "build_projector",
    "convert",
    "extract_vision_encoder",
    "fold",
    "graphed",
    "insert_visual_tokens",
    "load_folded",
    "load_projector",
    "load_visualchat_projector",
    "revert",
    "save_projector",
    "use_backend",
]


# What is seldom needed, and where it is imported from when it is.
_LAZY = {
    "PretrainedProjector": "visproj.vlm.pretrained",
    "VisualLanguageModel": "visproj.vlm.model",
    "convert": "visproj.conversion",
    "extract_vision_encoder": "visproj.qwen_vl",
    "load_projector": "visproj.weights",
    "load_visualchat_projector": "visproj.weights",
    "revert": "visproj.conversion",
    "save_projector": "visproj.weights",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(_import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
