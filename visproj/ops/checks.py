"""Argument checks that the operations share. Every message names the argument and both values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from visproj.errors import InputError
from visproj.ops.autograd import autocasting


def check_all_floating(**tensors: Any) -> None:
    """Raise as :func:`check_floating` for the first of several tensors that is unsuitable."""
    for name, tensor in tensors.items():
        if (
            not isinstance(tensor, Tensor)
            or not tensor.is_floating_point()
            or tensor.layout != torch.strided
            or tensor.is_nested
        ):
            check_floating(name, tensor)


def check_operands(
    like_name: str, like: Tensor, operands: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]
) -> None:
    """Raise unless every operand that is given has its shape and fits ``like``.

    Raises:
        TypeError: As :func:`check_alike`.
        ValueError: If a shape or device differs.
    """
    dtype, device = like.dtype, like.device
    for name, (tensor, shape) in operands.items():
        if tensor is None or (
            isinstance(tensor, Tensor)
            and tensor.layout == torch.strided
            and tensor.dtype == dtype
            and tensor.device == device
            and tensor.shape == shape
        ):
            continue
        check_floating(name, tensor)
        check_shape(name, tensor, shape)
        check_alike(name, tensor, like_name, like)


def check_tensor(name: str, tensor: Any) -> None:
    """Raise ``TypeError`` unless ``tensor`` is a dense tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name} must be a dense tensor, got a {layout} one")


def check_floating(name: str, tensor: Any) -> None:
    """Raise ``TypeError`` unless ``tensor`` is a dense tensor of real floating-point numbers."""
    check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def check_shape(name: str, tensor: Any, wanted: tuple[int, ...]) -> None:
    """Raise unless ``tensor`` is a tensor of exactly the shape ``wanted``.

    Raises:
        TypeError: If it is not a dense tensor.
        ValueError: If it has another shape.
    """
    check_tensor(name, tensor)
    if tuple(tensor.shape) != tuple(wanted):
        raise InputError(f"{name} must have shape {list(wanted)}, got {list(tensor.shape)}")


def check_alike(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless both tensors are floating, on one device and, outside autocast, of one dtype.

    Raises:
        TypeError: If the dtypes differ or are not floating point.
        ValueError: If the devices differ.
    """
    check_floating(name, tensor)
    check_device(name, tensor, like_name, like)
    if tensor.dtype != like.dtype and not autocasting(like.device.type):
        raise TypeError(
            f"{name} and {like_name} must have one dtype, got {tensor.dtype} and {like.dtype}"
        )


def check_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Raise ``ValueError`` unless both tensors are on one device."""
    if tensor.device != like.device:
        raise InputError(
            f"{name} and {like_name} must be on one device, got {tensor.device} and {like.device}"
        )


def to_autocast_dtype(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Return the tensors in the dtype that autocast, if it is enabled, uses for matmuls."""
    kind = first.device.type
    if not autocasting(kind) or first.dtype == torch.float64:
        return first, *others
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in (first, *others))
