"""Models built as DeepSpeed-VisualChat builds them, without its code."""

import inspect

from helpers import VIS_CONFIG, randomise
from torch import nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from benchmarks.peers import UpstreamPerceiver

KINDS = ("baseline", "vit", "perceiver")


class UpstreamVit(nn.Module):
    """A transformers CLIP layer, Linear and LayerNorm."""

    def __init__(self, lang_dim, **changes):
        super().__init__()
        config = CLIPVisionConfig(**{**vars(VIS_CONFIG), **changes})
        config._attn_implementation = "sdpa"
        self.vis_layer = CLIPEncoderLayer(config)
        self.projection = nn.Sequential(
            nn.Linear(config.hidden_size, lang_dim), nn.LayerNorm(lang_dim, eps=1e-12)
        )

    def forward(self, x):
        # transformers 4 has one argument more, and returns a tuple
        arguments = inspect.signature(self.vis_layer.forward).parameters
        masks = [name for name in arguments if name.endswith("attention_mask")]
        out = self.vis_layer(x, **dict.fromkeys(masks))
        return self.projection(out[0] if isinstance(out, tuple) else out)


def upstream_projector(kind, lang_dim=64, **changes):
    if kind == "vit":
        return UpstreamVit(lang_dim, **changes)
    if kind == "perceiver":
        return UpstreamPerceiver(32, lang_dim, heads=2, grid=(4, 4))
    return nn.Sequential(nn.Linear(32, lang_dim), nn.LayerNorm(lang_dim, eps=1e-12))


class UpstreamModel(nn.Module):
    """Its attributes' names, with Linears for the encoder and the language model."""

    def __init__(self, kind, **changes):
        super().__init__()
        self.vis_encoder = nn.Linear(32, 32)
        self.lang_decoder = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))  # no projector
        self.projection = upstream_projector(kind, **changes)
        randomise(self).double()

    def forward(self, x):
        return self.lang_decoder(self.projection(self.vis_encoder(x)))
