"""Resamplers of released models, published, converted and folded, at their released sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.model import CPU_ATTENTION
from benchmarks.published import Holder, MiniCPM, QwenVL
from visproj import convert, fold


class Model(NamedTuple):
    """A model whose resampler is compared.

    Attributes:
        build: Builds the published module with random weights.
        images: Default number of images per call.
        tokens: Visual tokens per image.
        width: Width of the features.
        sized: Whether a call passes the grid of each image.
    """

    build: Callable[[], nn.Module]
    images: int
    tokens: int
    width: int
    sized: bool = False


def _aria() -> nn.Module:
    from transformers import AriaConfig
    from transformers.models.aria.modeling_aria import AriaProjector

    vision = {"model_type": "idefics3_vision", "hidden_size": 1152, "num_attention_heads": 16}
    config = AriaConfig(
        vision_config=vision,
        text_config={"hidden_size": 2560},
        projector_patch_to_query_dict={1225: 128, 4900: 256},
    )
    projector = AriaProjector(config)
    nn.init.trunc_normal_(projector.query, std=0.02)
    return projector


def _kosmos2() -> nn.Module:
    from transformers import Kosmos2Config
    from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ImageToTextProjection

    config: Any = Kosmos2Config()
    config.text_config._attn_implementation = "sdpa"
    return Kosmos2ImageToTextProjection(config)


def _with_queries(module: nn.Module) -> nn.Module:
    """Draw random queries, which start as zeros in the published module."""
    nn.init.trunc_normal_(module.get_parameter("query"), std=0.02)
    return module


MODELS: dict[str, Model] = {
    "minicpm-v-2.6": Model(
        lambda: _with_queries(MiniCPM(1152, 3584, 64, 28, max_size=(70, 70))), 2, 1024, 1152, True
    ),
    "qwen-vl": Model(lambda: _with_queries(QwenVL(1664, 4096, 256, 32)), 2, 1024, 1664),
    "aria": Model(_aria, 2, 1225, 1152),
    "kosmos-2": Model(_kosmos2, 4, 257, 1024),
}
FORMS = ("published", "converted", "keys", "absorbed")


def modules(name: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return modules with the same weights: published, converted, and in both folded forms."""
    torch.manual_seed(0)
    published = MODELS[name].build().to(dtype).eval()
    holder = Holder(published)
    convert(holder)
    folded = {form: fold(holder.resampler, form=form) for form in FORMS[2:]}
    return {"published": published, "converted": holder.resampler, **folded}


def chosen(name: str) -> str:
    """Return the form that :func:`visproj.fold` chooses by default."""
    holder = Holder(MODELS[name].build().eval())
    convert(holder, fold=True)
    folded: Any = holder.resampler
    return folded.config["form"]


def arguments(name: str, images: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return the arguments of a call."""
    model = MODELS[name]
    x = torch.randn(images, model.tokens, model.width).to(dtype)
    if not model.sized:
        return (x,)
    side = math.isqrt(model.tokens)
    return x, torch.full((images, 2), side, dtype=torch.int32)


def multiply_adds(module: nn.Module, call: tuple[Tensor, ...]) -> float:
    """Count the multiply-adds of one call by running it: published modules read image sizes."""
    # The counter's hooks need an autograd graph.
    with (
        torch.enable_grad(),
        FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter,
    ):
        module(*call)
    return counter.get_total_flops() / 2


def features(found: Any) -> Tensor:
    """Return the features from the result of a call."""
    return found[0] if isinstance(found, tuple) else found
