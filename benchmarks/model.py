"""The cost of a call, not measured: FLOPs, bytes and launches counted from the code that runs.

The module is run on fake tensors, which have shapes and no data, and every operation that reaches
the dispatcher is recorded. Nothing here is a measurement, and everything derived from it is
labelled "model".
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

if TYPE_CHECKING:
    from visproj.kernels.launch import Launch as KernelLaunch

aten = torch.ops.aten


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


# torch counts attention on a CPU as 0 FLOPs.
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_FORMULAS = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION).flop_registry
# Inside a custom operator these reach the dispatch mode before they are decomposed.
_WHOLE = {aten.linear, aten.matmul}
# The dispatcher does not mark these as views, but they start no kernel.
_NO_KERNEL = {
    aten._unsafe_view,
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.lift_fresh,
    aten.new_empty,
    aten.new_empty_strided,
}


@dataclass(frozen=True)
class Machine:
    """Rates that benchmarks/schedule.py assumes; published figures, see the sources.

    Attributes:
        matmul: 16-bit matrix products, FLOP/s.
        attention: Fused attention forward, FLOP/s.
        attention_backward: Its backward, FLOP/s.
        bandwidth: Memory, bytes/s.
    """

    matmul: float
    attention: float
    attention_backward: float
    bandwidth: float


# Matmul: stas00/ml-engineering, compute/accelerator. Attention: FlashAttention-3's paper and its
# successors' tables. Bandwidth: what norm kernels reach (Dao-AILab/quack).
MACHINES = {
    "H100": Machine(790e12, 480e12, 310e12, 3.0e12),
    "A100": Machine(280e12, 200e12, 140e12, 1.7e12),
}


@dataclass(frozen=True)
class Launch:
    """One operation: name, FLOPs, bytes read and written, and whether it depends on weights only.

    Attributes:
        shape: Shape of its first output.
        started: The launch that started it, if it is one of visproj's kernels.
    """

    name: str
    flops: int
    bytes: int
    weights_only: bool = False
    shape: tuple[int, ...] = field(default=(), compare=False)
    started: KernelLaunch | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Cost:
    """A call's launches, and the bytes that no implementation can avoid.

    ``min_bytes`` has weights, inputs and outputs once each, in a backward also the gradients.
    """

    launches: tuple[Launch, ...]
    min_bytes: int

    @property
    def flops(self) -> int:
        """Floating-point operations of matmuls and attention, two per multiply-add."""
        return sum(launch.flops for launch in self.launches)

    def floor_seconds(self, flop_rate: float, bandwidth: float) -> float:
        """Return the lower bound on the time of a call, s, at these rates (FLOP/s, bytes/s)."""
        return max(self.flops / flop_rate, self.min_bytes / bandwidth)


class _Recorder(TorchDispatchMode):
    """A dispatch mode that records operations, and inside visproj's own the kernels they launch.

    A tensor depends on the inputs or, like the queries of a Perceiver, on the weights alone.
    """

    def __init__(self, weights: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._alive: list[Tensor] = []  # else a later tensor may get the address of an earlier one
        self._from_weights = set(map(self._storage, weights))
        self._from_inputs = set(map(self._storage, inputs))

    def follow(self, x: Tensor) -> None:
        """Treat ``x`` as an input, on which everything computed from it depends."""
        self._from_inputs.add(self._storage(x))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if func.namespace == "visproj":
            return self._look_inside(func, args, kwargs)
        if packet in _WHOLE:
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if func.namespace == "prim" or func.is_view or packet in _NO_KERNEL:
            return out
        formula = _FORMULAS.get(packet)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        read = {name: value for name, value in kwargs.items() if name != "out"}
        self._add(str(packet), flops, [*_tensors((args, read))], [*_tensors(out)])
        return out

    def _storage(self, x: Tensor) -> int:
        self._alive.append(x)
        return x.untyped_storage()._cdata

    def _add(
        self,
        name: str,
        flops: int,
        read: list[Tensor],
        written: list[Tensor],
        started: KernelLaunch | None = None,
    ) -> None:
        weights_only = self._from_inputs.isdisjoint(map(self._storage, read))
        (self._from_weights if weights_only else self._from_inputs).update(
            map(self._storage, written)
        )
        moved = sum(map(touched_bytes, (*read, *written)))
        shape = tuple(written[0].shape) if written else ()
        self.launches.append(Launch(name, flops, moved, weights_only, shape, started))

    def _look_inside(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator's body on fake tensors; record its kernels instead of starting them."""
        from visproj.kernels import configs
        from visproj.kernels.launch import Launch as KernelLaunch

        def start(launch: KernelLaunch, tensors: dict[str, Tensor | None]) -> None:
            self._kernel(launch, tensors)

        with (
            mock.patch.object(KernelLaunch, "start", start),
            # Nothing starts, so nothing can be timed.
            mock.patch.dict(os.environ, VISPROJ_AUTOTUNE="0"),
            # Fake tensors have no address.
            mock.patch.object(configs, "describable", return_value=True),
            self,
        ):
            return OPDEFS[func.name()]._init_fn(*args, **kwargs)

    def _kernel(self, launch: KernelLaunch, pointers: dict[str, Tensor | None]) -> None:
        """Record a kernel; its outputs are the tensors that were not read or written before."""
        from visproj.kernels.registry import FLOPS

        tensors = [x for x in pointers.values() if x is not None]
        seen = self._from_inputs | self._from_weights
        read = [x for x in tensors if self._storage(x) in seen]
        written = [x for x in tensors if self._storage(x) not in seen]
        name = launch.kernel.__name__
        self._add(name, FLOPS[name]({**pointers, **launch.rest}), read, written, launch)


def touched_bytes(x: Tensor) -> int:
    """Return the bytes of memory that ``x`` covers; an expanded dimension counts once."""
    count = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


def costs(
    module: nn.Module,
    inputs: Sequence[Tensor],
    *,
    trains: bool = True,
    input_gradients: bool = False,
) -> dict[str, Cost]:
    """Count the costs of forward, backward and both, by mode, without running them.

    Args:
        module: A module that is not compiled. A copy of it with fake weights runs.
        inputs: Tensors of the shapes to count for.
        trains: Whether to count a backward, for a gradient of the output's shape.
        input_gradients: Whether that backward goes to the inputs as well.
    """
    fake = FakeTensorMode()
    weights = [*module.parameters(), *module.buffers()]
    twin = copy.deepcopy(module, {id(weight): fake.from_tensor(weight) for weight in weights})
    fake_inputs = [
        fake.from_tensor(x.detach()).requires_grad_(trains and input_gradients) for x in inputs
    ]
    leaves = [x for x in (*twin.parameters(), *fake_inputs) if x.requires_grad]
    recorder = _Recorder((*twin.parameters(), *twin.buffers()), fake_inputs)
    with fake, torch.set_grad_enabled(trains), recorder:
        out = twin(*fake_inputs)
        ahead = tuple(recorder.launches)
        if trains:
            gradient = torch.empty_like(out)
            recorder.follow(gradient)
            torch.autograd.grad(out, leaves, gradient)
    back = tuple(recorder.launches[len(ahead) :])
    read = _total((*weights, *fake_inputs))
    written = _total((out,))
    found = {"forward": Cost(ahead, read + written)}
    if trains:
        gradients = _total(leaves)
        found["backward"] = Cost(back, read + written + gradients)
        # The output is written, and its gradient, which has the same size, is read.
        found["forward+backward"] = Cost(ahead + back, read + 2 * written + gradients)
    return found


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _total(tensors: Iterable[Tensor]) -> int:
    return sum(map(touched_bytes, tensors))
