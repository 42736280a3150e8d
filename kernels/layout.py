"""The memory layout of operands, and copies of those that the kernels cannot read directly."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def unit_columns(*tensors: Tensor | None) -> list[Any]:
    """Return the tensors, copied only where their last dimension is not contiguous."""
    return [
        tensor
        if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1
        else tensor.contiguous()
        for tensor in tensors
    ]


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """Return the tensors, copied only where they are not contiguous."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def describable(*tensors: Tensor | None) -> bool:
    """Return whether tensor descriptors can address these tensors.

    They need 16-byte aligned bases and strides, and a last dimension that is contiguous.
    """
    return all(
        tensor.data_ptr() % 16 == 0
        and tensor.stride(-1) == 1
        and all(
            stride > 0 and stride * tensor.element_size() % 16 == 0
            for stride in tensor.stride()[:-1]
        )
        for tensor in tensors
        if tensor is not None
    )
