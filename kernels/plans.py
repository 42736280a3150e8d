"""What launchers settled for operands of one kind, found again when such operands return.

A launcher settles a configuration, a grid and the shapes of its outputs from the shapes, strides,
dtypes, alignment and device of its operands. With them as a key, the next call is spared all that.
The environment is asked when a plan is made, not again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from visproj.kernels import configs
from visproj.kernels.launch import Launch

P = TypeVar("P")
Key = tuple[Any, ...]

MOST = 4096  # plans kept; sequences of ever new lengths make ever new plans
REMEMBERS = True  # not where kernels are only compiled, each time for another device
_plans: dict[Key, Any] = {}
_PLAIN = (Tensor, nn.Parameter)


def key_of(name: str, operands: Sequence[Tensor | None], *settings: Any) -> Key | None:
    """Return what a launcher's choices follow from, ``None`` where nothing is to be remembered.

    Args:
        name: Of the launcher.
        operands: All its tensors; a fake one or another subclass has no address to ask for.
        settings: All else that its choices follow from.
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
    """Return the plan of a key, made and remembered at its first use.

    Args:
        key: Of :func:`key_of`.
        make: Returns a plan, and whether it would be the same the next time.
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
    """Return the launch of a kernel whose configuration follows from the shapes alone."""
    return recall(key_of(name, operands, *settings), lambda: (make(), True))
