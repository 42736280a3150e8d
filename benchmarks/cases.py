"""The registry of benchmarks: tasks, implementations, and shapes.

A new implementation is one more :class:`Implementation` in ``IMPLEMENTATIONS``. Everything else,
the check against the oracle, the model, the timing and the report, follows from it.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from visproj import LinearProjector, PerceiverProjector, ViTProjector, fold, ops
from visproj.reference import linear_projector_ref, perceiver_projector_ref, vit_projector_ref

MODES = ("forward", "backward", "forward+backward")
# Forward replayed from a CUDA graph: only on request, only on a GPU.
GRAPH_MODE = "forward in a CUDA graph"
BASELINES = ("upstream", "fair")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
QUERY_GRID = (16, 16)


@dataclass(frozen=True)
class Encoder:
    """A vision encoder's features, ``[B, tokens, width]``, and the sizes of one of its layers."""

    name: str
    width: int
    tokens: int
    has_cls: bool
    heads: int
    mlp_width: int


ENCODERS = {
    encoder.name: encoder
    for encoder in (
        Encoder("tiny", 256, 65, True, 4, 1024),
        Encoder("clip-l-224", 1024, 257, True, 16, 4096),
        Encoder("clip-l-336", 1024, 577, True, 16, 4096),
        Encoder("bigg-256", 1664, 256, False, 16, 8192),
        Encoder("bigg-1024", 1664, 1024, False, 16, 8192),
        Encoder("qwen-256", 4096, 256, False, 32, 16384),
        Encoder("qwen-1024", 4096, 1024, False, 32, 16384),
    )
}


@dataclass(frozen=True)
class Shape:
    """The shape of a task: encoder, language-model width, images per call, name of the dtype."""

    encoder: Encoder
    lang_dim: int
    batch: int
    dtype: str

    @property
    def heads(self) -> int:
        """Number of heads of the Perceiver's attention, each 128 wide as in upstream."""
        return max(1, self.lang_dim // 128)

    @property
    def keys(self) -> int:
        """Visual tokens without CLS."""
        return self.encoder.tokens - self.encoder.has_cls

    @property
    def grid(self) -> tuple[int, int]:
        """The square that the visual tokens lie on."""
        return math.isqrt(self.keys), math.isqrt(self.keys)

    def __str__(self) -> str:
        return f"{self.encoder.name}-D{self.lang_dim}-B{self.batch}-{self.dtype}"


State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A function of inputs and weights, and its oracle.

    Attributes:
        name: Name in the report.
        reference: Builds the module whose weights every implementation gets.
        inputs: Returns the shapes of the inputs; the first dimension of each is the batch.
        oracle: Computes the output from a state dict and inputs in fp64. Images are independent of
            each other.
        input_gradients: Whether training needs gradients of the inputs. Features of a frozen
            encoder need none.
    """

    name: str
    reference: Callable[[Shape], nn.Module]
    inputs: Callable[[Shape], tuple[tuple[int, ...], ...]]
    oracle: Callable[[State, tuple[Tensor, ...], Shape], Tensor]
    input_gradients: bool = False


def _features(shape: Shape) -> tuple[tuple[int, ...], ...]:
    return ((shape.batch, shape.encoder.tokens, shape.encoder.width),)


def _keys_and_values(shape: Shape) -> tuple[tuple[int, ...], ...]:
    return ((shape.batch, shape.keys, shape.heads, shape.lang_dim // shape.heads),) * 2


def _vision_config(shape: Shape) -> Any:
    return SimpleNamespace(
        hidden_size=shape.encoder.width,
        intermediate_size=shape.encoder.mlp_width,
        num_attention_heads=shape.encoder.heads,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        attention_dropout=0.0,
    )


def _linear_and_norm(shape: Shape) -> nn.Module:
    width, lang_dim = shape.encoder.width, shape.lang_dim
    return nn.Sequential(nn.Linear(width, lang_dim), nn.LayerNorm(lang_dim, eps=1e-12))


def _linear_norm_linear(shape: Shape) -> nn.Module:
    lang_dim = shape.lang_dim
    return nn.Sequential(*_linear_and_norm(shape).children(), nn.Linear(lang_dim, lang_dim))


def _linear_norm_linear_oracle(state: State, inputs: tuple[Tensor, ...], _: Shape) -> Tensor:
    return linear_projector_ref(state, *inputs) @ state["2.weight"].T + state["2.bias"]


def _perceiver(kind: type[nn.Module]) -> Callable[[Shape], nn.Module]:
    def build(shape: Shape) -> nn.Module:
        encoder = shape.encoder
        return kind(encoder.width, shape.lang_dim, shape.heads, QUERY_GRID, has_cls=encoder.has_cls)

    return build


def _attention(kind: type[nn.Module]) -> Callable[[Shape], nn.Module]:
    return lambda shape: kind(math.prod(QUERY_GRID), shape.heads, shape.lang_dim // shape.heads)


def _perceiver_oracle(state: State, inputs: tuple[Tensor, ...], shape: Shape) -> Tensor:
    return perceiver_projector_ref(
        state,
        *inputs,
        num_heads=shape.heads,
        query_grid=QUERY_GRID,
        has_cls=shape.encoder.has_cls,
    )[0]


def _attention_oracle(state: State, inputs: tuple[Tensor, ...], shape: Shape) -> Tensor:
    q = state["queries"].transpose(0, 1)  # [H, Q, d]
    k, v = (x.transpose(1, 2) for x in inputs)  # [B, H, L, d]
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ v).transpose(1, 2)


TASKS = {
    task.name: task
    for task in (
        Task("baseline", _linear_and_norm, _features, lambda s, x, _: linear_projector_ref(s, *x)),
        Task(
            "vit",
            lambda shape: peers.FairViT(_vision_config(shape), shape.lang_dim),
            _features,
            lambda s, x, shape: vit_projector_ref(s, *x, num_heads=shape.encoder.heads),
        ),
        Task("perceiver", _perceiver(peers.FairPerceiver), _features, _perceiver_oracle),
        Task(
            "linear_layer_norm",
            _linear_and_norm,
            _features,
            lambda s, x, _: linear_projector_ref(s, *x),
        ),
        Task("linear_norm_linear", _linear_norm_linear, _features, _linear_norm_linear_oracle),
        Task(
            "cross_attention",
            _attention(peers.FairAttention),
            _keys_and_values,
            _attention_oracle,
            input_gradients=True,
        ),
    )
}


@dataclass(frozen=True)
class Implementation:
    """One way to compute a task.

    Attributes:
        task: Name of the task.
        name: ``upstream`` and ``fair`` are the baselines that speed-ups refer to.
        build: Builds the module for a shape; it then gets the task's weights by their keys.
        convert: Converts that module into a form with other keys, or ``None``.
        trains: Whether it has a backward.
        compiled: Whether it runs under ``torch.compile``.
        missing: Returns why it cannot run at a shape on a device, or ``None``.
    """

    task: str
    name: str
    build: Callable[[Shape], nn.Module]
    convert: Callable[[Any, Shape], nn.Module] | None = None
    trains: bool = True
    compiled: bool = False
    missing: Callable[[Shape, torch.device], str | None] = lambda shape, device: None


class _LinearLayerNormOp(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        linear: Any = self[0]
        norm: Any = self[1]
        return ops.linear_layer_norm(
            x, linear.weight, linear.bias, norm.weight, norm.bias, norm.eps
        )


class _LinearNormLinearOp(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        linear: Any = self[0]
        norm: Any = self[1]
        last: Any = self[2]
        first = (linear.weight, linear.bias, norm.weight, norm.bias, norm.eps)
        return ops.linear_norm_linear(x, *first, last.weight, last.bias)


class _CrossAttentionOp(peers.FairAttention):
    def forward(self, k: Tensor, v: Tensor) -> Tensor:
        return ops.cross_attention(self.queries, k, v)


def _linear_projector(shape: Shape) -> nn.Module:
    return LinearProjector(shape.encoder.width, shape.lang_dim)


def _vit_projector(shape: Shape) -> nn.Module:
    return ViTProjector(_vision_config(shape), shape.lang_dim)


def _perceiver_projector(shape: Shape) -> nn.Module:
    return PerceiverProjector(
        shape.encoder.width,
        shape.lang_dim,
        query_grid=QUERY_GRID,
        num_heads=shape.heads,
        has_cls=shape.encoder.has_cls,
    )


def _no_half_on_cpu(shape: Shape, device: torch.device) -> str | None:
    """Return why upstream's module is left out: in 16 bits on a CPU a call takes about a minute."""
    if device.type == "cpu" and shape.dtype != "fp32":
        return "upstream's module in 16 bits on a CPU is too slow for a fair comparison"
    return None


def _no_compiler(shape: Shape, device: torch.device) -> str | None:
    compilers = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        return "torch.compile needs a C++ compiler"
    return None


def _compiled_upstream_missing(shape: Shape, device: torch.device) -> str | None:
    return _no_half_on_cpu(shape, device) or _no_compiler(shape, device)


def _peers(
    task: str, upstream: Callable[[Shape], nn.Module], fair: Callable[[Shape], nn.Module]
) -> list[Implementation]:
    """Return both baselines, eager and under ``torch.compile``."""
    return [
        Implementation(task, "upstream", upstream, missing=_no_half_on_cpu),
        Implementation(task, "fair", fair),
        Implementation(
            task, "upstream compiled", upstream, compiled=True, missing=_compiled_upstream_missing
        ),
        Implementation(task, "fair compiled", fair, compiled=True, missing=_no_compiler),
    ]


def _fold_perceiver(projector: PerceiverProjector, shape: Shape) -> nn.Module:
    return fold(projector, grid=shape.grid)


def _fold(projector: nn.Module, shape: Shape) -> nn.Module:
    return fold(projector)


# Upstream's Linear and LayerNorm are already the fair baseline, so they have only that one.
IMPLEMENTATIONS = [
    *_peers("baseline", _linear_and_norm, _linear_and_norm)[1::2],
    Implementation("baseline", "visproj", _linear_projector),
    Implementation("baseline", "folded", _linear_projector, _fold, trains=False),
    *_peers(
        "vit",
        lambda shape: peers.UpstreamViT(_vision_config(shape), shape.lang_dim),
        TASKS["vit"].reference,
    ),
    Implementation("vit", "visproj", _vit_projector),
    Implementation("vit", "folded", _vit_projector, _fold, trains=False),
    *_peers("perceiver", _perceiver(peers.UpstreamPerceiver), _perceiver(peers.FairPerceiver)),
    Implementation("perceiver", "visproj", _perceiver_projector),
    Implementation("perceiver", "folded", _perceiver_projector, _fold_perceiver, trains=False),
    *_peers("linear_layer_norm", _linear_and_norm, _linear_and_norm)[1::2],
    Implementation(
        "linear_layer_norm",
        "liger",
        lambda shape: peers.LigerLinearNorm(*_linear_and_norm(shape).children()),
        missing=lambda shape, device: peers.liger_missing(device),
    ),
    Implementation(
        "linear_layer_norm",
        "visproj",
        lambda shape: _LinearLayerNormOp(*_linear_and_norm(shape).children()),
    ),
    *_peers("linear_norm_linear", _linear_norm_linear, _linear_norm_linear)[1::2],
    Implementation(
        "linear_norm_linear",
        "visproj",
        lambda shape: _LinearNormLinearOp(*_linear_norm_linear(shape).children()),
    ),
    *_peers(
        "cross_attention", _attention(peers.UpstreamAttention), _attention(peers.FairAttention)
    ),
    Implementation("cross_attention", "visproj", _attention(_CrossAttentionOp)),
]


@dataclass(frozen=True)
class Group:
    """All implementations of a task at one shape, which are measured in turn."""

    task: Task
    shape: Shape
    modes: tuple[str, ...]
    compiled: bool

    def implementations(self) -> list[Implementation]:
        """Return the entries of this task, compiled ones only if they were requested."""
        return [
            entry
            for entry in IMPLEMENTATIONS
            if entry.task == self.task.name and (self.compiled or not entry.compiled)
        ]


@dataclass(frozen=True)
class Grid:
    """All combinations of the fields' values; ``compiled`` adds the entries of torch.compile."""

    encoders: tuple[str, ...]
    lang_dims: tuple[int, ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    tasks: tuple[str, ...] = tuple(TASKS)
    modes: tuple[str, ...] = MODES
    compiled: bool = False

    def groups(self) -> Iterator[Group]:
        """Yield the groups in the order of the fields, tasks first."""
        combinations = itertools.product(
            self.tasks, self.encoders, self.lang_dims, self.batches, self.dtypes
        )
        for task, encoder, lang_dim, batch, dtype in combinations:
            shape = Shape(ENCODERS[encoder], lang_dim, batch, dtype)
            yield Group(TASKS[task], shape, self.modes, self.compiled)


_RELEASED = tuple(name for name in ENCODERS if name != "tiny")
_CLIP = ("clip-l-224",)
_FORWARD = ("forward",)

# Within a set, the first grids matter most: a run that is stopped early has them.
SETS: dict[str, tuple[Grid, ...]] = {
    "smoke": (
        Grid(_CLIP, (2048,), (1, 2), ("fp32",), ("baseline", "perceiver"), _FORWARD),
        Grid(_CLIP, (2048,), (1,), ("fp32",), modes=_FORWARD),
        Grid(("tiny",), (256,), (1,), ("fp32",), ("perceiver",), _FORWARD, compiled=True),
        Grid(("tiny",), (512,), (4,), ("fp32",)),
        Grid(("tiny",), (512,), (4,), ("bf16",), modes=_FORWARD),
    ),
    "cpu": (
        Grid(_CLIP, (4096,), (1, 8), ("fp32",), modes=_FORWARD),
        Grid(_CLIP, (4096,), (1,), ("fp32",)),
        Grid(_CLIP, (4096,), (1,), ("bf16",), modes=_FORWARD),
    ),
    "quick": (
        Grid(_CLIP, (4096,), (8, 1, 32), ("bf16",)),
        Grid(_CLIP, (4096,), (8,), ("bf16",), tasks=("baseline", "perceiver"), compiled=True),
        Grid(_RELEASED, (4096,), (8,), ("bf16",)),
        Grid(_CLIP, (2048, 5120, 8192), (8,), ("bf16",), tasks=("baseline", "perceiver")),
        Grid(_CLIP, (4096,), (8,), ("fp16", "fp32")),
    ),
    "full": (
        Grid(_CLIP, (4096,), (1, 8, 32), tuple(DTYPES), compiled=True),
        Grid(_RELEASED, (2048, 4096, 5120, 8192), (1, 8, 32), ("bf16", "fp16", "fp32")),
    ),
}


def groups(set_name: str) -> list[Group]:
    """Return the groups of a set, each once.

    A shape that two grids share is measured in the modes of both, and compiled if either is.
    """
    merged: dict[tuple[str, Shape], Group] = {}
    for grid in SETS[set_name]:
        for group in grid.groups():
            key = group.task.name, group.shape
            seen = merged.get(key, group)
            modes = tuple(mode for mode in MODES if mode in {*seen.modes, *group.modes})
            compiled = seen.compiled or group.compiled
            merged[key] = Group(group.task, group.shape, modes, compiled)
    return list(merged.values())
