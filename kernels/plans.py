"""A cache of launch plans, by the properties of the operands.

A launcher chooses a configuration, a grid and the shapes of its outputs from the shapes, strides,
dtypes, alignment and device of its operands. These are the key of the cache, so that the next call
with such operands skips the choice. Environment variables are read when a plan is made, not again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from visproj.kernels import configs
from visproj.kernels.launch import Launch

P = TypeVar("P")
Key = tuple[Any, ...]

MOST = 4096  # plans kept; inputs of ever new lengths would otherwise add plans without end
REMEMBERS = True  # False while kernels are only compiled, each time for another device
_plans: dict[Key, Any] = {}
_PLAIN = (Tensor, nn.Parameter)


def key_of(name: str, operands: Sequence[Tensor | None], *settings: Any) -> Key | None:
    """Return the key of a launcher's plan, or ``None`` if the plan must not be cached.

    Args:
        name: Name of the launcher.
        operands: All its tensors. With a fake tensor or another subclass, which has no address,
            nothing is cached.
        settings: Everything else that the plan depends on.
    """
    if not REMEMBERS:
        return None
    parts: list[Any] = [name, settings, configs.candidates]
    for tensor in operands:
        if tensor is None:
            parts.append(None)
        elif type(tensor) in _PLAIN:
            device, misaligned = tensor.get_device(), tensor.data_ptr() % 16
            parts += (tensor.shape, tensor.stride(), tensor.dtype, device, misaligned)
        else:
            return None
    return tuple(parts)


def recall(key: Key | None, make: Callable[[], tuple[P, bool]]) -> P:
    """Return the plan of a key; make and cache it at the first use.

    Args:
        key: Result of :func:`key_of`.
        make: Returns a plan, and whether it is final. Only a final plan is cached.
    """
    plan = _plans.get(key)
    if plan is None:
        plan, settled = make()
        if settled and key is not None:
            if len(_plans) >= MOST:
                _plans.clear()
            _plans[key] = plan
    return plan


def recall_launch(
    name: str, operands: Sequence[Tensor | None], make: Callable[[], Launch], *settings: Any
) -> Launch:
    """Return the cached launch of a kernel whose configuration depends on the operands alone."""
    return recall(key_of(name, operands, *settings), lambda: (make(), True))
