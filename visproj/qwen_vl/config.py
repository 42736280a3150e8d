"""The architecture of a Qwen-VL vision encoder and its ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from visproj.checks import check_heads
from visproj.errors import InputError
from visproj.files import read_json_object, write_json

MODEL_TYPE = "qwen_vl_vision_encoder"
CONFIG_NAME = "config.json"
_MOST_LAYERS = 1000  # a damaged number must not ask for a model of a million layers
_DERIVED = ("model_type", "hidden_size")


@dataclass(frozen=True)
class QwenVisionConfig:
    """The architecture of a :class:`visproj.qwen_vl.QwenVisionTransformer`.

    The defaults are those of the released Qwen-VL and Qwen-VL-Chat. ``hidden_size`` reads
    ``output_dim``, so a config can be handed to :func:`visproj.build_projector`.

    Attributes:
        image_size: Side of the square image that the encoder was trained on, in pixels.
        patch_size: Side of a square patch, in pixels.
        width: Width of the transformer.
        layers: Number of its blocks.
        heads: Attention heads of a block.
        mlp_width: Inner width of a block's MLP.
        output_dim: Width of the tokens that come out.
        n_queries: Number of the tokens that come out, a square number.
        positions: Rows of the position table over patches, a square number.
        layer_norm_eps: Added to the variance in every LayerNorm.

    Raises:
        ValueError: If a number is not a positive integer, or if two do not fit one another.

    Source: the block ``visual`` of Qwen-VL-Chat's ``config.json``.
    """

    image_size: int = 448
    patch_size: int = 14
    width: int = 1664
    layers: int = 48
    heads: int = 16
    mlp_width: int = 8192
    output_dim: int = 4096
    n_queries: int = 256
    positions: int = 256
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "layer_norm_eps":
                valid = isinstance(value, float) and 0 < value < 1
            else:
                valid = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if not valid:
                raise InputError(f"{field.name} must be a positive {field.type}, got {value!r}")
        if self.layers > _MOST_LAYERS:
            raise InputError(f"layers must be at most {_MOST_LAYERS}, got {self.layers}")
        if self.image_size % self.patch_size:
            raise InputError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        for name in ("n_queries", "positions"):
            value = getattr(self, name)
            if math.isqrt(value) ** 2 != value:
                raise InputError(f"{name} must be a square number, got {value}")
        if self.width % self.heads:
            raise InputError(f"heads {self.heads} do not divide width {self.width}")
        if self.output_dim % 4:
            raise InputError(f"output_dim must be a multiple of 4, got {self.output_dim}")
        check_heads(self.output_dim, self.pool_heads)

    @property
    def hidden_size(self) -> int:
        """Width of the visual tokens that a projector gets: ``output_dim``."""
        return self.output_dim

    @property
    def pool_heads(self) -> int:
        """Attention heads of the pooling: one for every 128 of its width, at least one."""
        return max(1, self.output_dim // 128)

    @classmethod
    def from_visual_block(cls, block: Mapping[str, Any]) -> QwenVisionConfig:
        """Read the block ``visual`` of a Qwen-VL ``config.json``; unknown entries are ignored.

        The MLP is ``width * mlp_ratio`` wide, truncated: 1664 * 4.9231 gives 8192.

        Raises:
            ValueError: If an entry is missing or unsuitable.
        """
        wanted = ("image_size", "patch_size", "width", "layers", "heads", "mlp_ratio", "output_dim")
        missing = [name for name in wanted if name not in block]
        if missing:
            raise InputError(f"the visual block lacks {', '.join(missing)}")
        numbers = {name: block[name] for name in wanted if name != "mlp_ratio"}
        ratio, width = block["mlp_ratio"], block["width"]
        if not all(_is_finite_number(number) for number in (ratio, width)):
            raise InputError(f"width and mlp_ratio must be numbers, got {width!r} and {ratio!r}")
        mlp_width = int(width * ratio)
        return cls(**numbers, mlp_width=mlp_width, n_queries=block.get("n_queries", 256))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QwenVisionConfig:
        """Build a config from a dictionary that :meth:`to_dict` returned.

        Raises:
            ValueError: If the values describe another kind of model, or if an entry is unknown or
                unsuitable.
        """
        kind = values.get("model_type")
        if kind != MODEL_TYPE:
            raise InputError(
                f"model_type is {kind!r}, not {MODEL_TYPE!r}: extract the encoder from its "
                "checkpoint first, with `visproj extract`"
            )
        numbers = {name: value for name, value in values.items() if name not in _DERIVED}
        unknown = sorted(numbers.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise InputError(f"unknown entries {', '.join(unknown)}")
        return cls(**numbers)

    def to_dict(self) -> dict[str, Any]:
        """Return every field, and ``model_type`` and ``hidden_size`` for other readers."""
        return {"model_type": MODEL_TYPE, "hidden_size": self.hidden_size, **asdict(self)}

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> QwenVisionConfig:
        """Read ``config.json`` of a directory that ``visproj extract`` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it does not hold such a config.
        """
        path = Path(directory, CONFIG_NAME)
        if not path.is_file():
            raise FileNotFoundError(
                f"no {CONFIG_NAME} in {directory}: extract the encoder from its checkpoint first, "
                "with `visproj extract`"
            )
        try:
            return cls.from_dict(read_json_object(path))
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error

    def save(self, directory: str | Path) -> None:
        """Write ``config.json`` into a directory."""
        write_json(Path(directory, CONFIG_NAME), self.to_dict())


def preprocessor_settings(config: QwenVisionConfig) -> dict[str, Any]:
    """Return the settings of transformers' ``CLIPImageProcessor`` for an encoder.

    The shorter side is resized bicubically to ``image_size`` and the centre cut out; pixels are
    normalised by CLIP's mean and deviation.

    Source: DeepSpeed-VisualChat ``helper/qwen_clip/preprocessor_config.json``.
    """
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": config.image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def _is_finite_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
