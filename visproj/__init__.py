"""Vision-to-language projectors: drop-in modules, plain PyTorch and fused kernels."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

# The kernels live in the top-level folder kernels/ and are installed as visproj.kernels. From a
# clone that is not installed, or installed in editable mode, find them beside this package.
_here = _Path(__file__).resolve().parent
_root = _here.parent
if not (_here / "kernels").is_dir() and (_root / "kernels" / "support.py").is_file():
    __path__.append(str(_root))

if TYPE_CHECKING:
    from visproj.backend import use_backend
    from visproj.conversion import convert, revert
    from visproj.folding import fold, graphed, load_folded
    from visproj.projectors import (
        LinearProjector,
        PerceiverProjector,
        VisProjection_perceiver,
        VisProjection_vit,
        ViTProjector,
        build_projector,
    )
    from visproj.qwen_vl import extract_vision_encoder
    from visproj.vlm.compose import VisualSequence, insert_visual_tokens
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


# The module that each public name is imported from at its first use, so that `visproj --help` and
# shell completion do not wait for torch.
_MODULES = {
    "LinearProjector": "projectors",
    "PerceiverProjector": "projectors",
    "PretrainedProjector": "vlm.pretrained",
    "ViTProjector": "projectors",
    "VisProjection_perceiver": "projectors",
    "VisProjection_vit": "projectors",
    "VisualLanguageModel": "vlm.model",
    "VisualSequence": "vlm.compose",
    "build_projector": "projectors",
    "convert": "conversion",
    "extract_vision_encoder": "qwen_vl",
    "fold": "folding",
    "graphed": "folding",
    "insert_visual_tokens": "vlm.compose",
    "load_folded": "folding",
    "load_projector": "weights",
    "load_visualchat_projector": "weights",
    "revert": "conversion",
    "save_projector": "weights",
    "use_backend": "backend",
}


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of this package, at its first use."""
    if name in _MODULES:
        value = getattr(_import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    if name == "kernels" or (_here / f"{name}.py").is_file() or (_here / name).is_dir():
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
