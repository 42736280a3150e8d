"""The shipped autotuning configurations, in one table by kernel and architecture.

An entry such as ``d128x64/8w2s`` has ``d`` for descriptors or ``p`` for pointers, the tile sizes,
warps and stages. Entries are in order of preference for launches with enough tiles for every
processor. Each was compiled for its architecture: none spills, and none needs more shared memory
than there is (``python -m benchmarks.codegen``). Tiles are rows x columns x depth of a matmul, and
queries x keys of attention.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from visproj.kernels.device import architecture, switched_on
from visproj.kernels.launch import Config
from visproj.kernels.layout import describable

ARCHITECTURES = (80, 86, 89, 90, 100, 120)

# bf16 and fp16, for sm_80, sm_86 and sm_89, sm_90, sm_100, sm_120. "_masked" takes an additive
# mask, "_wide" a head padded to 256 instead of at most 128.
_HALF: dict[str, tuple[str, str, str, str, str]] = {
    "linear": (
        "p128x128x64/8w3s p64x128x64/4w4s",
        "p128x128x64/8w3s p64x128x64/4w3s",
        "d128x256x64/8w3s d128x128x64/8w3s p128x128x64/8w3s d64x128x64/4w4s p64x128x64/4w4s",
        "d128x128x64/8w3s d128x128x64/8w4s d64x128x64/4w4s p64x128x64/4w4s",
        "d128x128x64/8w3s p128x128x64/8w3s p64x64x64/4w4s",
    ),
    "linear_table": (
        "p128x128x64/8w3s p64x128x64/4w4s",
        "p128x128x64/8w3s p64x128x64/4w3s",
        "d128x256x64/8w3s d128x128x64/8w3s d64x128x64/4w4s p128x128x64/8w3s",
        "d128x128x64/8w3s d64x128x64/4w4s p128x128x64/8w3s",
        "d128x128x64/8w3s p128x128x64/8w3s",
    ),
    "linear_bwd_weight": (
        "p128x128x32/8w3s p64x128x64/4w3s",
        "p128x128x32/8w3s p64x128x64/4w3s",
        "d128x128x32/8w3s d128x128x64/8w3s p128x128x64/8w3s",
        "d128x128x64/8w3s d64x128x64/4w3s p128x128x64/8w3s",
        "d128x128x32/8w3s p128x128x32/8w3s",
    ),
    "cross_attention_fwd": (
        "p128x64/8w2s p64x64/4w2s",
        "p128x64/8w2s p64x64/4w2s",
        "d128x128/8w2s d128x64/8w2s d64x64/4w2s p128x64/8w2s",
        "d128x64/8w2s d128x128/8w2s d64x64/4w2s p128x64/8w2s",
        "d128x64/8w2s p128x64/8w2s p64x64/4w2s",
    ),
    "cross_attention_fwd_masked": (
        "p128x32/8w2s p64x32/4w2s",
        "p128x32/8w2s p64x32/4w2s",
        "d128x64/8w2s d64x64/4w2s p128x64/8w2s",
        "d128x64/8w2s d64x64/4w2s p128x64/8w2s",
        "d64x64/4w2s p128x32/8w2s",
    ),
    "cross_attention_bwd_dkv": (
        "p64x64/8w2s",
        "p64x64/8w2s",
        "d64x128/8w2s d64x64/4w2s d64x64/8w2s p64x64/8w2s",
        "d64x128/8w2s d64x64/8w2s p64x64/8w2s",
        "d64x64/8w2s p64x64/8w2s",
    ),
    "cross_attention_bwd_dkv_masked": (
        "p64x64/8w2s",
        "p64x64/8w2s",
        "d64x64/8w2s p64x64/8w2s",
        "d64x128/8w2s d64x64/8w2s p64x64/8w2s",
        "d64x64/8w2s p64x64/8w2s",
    ),
    "cross_attention_bwd_dq": (
        "p64x64/8w2s",
        "p64x64/8w2s p64x32/4w2s",
        "d128x64/8w2s d64x64/4w2s p64x64/8w2s",
        "d128x64/8w1s d64x64/4w2s p128x64/8w1s",
        "d64x64/8w1s p64x64/8w2s",
    ),
    "cross_attention_bwd_dq_masked": (
        "p64x64/8w2s",
        "p64x64/8w2s",
        "d128x64/8w2s d64x64/4w2s p64x64/8w2s",
        "d64x64/8w2s p64x32/4w1s",
        "d64x64/8w2s p64x64/8w2s",
    ),
    "cross_attention_fwd_wide": (
        "p64x64/8w2s p64x32/8w2s",
        "p64x64/8w1s p64x32/8w2s",
        "d128x64/8w2s d64x64/8w1s p64x32/8w2s",
        "d64x64/8w1s d128x64/8w1s p64x32/8w2s",
        "d64x64/8w1s p64x64/8w1s",
    ),
    "cross_attention_fwd_masked_wide": (
        "p64x32/8w2s",
        "p64x32/8w2s p64x64/8w1s",
        "d64x64/8w1s d128x64/8w2s p64x32/8w2s",
        "d64x64/8w1s p64x64/8w1s",
        "d64x64/8w1s p64x32/8w2s",
    ),
    "cross_attention_bwd_dkv_wide": (
        "p64x32/8w1s p32x32/8w1s",
        "p32x32/8w1s",
        "d32x64/8w1s p16x64/8w2s",
        "d64x64/8w1s d32x64/8w1s p64x64/8w1s",
        "d64x32/8w1s p32x32/8w1s",
    ),
    "cross_attention_bwd_dkv_masked_wide": (
        "p64x32/8w1s",
        "p32x32/8w1s",
        "d32x64/8w1s p16x64/8w2s",
        "d64x64/8w1s d32x64/8w1s p64x64/8w1s",
        "d64x32/8w1s p32x32/8w1s",
    ),
    "cross_attention_bwd_dq_wide": (
        "p32x64/8w1s p64x32/8w1s",
        "p64x32/8w1s",
        "d64x32/8w2s p64x32/8w2s",
        "d64x32/8w1s p64x32/8w1s",
        "d64x32/8w1s p64x32/8w1s",
    ),
    "cross_attention_bwd_dq_masked_wide": (
        "p32x64/8w1s",
        "p16x64/8w1s",
        "d64x32/8w2s p64x16/8w2s",
        "d64x32/8w1s p32x64/8w1s",
        "d64x32/8w1s p32x64/8w1s",
    ),
}
# Configurations for packed keys, where those for batched keys would spill.
_HALF |= {
    "packed_cross_attention_fwd": (
        "p128x64/8w2s p64x32/4w2s",
        *_HALF["cross_attention_fwd"][1:],
    ),
    "packed_cross_attention_fwd_wide": (
        *_HALF["cross_attention_fwd_wide"][:3],
        "d128x64/8w1s p64x32/8w2s",
        _HALF["cross_attention_fwd_wide"][4],
    ),
    "packed_cross_attention_bwd_dkv": (
        *_HALF["cross_attention_bwd_dkv"][:2],
        "d64x64/4w2s d64x64/8w2s p64x64/8w2s",
        *_HALF["cross_attention_bwd_dkv"][3:],
    ),
    "packed_cross_attention_bwd_dq": (
        *_HALF["cross_attention_bwd_dq"][:3],
        "d64x64/4w2s p128x64/8w1s",
        _HALF["cross_attention_bwd_dq"][4],
    ),
    "packed_cross_attention_bwd_dkv_wide": _HALF["cross_attention_bwd_dkv_wide"],
    "packed_cross_attention_bwd_dq_wide": _HALF["cross_attention_bwd_dq_wide"],
}
KERNELS = tuple(_HALF)

# fp32, without and with tf32: one configuration for every architecture, or one for each column.
# A kernel that is not listed takes the entry with the longest name that its own name starts with.
_SINGLE: dict[str, dict[str, str | tuple[str, str, str, str, str]]] = {
    "ieee": {
        "linear": "p64x64x16/4w2s",
        "linear_bwd_weight": "p64x32x16/4w2s",
        "cross_attention": "p32x32/8w1s",
        "cross_attention_wide": "p16x16/8w1s",
        "cross_attention_bwd_dkv_wide": "p16x32/8w1s",
        "cross_attention_bwd_dkv_masked_wide": ("p16x16/16w1s", *("p16x16/8w1s",) * 4),
        "cross_attention_bwd_dq_masked_wide": (*("p16x16/8w1s",) * 4, "p16x32/8w1s"),
        "packed_cross_attention": "p32x32/8w1s",
        "packed_cross_attention_wide": "p16x16/8w1s",
        "packed_cross_attention_bwd_dq": "p32x16/8w1s",
        "packed_cross_attention_bwd_dq_wide": (*("p16x16/8w1s",) * 4, "p16x16/4w1s"),
        "packed_cross_attention_bwd_dkv_wide": "p16x32/8w1s",
    },
    "tf32": {
        "linear": (*("p64x64x32/4w2s",) * 3, "p64x32x32/4w2s", "p64x64x32/4w2s"),
        "cross_attention": "p32x32/8w1s",
        "cross_attention_bwd_dkv_masked": (
            *("p32x32/8w1s",) * 3,
            "p16x32/8w1s",
            "p32x32/8w1s",
        ),
        "cross_attention_bwd_dq": "p16x16/4w1s",
        "cross_attention_wide": "p16x16/8w1s",
        "packed_cross_attention": "p32x32/8w1s",
        "packed_cross_attention_wide": "p16x16/8w1s",
        "packed_cross_attention_fwd_wide": "p16x32/8w1s",
        "packed_cross_attention_bwd_dkv": (*("p32x32/8w1s",) * 4, "p16x32/8w1s"),
        "packed_cross_attention_bwd_dq": "p16x16/4w1s",
    },
}
_COLUMN = {80: 0, 86: 1, 89: 1, 90: 2, 100: 3, 120: 4}


def candidates(
    kernel: str, operands: Sequence[Tensor | None], precision: str
) -> tuple[Config, ...]:
    """Return the configurations for the device of the operands, best first.

    Args:
        kernel: One of :data:`KERNELS`.
        operands: Tensors that are read or written in tiles. If descriptors cannot address all of
            them, and with ``VISPROJ_DESCRIPTORS=0``, only configurations with pointers remain.
        precision: Precision of fp32 matmuls, ``"ieee"`` or ``"tf32"``.

    Raises:
        ValueError: If ``VISPROJ_DESCRIPTORS`` is neither 0 nor 1.
    """
    first: Any = operands[0]
    arch = architecture(first.device)
    found, pointers = _found(kernel, first.dtype, precision, arch)
    off = os.environ.get("VISPROJ_DESCRIPTORS") and not switched_on("VISPROJ_DESCRIPTORS")
    if off or found is pointers:
        return pointers
    return found if describable(*operands) else pointers


@cache
def _found(
    kernel: str, dtype: torch.dtype, precision: str, arch: int | str
) -> tuple[tuple[Config, ...], tuple[Config, ...]]:
    """Return all configurations, and those with pointers; one tuple if there are no others."""
    found = shipped(kernel, dtype, nearest(arch), precision)
    pointers = tuple(config for config in found if not config.descriptors)
    return found, found if pointers == found else pointers


def shipped(kernel: str, dtype: torch.dtype, arch: int, precision: str) -> tuple[Config, ...]:
    """Return the configurations of ``kernel`` for an architecture of the table."""
    if dtype != torch.float32:
        choices = _parse(_HALF[kernel][_COLUMN[arch]])
        # On sm_120 triton 3.6 writes to the stack with every descriptor load.
        pointers = arch == 120 and triton.__version__.startswith("3.6.")
        return tuple(c for c in choices if not (pointers and c.descriptors))
    table = _SINGLE[precision]
    wide = "_wide" if kernel.endswith("_wide") else ""
    names = [name for name in table if kernel.startswith(name.removesuffix("_wide"))]
    names = [name for name in names if name.endswith("_wide") == bool(wide)] or names
    entry = table[max(names, key=len)]
    return _parse(entry if isinstance(entry, str) else entry[_COLUMN[arch]])


def nearest(arch: int | str) -> int:
    """Return the table's newest architecture up to ``arch``; for AMD one of little memory."""
    if isinstance(arch, str):
        return 86
    return max((known for known in ARCHITECTURES if known <= arch), default=ARCHITECTURES[0])


@cache
def _parse(entry: str) -> tuple[Config, ...]:
    parts = re.findall(r"([pd])([\dx]+)/(\d+)w(\d+)s", entry)
    return tuple(
        Config(tuple(map(int, blocks.split("x"))), int(warps), int(stages), style == "d")
        for style, blocks, warps, stages in parts
    )
