"""Small projectors with noise in every weight, inputs for them, and an error measure."""

from types import SimpleNamespace

import torch

from visproj import PerceiverProjector, build_projector

VIS_CONFIG = SimpleNamespace(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    attention_dropout=0.0,
)


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
