"""The table of the encoder's tensors, and their names in a full Qwen-VL checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping

from visproj.contents import a_few, bare_key, compare_shapes
from visproj.errors import InputError
from visproj.qwen_vl.config import QwenVisionConfig

Shape = tuple[int, ...]

PREFIX = "transformer.visual."
DROPPED = "proj"  # Qwen-VL's last matmul, which DeepSpeed-VisualChat's projector replaces
ASSUMED_HEADS = 16
ASSUMED_IMAGE_PATCHES = 32

_TABLE: dict[str, tuple[int | str, ...]] = {
    "conv1.weight": ("width", 3, "patch_size", "patch_size"),
    "positional_embedding": ("positions", "width"),
    "ln_pre.weight": ("width",),
    "ln_pre.bias": ("width",),
    "attn_pool.query": ("n_queries", "output_dim"),
    "attn_pool.pos_embed": ("n_queries", "output_dim"),
    "attn_pool.kv_proj.weight": ("output_dim", "width"),  # absent if both widths are equal
    "attn_pool.attn.in_proj_weight": ("3 output_dim", "output_dim"),
    "attn_pool.attn.in_proj_bias": ("3 output_dim",),
    "attn_pool.attn.out_proj.weight": ("output_dim", "output_dim"),
    "attn_pool.attn.out_proj.bias": ("output_dim",),
    "attn_pool.ln_q.weight": ("output_dim",),
    "attn_pool.ln_q.bias": ("output_dim",),
    "attn_pool.ln_kv.weight": ("output_dim",),
    "attn_pool.ln_kv.bias": ("output_dim",),
    "ln_post.weight": ("output_dim",),
    "ln_post.bias": ("output_dim",),
}
_BLOCK_TABLE: dict[str, tuple[int | str, ...]] = {
    "ln_1.weight": ("width",),
    "ln_1.bias": ("width",),
    "ln_2.weight": ("width",),
    "ln_2.bias": ("width",),
    "attn.in_proj.weight": ("3 width", "width"),
    "attn.in_proj.bias": ("3 width",),
    "attn.out_proj.weight": ("width", "width"),
    "attn.out_proj.bias": ("width",),
    "mlp.c_fc.weight": ("mlp_width", "width"),
    "mlp.c_fc.bias": ("mlp_width",),
    "mlp.c_proj.weight": ("width", "mlp_width"),
    "mlp.c_proj.bias": ("width",),
}


def expected_shapes(config: QwenVisionConfig) -> dict[str, Shape]:
    """Return the name and shape of every tensor of an encoder, in the order of writing."""
    sizes = {
        "3 width": 3 * config.width,
        "3 output_dim": 3 * config.output_dim,
        **{
            name: getattr(config, name)
            for name in ("width", "patch_size", "positions", "n_queries", "output_dim", "mlp_width")
        },
    }

    def resolve(table: Mapping[str, tuple[int | str, ...]], prefix: str) -> dict[str, Shape]:
        return {
            prefix + name: tuple(sizes[n] if isinstance(n, str) else n for n in shape)
            for name, shape in table.items()
        }

    shapes = resolve(_TABLE, "")
    if config.width == config.output_dim:
        del shapes["attn_pool.kv_proj.weight"]
    for layer in range(config.layers):
        shapes |= resolve(_BLOCK_TABLE, f"transformer.resblocks.{layer}.")
    return shapes


def encoder_key(key: str) -> str | None:
    """Return the encoder's name for a checkpoint key; ``None`` for a tensor that it does not have.

    ``transformer.visual.`` and everything before it, such as ``module.``, is removed, and so are
    the prefixes of wrapped children. A key that contains ``visual`` without this prefix is returned
    unchanged.
    """
    if "visual" not in key:
        return None
    _, prefix, name = bare_key(key).partition(PREFIX)
    if not prefix:
        return key
    return None if name.split(".")[0] == DROPPED else name


def checkpoint_key(name: str, wrapper: str = "") -> str:
    """Return the checkpoint key of a name: ``wrapper + "transformer.visual." + name``."""
    return f"{wrapper}{PREFIX}{name}"


def config_from_shapes(shapes: Mapping[str, Shape]) -> QwenVisionConfig:
    """Return the architecture that the shapes of an encoder's tensors determine.

    They determine neither the number of heads, assumed to be 16, nor the side of the image, assumed
    to be 32 patches.

    Raises:
        ValueError: If a tensor that a number is read from is missing or has another rank.
    """

    def shape_of(name: str, ndim: int) -> Shape:
        if name not in shapes:
            raise InputError(
                f"cannot determine the architecture without {name}; there are {a_few(shapes)}"
            )
        if len(shapes[name]) != ndim:
            raise InputError(f"{name} must have {ndim} dimensions, got {list(shapes[name])}")
        return shapes[name]

    width, _, patch_size, _ = shape_of("conv1.weight", 4)
    positions, _ = shape_of("positional_embedding", 2)
    mlp_width, _ = shape_of("transformer.resblocks.0.mlp.c_fc.weight", 2)
    n_queries, output_dim = shape_of("attn_pool.query", 2)
    numbered = (re.match(r"transformer\.resblocks\.(\d+)\.", name) for name in shapes)
    return QwenVisionConfig(
        image_size=ASSUMED_IMAGE_PATCHES * patch_size,
        patch_size=patch_size,
        width=width,
        layers=len({match[1] for match in numbered if match}),
        heads=ASSUMED_HEADS,
        mlp_width=mlp_width,
        output_dim=output_dim,
        n_queries=n_queries,
        positions=positions,
    )


def check_shapes(found: Mapping[str, Shape], config: QwenVisionConfig) -> None:
    """Raise ``ValueError`` naming missing, unexpected and misshapen tensors, if there are any."""
    compare_shapes(found, expected_shapes(config), "the encoder that the config describes")
