"""Linear followed by LayerNorm."""

from __future__ import annotations

from torch import Tensor

from visproj.ops.checks import check_alike, check_floating, check_shape
from visproj.reference import linear_layer_norm_ref


def linear_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    shift: Tensor | None,
    eps: float = 1e-12,
) -> Tensor:
    """Project rows and normalise them over the output width.

    ``y = x Wᵀ + b``, then ``out = (y - mean(y)) / sqrt(var(y) + eps) * gain + shift`` with the
    biased variance, both over the last dimension.

    Args:
        x: ``[..., C]``, floating, any strides.
        weight: ``[D, C]``.
        bias: ``[D]`` or ``None``.
        gain: ``[D]``.
        shift: ``[D]`` or ``None``.
        eps: Added to the variance.

    Returns:
        ``[..., D]`` in the dtype of ``x``; under autocast in the dtype that
        ``nn.LayerNorm(nn.Linear(x))`` would give.

    Raises:
        TypeError: If ``x`` is not floating point or, outside autocast, the dtypes differ.
        ValueError: If shapes do not fit or devices differ.

    Source: DeepSpeed-VisualChat ``utils/model/modeling_dsvl.py``, ``build_projection``.
    """
    check_floating("x", x)
    if weight.ndim != 2:
        raise ValueError(f"weight must be [D, C], got shape {list(weight.shape)}")
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [..., {weight.shape[1]}], got shape {list(x.shape)}")
    check_alike("weight", weight, "x", x)
    for name, vector in (("bias", bias), ("gain", gain), ("shift", shift)):
        if vector is not None:
            check_shape(name, vector, (weight.shape[0],))
            check_alike(name, vector, "x", x)
    return linear_layer_norm_ref(x, weight, bias, gain, shift, eps)
