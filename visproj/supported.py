"""The models whose projectors and resamplers are recognised, and what folding them saves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from visproj.folding.files import empty_folded
from visproj.folding.key_values import choose_form
from visproj.projectors import PerceiverProjector
from visproj.projectors.aria import AriaProjector
from visproj.projectors.kosmos2 import Kosmos2Projection
from visproj.projectors.resamplers import MiniCPM2Resampler, MiniCPMResampler, QwenVLResampler


class Supported(NamedTuple):
    """A released model.

    Attributes:
        build: Builds its resampler with random weights.
        grid: Rows and columns of the features of one image, without CLS.
        has_cls: Whether a CLS token comes before them.
        folded: Name of the folded class.
    """

    build: Callable[[], Any]
    grid: tuple[int, int]
    has_cls: bool
    folded: str


_ARIA = {1225: 128, 4900: 256}

# Widths, heads and queries are those of the released configurations.
MODELS: dict[str, Supported] = {
    "DeepSpeed-VisualChat": Supported(
        lambda: PerceiverProjector(1024, 4096), (16, 16), True, "FoldedPerceiver"
    ),
    "Qwen-VL": Supported(lambda: QwenVLResampler(1664, 4096), (32, 32), False, "FoldedPerceiver"),
    "MiniCPM-V-2.0": Supported(
        lambda: MiniCPM2Resampler(1152, 2304), (32, 32), False, "FoldedMiniCPM2"
    ),
    "MiniCPM-V-2.5": Supported(
        lambda: MiniCPMResampler(1152, 4096, num_queries=96), (32, 32), False, "FoldedMiniCPM"
    ),
    "MiniCPM-V-2.6": Supported(
        lambda: MiniCPMResampler(1152, 3584), (32, 32), False, "FoldedMiniCPM"
    ),
    "MiniCPM-V-4.0": Supported(
        lambda: MiniCPMResampler(1152, 2560), (32, 32), False, "FoldedMiniCPM"
    ),
    "MiniCPM-V-4.5": Supported(
        lambda: MiniCPMResampler(1152, 4096), (32, 32), False, "FoldedMiniCPM"
    ),
    "Aria": Supported(
        lambda: AriaProjector(1152, 2560, patch_to_query_dict=_ARIA, num_heads=16),
        (35, 35),
        False,
        "FoldedAria",
    ),
    "Kosmos-2": Supported(
        lambda: Kosmos2Projection(1024, 2048, num_heads=32), (16, 16), True, "FoldedKosmos2"
    ),
}


class Counted(NamedTuple):
    """Multiply-adds for one image.

    Attributes:
        published: Multiply-adds of the converted module, which computes what its model computes.
        folded: Multiply-adds of the folded module.
        form: Form of the folded module, ``"keys"`` or ``"absorbed"``.
    """

    published: int
    folded: int
    form: str


def count(model: Supported) -> Counted:
    """Count the multiply-adds for one image on the meta device, without computing values."""
    with torch.device("meta"):
        resampler = model.build()
        tokens = math.prod(model.grid) + model.has_cls
        x = torch.empty(1, tokens, resampler.vis_dim)
    folded = empty_folded(model.folded, empty_config(model))
    return Counted(_multiply_adds(resampler, x), _multiply_adds(folded, x), folded.config["form"])


def _multiply_adds(module: nn.Module, x: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.requires_grad_(False).eval()(x)
    return counter.get_total_flops() // 2


def empty_config(model: Supported) -> dict[str, Any]:
    """Return the configuration that :func:`visproj.fold` would write, with placeholder scales."""
    with torch.device("meta"):
        resampler = model.build()
    heads, queries = resampler.num_heads, math.prod(resampler.query_grid)
    aria, kosmos2 = (isinstance(resampler, kind) for kind in (AriaProjector, Kosmos2Projection))
    width = resampler.embed_dim
    length = math.prod(model.grid)
    sizes = {"width": resampler.vis_dim, "lang_dim": width, "queries": queries, "heads": heads}
    config: dict[str, Any] = {
        "vis_dim": resampler.vis_dim,
        "lang_dim": width,
        "num_heads": heads,
        "query_grid": list(resampler.query_grid),
        "has_cls": resampler.has_cls,
        "form": choose_form(None, length=length, **sizes),
        "floor": None if aria or kosmos2 else 0.0,
        "eps": 1e-5 if aria else None,
        "grid": list(model.grid),
        "table": list(model.grid),
        "separable": True,
        "out_floor": None if type(resampler) is QwenVLResampler else 0.0,
    }
    if aria:
        config["hidden"] = config["out_dim"] = resampler.feed_forward.linear_in.out_features
        config["query_counts"] = [list(pair) for pair in resampler.patch_to_query_dict.items()]
    if kosmos2:
        config["gives_attention"] = False
    return config


def describe_models() -> Iterator[str]:
    """Yield a table with one line per model: GMACs per image before and after folding, form."""
    yield "model                  GMACs per image   folded   times fewer   form"
    for name, model in MODELS.items():
        published, folded, form = count(model)
        yield (
            f"{name:<22} {published / 1e9:>15.2f} {folded / 1e9:>8.2f} "
            f"{published / folded:>13.2f}   {form}"
        )
