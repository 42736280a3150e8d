"""Six steps of a small model with a projector in it: what every engine runs, and one process."""

import importlib
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from unittest.mock import patch

import torch
import torch.distributed as dist
from distributed.launch import WORLD
from helpers import VIS_CONFIG, randomise
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from benchmarks.peers import FairPerceiver, FairViT, UpstreamPerceiver, UpstreamViT
from visproj import LinearProjector, PerceiverProjector, ViTProjector, use_backend

KINDS = ("baseline", "vit", "perceiver")
STEPS = 6
BEFORE, AFTER = range(STEPS // 2), range(STEPS // 2, STEPS)  # of a checkpoint
IMAGES = 2 * WORLD
WIDTH, LANG_DIM, HEADS, QUERY_GRID = 32, 64, 2, (3, 5)

# Adam divides a gradient by its own size: it would hide a wrong scale, and move a weight whose
# gradient is zero but for rounding, as the keys' bias, by a full step. Not beside this eps.
ADAM = {"lr": 0.2, "eps": 1.0}


def baseline():
    return nn.Sequential(nn.Linear(WIDTH, LANG_DIM), nn.LayerNorm(LANG_DIM, eps=1e-12))


class CapturedReferences(LinearProjector):
    """Wrong on purpose: it reads what its children's weights were when it was built."""

    def __init__(self):
        super().__init__(WIDTH, LANG_DIM)
        self.captured = [(child.weight, child.bias) for child in self]

    def forward(self, x):
        (weight, bias), (gain, shift) = self.captured
        return nn.functional.layer_norm(
            nn.functional.linear(x, weight, bias), gain.shape, gain, shift, self[1].eps
        )


PROJECTORS = {
    "ours": {
        "baseline": lambda: LinearProjector(WIDTH, LANG_DIM),
        "vit": lambda: ViTProjector(VIS_CONFIG, LANG_DIM),
        "perceiver": lambda: PerceiverProjector(
            WIDTH, LANG_DIM, query_grid=QUERY_GRID, num_heads=HEADS
        ),
    },
    "upstream": {
        "baseline": baseline,
        "vit": lambda: UpstreamViT(VIS_CONFIG, LANG_DIM),
        "perceiver": lambda: UpstreamPerceiver(WIDTH, LANG_DIM, HEADS, QUERY_GRID),
    },
    "fair": {
        "baseline": baseline,
        "vit": lambda: FairViT(VIS_CONFIG, LANG_DIM),
        "perceiver": lambda: FairPerceiver(WIDTH, LANG_DIM, HEADS, QUERY_GRID),
    },
    "captured": {"baseline": CapturedReferences},
}


class Bridge(nn.Module):
    """A layer that trains, a projector behind it and a loss."""

    def __init__(self, projector, recompute=False):
        super().__init__()
        self.encoder = nn.Linear(WIDTH, WIDTH)
        self.projector = projector
        self.recompute = recompute

    def forward(self, x, target):
        x = self.encoder(x)
        if self.recompute:
            out = checkpoint(self.projector, x, use_reentrant=False)
        else:
            out = self.projector(x)
        return (out.float() - target).square().mean()


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        form: A key of :data:`PROJECTORS`.
        kernels: Whether the projectors run on interpreted kernels, else on PyTorch.
        recompute: Whether the projector runs in a non-reentrant checkpoint.
    """

    kind: str
    form: str = "ours"
    dtype: torch.dtype = torch.float32
    kernels: bool = True
    recompute: bool = False


@dataclass
class Result:
    """Losses of the whole batch, the weights after the last step, and operations called."""

    losses: list
    state: dict
    calls: Counter


def initial_state(case):
    """The same weights for every form of a kind: noise in all of them, in the case's dtype."""
    torch.manual_seed(0)
    model = randomise(Bridge(PROJECTORS["ours"][case.kind]()))
    if case.kind == "perceiver":  # logits of order 1, else a softmax is almost one key
        with torch.no_grad():
            model.projector.attn.in_proj_weight[: 2 * LANG_DIM] *= 2 / LANG_DIM**0.5
    return {name: value.to(case.dtype).float() for name, value in model.state_dict().items()}


def fresh(case):
    """The case's model with weights of its own."""
    return Bridge(PROJECTORS[case.form][case.kind](), case.recompute)


def build(case, state=None):
    """The case's model in fp32 with ``state`` or the initial weights."""
    model = fresh(case)
    model.load_state_dict(initial_state(case) if state is None else state)
    return model


def batch(case, step, rank=None):
    """Features and targets of one step, all of them or a rank's share."""
    generator = torch.Generator().manual_seed(step)
    tokens = QUERY_GRID[0] * QUERY_GRID[1] if case.kind == "perceiver" else 17
    x = torch.randn(IMAGES, 17, WIDTH, generator=generator).to(case.dtype)
    target = torch.randn(IMAGES, tokens, LANG_DIM, generator=generator)
    share = slice(None) if rank is None else slice(rank, None, WORLD)
    return x[share], target[share]


def train(case, step_loss, update, steps=range(STEPS)):
    """Losses of the whole batch and calls of the custom operations.

    Args:
        case: What is trained.
        step_loss: ``(x, target) -> loss``.
        update: ``loss -> None``: backward, step, gradients cleared.
        steps: Numbers of the batches.
    """
    losses = []
    with operations(case.kernels) as calls:
        for step in steps:
            loss = step_loss(*batch(case, step, dist.get_rank()))
            update(loss)
            losses.append(mean(loss))
    return losses, calls


def mean(loss):
    """Of the ranks' losses."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / WORLD


@contextmanager
def operations(kernels):
    """Have the projectors run as on a GPU, and count the operations they call."""
    calls = Counter()
    with ExitStack() as stack:
        if kernels:
            stack.enter_context(use_backend("triton"))
        for name in ("cross_attention", "linear_layer_norm", "linear_norm_linear"):
            module = importlib.import_module(f"visproj.ops.{name}")
            forward = counted(name, getattr(module, f"_{name}_fwd"), calls)
            stack.enter_context(patch.object(module, f"_{name}_fwd", forward))
        yield calls


def counted(name, forward, calls):
    """An operation that counts its calls."""

    def call(*args, **options):
        calls[name] += 1
        return forward(*args, **options)

    return call


@cache
def alone(case, order=tuple(range(IMAGES))):
    """The case in this process on whole batches, its weights in fp32 and used in its dtype."""
    model = build(case)
    optimizer = torch.optim.Adam(trainable(model), **ADAM)
    images, losses = list(order), []
    for step in range(STEPS):
        x, target = batch(case, step)
        weights = {name: value.to(case.dtype) for name, value in model.named_parameters()}
        loss = functional_call(model, weights, (x[images], target[images]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Result(losses, model.state_dict(), Counter())


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
