"""Small projectors with noise in every weight, inputs for them, and an error measure."""

from types import SimpleNamespace

import torch
from torch import nn

from visproj import PerceiverProjector, build_projector
from visproj.fusion import why_not_plain
from visproj.progress import Progress

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


def small(kind, dtype=torch.float64, device="cpu"):
    """The smallest of a kind, attention logits of order 1.

    Where a softmax is almost one key, the gradients behind it nearly cancel.
    """
    if kind != "perceiver":
        return make(kind, dtype=dtype, device=device)
    projector = make(kind, dtype=dtype, device=device, query_grid=(4, 4), num_heads=2)
    with torch.no_grad():
        projector.attn.in_proj_weight[: 2 * projector.embed_dim] *= 0.25
    return projector


def children_called(projector, x):
    """Upstream's forward, every child called; attention as its formula where it is torch's."""
    children = dict(projector.named_children())
    if "kv_proj" not in children:
        for child in children.values():
            x = child(x)
        return x
    y = projector.ln_kv(projector.kv_proj(x[:, 1:])).transpose(0, 1)
    pos = projector.pos_embed[:, None]
    q = projector.ln_q(projector.query)[:, None].repeat(1, y.shape[1], 1) + pos
    attend = attention if type(projector.attn) is nn.MultiheadAttention else called_attention
    return projector.projection(attend(projector.attn, q, y + pos, y))


def called_attention(module, q, k, v):
    return module(q, k, v)[0].transpose(0, 1)


def attention(module, q, k, v):
    """``[tokens, B, D] -> [B, Q, D]``, the output's Linear called, which torch only reads."""
    weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    q, k, v = (
        nn.functional.linear(t, w, b).unflatten(-1, (module.num_heads, -1)).permute(1, 2, 0, 3)
        for t, w, b in zip((q, k, v), weights, biases, strict=True)
    )
    out = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    return module.out_proj(out)


def features(batch, tokens, width=32, dtype=torch.float64, device="cpu"):
    return torch.randn(batch, tokens, width, dtype=torch.float64).to(device=device, dtype=dtype)


def is_plain(child, kind):
    """Whether a module that holds ``child`` may read it."""
    holder = nn.Module()
    holder.child = child
    children = {f"child.{name}": type(module) for name, module in child.named_children()}
    return why_not_plain(holder, {"child": kind, **children}) is None


class Recorder(Progress):
    """Keeps what it receives: stages, and for every step the number of stages begun."""

    def __init__(self):
        self.stages, self.advances, self.notes = [], [], []

    def stage(self, name, total=0, done=0):
        self.stages.append((name, total, done))

    def advance(self, note=""):
        self.advances.append(len(self.stages))
        self.notes.append(note)

    def note(self, text):
        self.notes.append(text)
