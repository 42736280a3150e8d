"""Recognition of other models' resamplers and projectors by names, types and shapes inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visproj.clip import ACTIVATIONS, CLIPMLP, CLIPAttention, CLIPEncoderLayer, VisionConfig
from visproj.errors import InputError
from visproj.projectors import LinearProjector, PerceiverProjector, ViTProjector
from visproj.projectors.aria import AriaProjector
from visproj.projectors.kosmos2 import Kosmos2Projection
from visproj.projectors.resamplers import MiniCPM2Resampler, MiniCPMResampler, QwenVLResampler

PROJECTORS = (
    LinearProjector,
    ViTProjector,
    PerceiverProjector,
    QwenVLResampler,
    MiniCPMResampler,
    MiniCPM2Resampler,
    AriaProjector,
    Kosmos2Projection,
)
# Containers that replace those of transformers. Every other child is reused as it is.
CLIP = (CLIPEncoderLayer, CLIPAttention, CLIPMLP)


class Kind(NamedTuple):
    """A kind of module that visproj recognises.

    Attributes:
        name: Name in messages.
        children: The names of its children.
        build: Builds visproj's module of the same sizes.
        parameters: The names of its own parameters, ``None`` for any.
        inside: The names of the children of a child, by child.
        containers: Children that may be of any class, because only what they hold is checked.
        buffers: Buffers that it may have.
    """

    name: str
    children: frozenset[str]
    build: Callable[[Any], nn.Module]
    parameters: frozenset[str] | None = None
    inside: Mapping[str, frozenset[str]] = {}
    containers: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()

    def fits(self, module: nn.Module) -> bool:
        """Return whether ``module`` has children and parameters of these names."""
        if _names(module) != self.children:
            return False
        if self.parameters is not None and not self.parameters <= set(module._parameters):
            return False
        return all(_names(module.get_submodule(name)) >= of for name, of in self.inside.items())


def _names(module: nn.Module) -> set[str]:
    return {name for name, child in module._modules.items() if child is not None}


def kind_of(name: str, module: nn.Module) -> Kind | None:
    """Return the kind that ``module`` is built like, or ``None``; ``name`` is its child name."""
    for kind in KINDS:
        if kind.fits(module):
            return kind
    if name == "projection" and type(module) is nn.Sequential and len(module) == 2:
        linear, norm = module
        if hasattr(linear, "in_features") and isinstance(norm, nn.LayerNorm):
            return _BASELINE
    return None


def counterpart(kind: Kind, module: nn.Module) -> nn.Module:
    """Build visproj's module for a module of this kind, on the meta device.

    Raises:
        ValueError: If ``module`` differs from this kind; the message says where.
    """
    with torch.device("meta"):
        try:
            ours = kind.build(module)
        except (AttributeError, TypeError) as error:  # a layer of another type, or None
            raise InputError(f"it is built of other layers ({error})") from error
    _check_types(kind, module, ours)
    _check_shapes(kind, module, ours)
    return ours


def _check_types(kind: Kind, module: nn.Module, ours: nn.Module) -> None:
    """Raise unless every module inside has exactly the type of its counterpart in ``ours``."""
    for name, wanted in ours.named_modules():
        if not name or name in kind.containers or isinstance(wanted, CLIP):
            continue
        try:
            found = module.get_submodule(name)
        except AttributeError as error:
            raise InputError(f"it has no {name}") from error
        if type(found) is not type(wanted) and not _is_attention(name, found, ours):
            raise InputError(
                f"its {name} is a {type(found).__module__}.{type(found).__qualname__}, not a plain "
                f"{type(wanted).__name__}"
            )


def _is_attention(name: str, found: nn.Module, ours: nn.Module) -> bool:
    """Return whether it is a subclass of ``nn.MultiheadAttention``, or the output Linear of one.

    Such a subclass is replaced: MiniCPM-V has one whose ``out_proj`` is an ordinary Linear.
    Additional parameters are found by the check of shapes.
    """
    if isinstance(ours.get_submodule(name), nn.MultiheadAttention):
        return isinstance(found, nn.MultiheadAttention)
    parent, _, last = name.rpartition(".")
    inside = isinstance(ours.get_submodule(parent), nn.MultiheadAttention)
    return inside and last == "out_proj" and type(found) is nn.Linear


def _check_shapes(kind: Kind, module: nn.Module, ours: nn.Module) -> None:
    """Raise if parameters differ from ours in name, shape or order, or for unknown buffers."""
    found, wanted = _shapes(module), _shapes(ours)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise InputError(
                f"its {name} is {found.get(name, 'absent')}, but should be "
                f"{wanted.get(name, 'absent')}"
            )
    if list(found) != list(wanted):
        pairs = zip(found, wanted, strict=True)
        theirs, expected = next(pair for pair in pairs if pair[0] != pair[1])
        raise InputError(f"its layers come in another order: {theirs}, but {expected} was expected")
    names = [name for name, _ in module.named_buffers() if name not in kind.buffers]
    if names:
        raise InputError(f"it has a buffer that was not expected, {names[0]}")


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    """Return the shape of every parameter, in order."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: list(_shape(parameter)) for name, parameter in named}


def _shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, even if ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _baseline(module: Any) -> nn.Module:
    return LinearProjector(module[0].in_features, module[0].out_features)


def _vit(module: Any) -> nn.Module:
    if getattr(module.vis_layer, "gradient_checkpointing", False):
        raise InputError("its vis_layer uses gradient checkpointing, which ours does not support")
    attention, mlp = module.vis_layer.self_attn, module.vis_layer.mlp
    linear = module.projection[0]
    config = VisionConfig(
        hidden_size=linear.in_features,
        intermediate_size=mlp.fc1.out_features,
        num_attention_heads=attention.num_heads,
        hidden_act=_activation(mlp.activation_fn),
        layer_norm_eps=1e-5,  # not used: the LayerNorms themselves are reused
        attention_dropout=attention.dropout,
    )
    return ViTProjector(config, linear.out_features)


def _activation(function: Callable[[Tensor], Tensor]) -> str:
    """Return the name of an activation, found by what it computes."""
    probe = torch.linspace(-4, 4, 33, device="cpu")
    for name, ours in ACTIVATIONS.items():
        # Two forms of one activation differ by roundings, two activations by 1e-3 and more.
        if torch.allclose(function(probe), ours(probe), rtol=1e-5, atol=1e-5):
            return name
    raise InputError(f"its activation is none of {', '.join(ACTIVATIONS)}")


def _square(queries: int) -> tuple[int, int]:
    side = math.isqrt(queries)
    return side, side


def _perceiver(module: Any) -> nn.Module:
    queries, width = _shape(module.query)
    return PerceiverProjector(
        module.kv_proj.in_features,
        width,
        query_grid=_square(queries),
        num_heads=module.attn.num_heads,
    )


def _attending(module: Any) -> dict[str, Any]:
    """Return the arguments that Qwen-VL's and MiniCPM-V's resamplers have in common."""
    width = _shape(module.query)[1]
    bare = type(module.kv_proj) is nn.Identity
    return {
        "vis_dim": width if bare else module.kv_proj.in_features,
        "embed_dim": width,
        "num_heads": module.attn.num_heads,
        "eps": module.ln_kv.eps,
    }


def _qwen_vl(module: Any) -> nn.Module:
    return QwenVLResampler(**_attending(module), query_grid=_square(_shape(module.query)[0]))


def _minicpm(module: Any) -> nn.Module:
    if "pos_embed" in module._parameters:
        return MiniCPM2Resampler(
            **_attending(module),
            query_grid=_square(_shape(module.query)[0]),
            adaptive=bool(getattr(module, "adaptive", False)),
        )
    table = module.pos_embed
    width = _shape(module.query)[1]
    if not isinstance(table, Tensor) or table.ndim != 3 or table.shape[2] != width:
        raise InputError(f"its pos_embed is not a table [rows, columns, {width}]")
    queries = _shape(module.query)[0]
    # max_size is not used: the table itself is reused.
    return MiniCPMResampler(**_attending(module), num_queries=queries, max_size=(1, 1))


def _aria(module: Any) -> nn.Module:
    rows, width = _shape(module.query)
    return AriaProjector(
        width,
        module.feed_forward.linear_out.out_features,
        patch_to_query_dict=module.patch_to_query_dict,
        num_heads=module.cross_attn.multihead_attn.num_heads,
        num_queries=rows,
        hidden=module.feed_forward.linear_in.out_features,
    )


def _kosmos2(module: Any) -> nn.Module:
    rows, width = _shape(module.latent_query)
    if getattr(module.x_attn, "inner_attn_ln", None) is not None:
        raise InputError("its x_attn has an inner_attn_ln")
    return Kosmos2Projection(
        module.dense.in_features, width, num_queries=rows, num_heads=module.x_attn.num_heads
    )


_ATTENDING = frozenset({"kv_proj", "attn", "ln_q", "ln_kv"})
_PROJECTIONS = frozenset({"q_proj", "k_proj", "v_proj"})
_BASELINE = Kind("DeepSpeed-VisualChat's baseline projector", frozenset({"0", "1"}), _baseline)
KINDS = (
    Kind(
        "DeepSpeed-VisualChat's perceiver projector",
        _ATTENDING | {"projection"},
        _perceiver,
    ),
    Kind(
        "DeepSpeed-VisualChat's vit projector",
        frozenset({"vis_layer", "projection"}),
        _vit,
        inside={"vis_layer": frozenset({"self_attn", "layer_norm1", "mlp", "layer_norm2"})},
    ),
    Kind(
        "Qwen-VL's resampler",
        _ATTENDING,
        _qwen_vl,
        frozenset({"query", "pos_embed"}),
    ),
    Kind(
        "MiniCPM-V's resampler",
        _ATTENDING | {"ln_post"},
        _minicpm,
        frozenset({"query", "proj"}),
        buffers=("pos_embed", "temporal_pos_embed"),
    ),
    Kind(
        "Aria's projector",
        frozenset({"cross_attn", "layer_norm", "feed_forward"}),
        _aria,
        frozenset({"query"}),
        inside={
            "cross_attn": _PROJECTIONS | {"multihead_attn", "linear", "layer_norm_kv"},
            "feed_forward": frozenset({"linear_in", "linear_out"}),
        },
        containers=("cross_attn", "feed_forward", "feed_forward.act"),
    ),
    Kind(
        "Kosmos-2's projection",
        frozenset({"dense", "x_attn"}),
        _kosmos2,
        frozenset({"latent_query"}),
        inside={"x_attn": _PROJECTIONS | {"out_proj"}},
        containers=("x_attn",),
    ),
)
