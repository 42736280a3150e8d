"""Plain modules with upstream's arithmetic, and error measures."""

from types import SimpleNamespace

import torch
from torch import nn

from visproj import PerceiverProjector, build_projector
from visproj.positions import sincos_position_table

VIS_CONFIG = SimpleNamespace(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    attention_dropout=0.0,
)


class EagerPerceiver(nn.Module):
    """DeepSpeed-VisualChat's arithmetic: queries repeated, ``nn.MultiheadAttention`` with maps."""

    def __init__(self, vis_dim, lang_dim, heads, grid=(16, 16)):
        super().__init__()
        self.pos_embed = nn.Parameter(sincos_position_table(lang_dim, grid), requires_grad=False)
        self.query = nn.Parameter(torch.zeros(grid[0] * grid[1], lang_dim))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.kv_proj = nn.Linear(vis_dim, lang_dim)
        self.attn = nn.MultiheadAttention(lang_dim, heads)
        self.ln_q = nn.LayerNorm(lang_dim, eps=1e-12)
        self.ln_kv = nn.LayerNorm(lang_dim, eps=1e-12)
        self.projection = nn.Sequential(
            nn.LayerNorm(lang_dim, eps=1e-12), nn.Linear(lang_dim, lang_dim)
        )
        self.apply(self._init)

    @staticmethod
    def _init(module):
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.constant_(module.bias, 0)

    def forward(self, x, **masks):
        y = self.ln_kv(self.kv_proj(x[:, 1:])).transpose(0, 1)
        q = self.ln_q(self.query)[:, None].repeat(1, y.shape[1], 1) + self.pos_embed[:, None]
        out = self.attn(q, y + self.pos_embed[:, None], y, **masks)[0]
        return self.projection(out.transpose(0, 1))


def rms_error(got, truth):
    """``rms(got - truth) / rms(truth)`` in fp64."""
    got, truth = got.double(), truth.double()
    return ((got - truth).square().mean() / truth.square().mean()).sqrt().item()


def randomise(module, scale=0.3):
    """Fill every trainable parameter with noise, so that no gain is 1 and no bias 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return module


def make(kind, lang_dim=64, dtype=torch.float64, device="cpu", **options):
    """A small projector with noise in every weight."""
    if options:
        projector = PerceiverProjector(VIS_CONFIG, lang_dim, **options)
    else:
        projector = build_projector(kind, VIS_CONFIG, lang_dim)
    return randomise(projector).to(device=device, dtype=dtype)


def features(batch, tokens, width=32, dtype=torch.float64, device="cpu"):
    return torch.randn(batch, tokens, width, dtype=torch.float64).to(device=device, dtype=dtype)
