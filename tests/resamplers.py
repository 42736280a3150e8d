"""Resamplers of other models in small, with noise in every weight, and calls that they get."""

import torch
from helpers import randomise
from torch import nn
from transformers import AriaConfig, Kosmos2Config
from transformers.models.aria.modeling_aria import AriaProjector
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ImageToTextProjection

from benchmarks.published import MiniCPM, MiniCPM2, OwnAttention, QwenVL

PATCHES = {12: 3, 20: 5}


def aria_config():
    return AriaConfig(
        vision_config={
            "model_type": "idefics3_vision",
            "hidden_size": 24,
            "num_attention_heads": 4,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "image_size": 12,
            "patch_size": 3,
        },
        text_config={
            "model_type": "aria_text",
            "hidden_size": 40,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "moe_num_experts": 2,
            "moe_topk": 1,
            "vocab_size": 99,
            "pad_token_id": 0,
        },
        projector_patch_to_query_dict={**PATCHES, 16: 4},
        image_token_index=7,
    )


def kosmos2_config(implementation="sdpa"):
    config = Kosmos2Config(
        vision_config={
            "hidden_size": 24,
            "num_attention_heads": 4,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "image_size": 12,
            "patch_size": 3,
        },
        text_config={
            "embed_dim": 32,
            "attention_heads": 4,
            "ffn_dim": 16,
            "layers": 1,
            "vocab_size": 99,
        },
        latent_query_num=5,
    )
    config._attn_implementation = implementation
    config.text_config._attn_implementation = implementation
    return config


def kosmos2_projection(implementation):
    projection = Kosmos2ImageToTextProjection(kosmos2_config(implementation))
    not_causal(projection)
    return projection


def not_causal(projection):
    """What transformers before 5 forgets to say."""
    projection.x_attn.is_causal = False


MAKERS = {
    "qwen-vl": QwenVL,
    "qwen-vl, widths agree": lambda: QwenVL(32, 32),
    "minicpm-v-1.0": lambda: MiniCPM2(adaptive=False),
    "minicpm-v-2.0": MiniCPM2,
    "minicpm-v-2.6": MiniCPM,
    "minicpm-v-2.6, own attention": lambda: MiniCPM(attention=OwnAttention),
    "minicpm-v-2.6, widths agree": lambda: MiniCPM(32, 32),
    "minicpm-v-4.5": lambda: MiniCPM(temporal=50),
    "aria": lambda: AriaProjector(aria_config()),
    "kosmos-2": lambda: kosmos2_projection("sdpa"),
    "kosmos-2, eager": lambda: kosmos2_projection("eager"),
}
# Their tables are resized in fp32, before or after a product: 1e-6 instead of 1e-12.
RESIZED = ("qwen-vl", "qwen-vl, widths agree", "minicpm-v-1.0")


def published(name, dtype=torch.float64):
    """A module as its model has it."""
    module = randomise(MAKERS[name]()).eval()
    if name.startswith("minicpm") and not hasattr(module, "adaptive"):
        module.to(dtype)
        module.pos_embed = module.pos_embed.float().to(dtype)
        return module
    return module.to(dtype)


def calls(name, dtype=torch.float64):
    """Arguments of some calls, the shortest first."""
    width = 32 if name.endswith("widths agree") else 24
    images = [torch.randn(2, length, width, dtype=dtype) for length in (12, 16, 20)]
    if name.startswith("qwen-vl"):
        mask = torch.zeros(9, 16, dtype=torch.bool)
        mask[:, 5:9] = True
        return [(images[1],), (images[1], mask), (torch.randn(2, 9, width, dtype=dtype),)]
    if name in ("minicpm-v-1.0", "minicpm-v-2.0"):
        return [(images[0], (3, 4)), (images[2], (10, 2))]
    if name.startswith("minicpm"):
        sizes = [[[3, 4], [4, 3]], [[4, 4], [3, 3]], [[2, 10], [1, 7]], [[3, 4], [3, 4]]]
        found = [
            (x, torch.tensor(size, dtype=torch.int32))
            for x, size in zip([*images, images[0]], sizes, strict=True)
        ]
        if name.endswith("4.5"):
            found += [(*found[0], [[-1], [-1]]), (*found[2], [[3, 49]]), (*found[1], [[-1], [8]])]
        return found
    if name == "aria":
        mask = torch.zeros(2, 20, dtype=torch.bool)
        mask[1, 9:] = True
        return [(images[0],), (images[2], mask)]
    return [(images[0],), (images[2],)]


def output(found):
    """The features among what a call gave."""
    return found[0] if isinstance(found, tuple) else found


def state(module: nn.Module):
    return {name: value.clone() for name, value in module.state_dict().items()}
