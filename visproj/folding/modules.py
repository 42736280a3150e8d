"""The folded forms: modules of constants, called like the projectors they were folded from."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visproj import ops
from visproj.files import entries_of, replacing, write_safetensors
from visproj.ops.autograd import norm_autocast_dtype
from visproj.ops.checks import check_alike
from visproj.positions import Grid, PositionedModule, grid_of
from visproj.projectors.config import check_features
from visproj.projectors.perceiver import flatten_batch, unflatten_batch

FORMAT = "visproj-folded-2"


class FoldedProjector(nn.Module):
    """What the folded forms share: constants instead of parameters, and where they came from.

    Attributes:
        config: Widths, grids and eps, and a digest of the weights that were folded; JSON-able.
    """

    config: dict[str, Any]

    def __init__(self, config: dict[str, Any], constants: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        for name, constant in constants.items():
            self.register_buffer(name, constant)

    def is_stale(self, projector: nn.Module) -> bool:
        """Whether ``projector`` has other weights by now than were folded; warns if so."""
        stale = weights_digest(projector) != self.config["digest"]
        if stale:
            warnings.warn(
                f"{type(projector).__name__} has changed since it was folded: fold it again",
                stacklevel=2,
            )
        return stale

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, its metadata saying what was folded and for which grid."""
        metadata = {
            "format": FORMAT,
            "class": type(self).__name__,
            "config": json.dumps(self.config),
        }
        with replacing(path) as partial:
            write_safetensors(partial, entries_of(self.state_dict()), metadata=metadata)

    def extra_repr(self) -> str:
        """What was folded."""
        return ", ".join(f"{key}={value}" for key, value in self.config.items() if key != "digest")

    def _check(self, x: Tensor, constant: Tensor, attn_mask: Tensor | None = None) -> None:
        check_features(x, self.config["vis_dim"])
        check_alike("visual features", x, "the folded weights", constant)
        wanted = x.requires_grad or (isinstance(attn_mask, Tensor) and attn_mask.requires_grad)
        if wanted and torch.is_grad_enabled():
            raise RuntimeError(
                "a folded projector is for inference and gives no gradients: train the projector "
                "it was folded from, or call it under torch.no_grad()"
            )


class FoldedLinear(FoldedProjector):
    """``LinearProjector`` with constants for weights: ``[..., S, C] -> [..., S, D]``.

    For the Triton kernels, and where the features are narrower than the output, ``rstd`` comes
    from the triangular factor: that costs ``C² / 2`` multiply-adds a row and writes the output
    once instead of twice. In plain PyTorch a product and a LayerNorm are the fastest form there is,
    and the weights stay as they are.
    """

    weight: Tensor
    bias: Tensor
    shift: Tensor
    gain: Tensor
    stats_weight: Tensor
    stats_bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`LinearProjector.forward`."""
        self._check(x, self.weight)
        if self.config["floor"] is None:
            eps = self.config["eps"]
            return ops.linear_layer_norm(x, self.weight, self.bias, self.gain, self.shift, eps)
        out = ops.folded_linear(
            x,
            self.weight,
            self.bias,
            self.stats_weight,
            self.stats_bias,
            self.shift,
            eps=self.config["floor"],
        )
        return out.to(norm_autocast_dtype(x))  # a LayerNorm gives fp32 under CUDA's autocast


class FoldedViT(FoldedProjector):
    """A ``ViTProjector``'s CLIP layer as it is, with frozen parameters, and its tail folded."""

    def __init__(self, config: dict[str, Any], vis_layer: nn.Module, tail: FoldedLinear) -> None:
        super().__init__(config, {})
        self.vis_layer = vis_layer.requires_grad_(False)
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`ViTProjector.forward`."""
        self._check(x, self.tail.weight)
        return self.tail(self.vis_layer(x))


class FoldedPerceiver(FoldedProjector, PositionedModule):
    """``PerceiverProjector`` with one product for keys and values, straight from the features.

    ``rstd = (‖x Rᵀ + r‖² + floor)^(-1/2)``; ``K = rstd * (x A_kᵀ + a_k) + pos_k``;
    ``V = rstd * (x A_vᵀ + a_v) + c_v``; constant queries; attention ``O``. Then the projector's own
    output projection, LayerNorm and Linear, or for the Triton kernels
    ``rstd₂ * (O A₂ᵀ + a₂) + c₂`` with ``rstd₂`` from a triangular factor of its own. Per image and
    at ``C`` 1024, ``D`` 4096, 256 tokens: 11.5 G multiply-adds and 9.3 G instead of upstream's
    23.1 G.

    The constants of ``K`` that add the same number to every score of a query are gone; those of
    ``V`` stay, so a query whose keys are all masked still gets zero attention.
    """

    stats_weight: Tensor
    stats_bias: Tensor
    kv_weight: Tensor
    kv_bias: Tensor
    queries: Tensor
    position_table: Tensor
    kv_table: Tensor
    out_weight: Tensor
    out_bias: Tensor
    gain: Tensor
    shift: Tensor
    final_weight: Tensor
    final_bias: Tensor
    out_stats_weight: Tensor
    out_stats_bias: Tensor
    final_shift: Tensor

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        grid: Grid | None = None,
        return_attention: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As :meth:`PerceiverProjector.forward`.

        On another grid than the one folded for, positions are resized after their projection
        instead of before: the same but for the rounding of an fp32 resize.
        """
        self._check(x, self.kv_weight, attn_mask)
        features, key_padding_mask = flatten_batch(x, key_padding_mask, self.config["has_cls"])
        masks: dict[str, Any] = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        table = self._table(grid_of(features.shape[1], grid))
        attended, maps = self._attend(features, table, return_attention, **masks)
        return unflatten_batch(self._project(attended), maps, x.shape[:-2])

    def _attend(
        self, features: Tensor, table: Tensor, return_attention: bool, **masks: Any
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, L, C] -> [B, Q, D]``, maps ``[B, heads, Q, L]``."""
        kv = ops.folded_linear(
            features,
            self.kv_weight,
            self.kv_bias,
            self.stats_weight,
            self.stats_bias,
            table=table,
            eps=self.config["floor"],
        ).unflatten(-1, (2, self.config["num_heads"], -1))  # [B, L, 2, H, d]
        queries = self.queries.to(kv.dtype)
        attended = ops.cross_attention(queries, kv, **masks).flatten(-2)
        if not return_attention:
            return attended, None
        return attended, ops.cross_attention_maps(queries, kv[:, :, 0], **masks)

    def _project(self, attended: Tensor) -> Tensor:
        """Everything behind the attention, ``[B, Q, D] -> [B, Q, D]``."""
        if self.config["out_floor"] is not None:
            return ops.folded_linear(
                attended,
                self.final_weight,
                self.final_bias,
                self.out_stats_weight,
                self.out_stats_bias,
                self.final_shift,
                eps=self.config["out_floor"],
            )
        if self.config["out_eps"] is None:
            return F.linear(attended, self.out_weight, self.out_bias)
        pair = (self.out_weight, self.out_bias, self.gain, self.shift, self.config["out_eps"])
        return ops.linear_norm_linear(attended, *pair, self.final_weight, self.final_bias)

    def _table(self, grid: Grid) -> Tensor:
        """Positions of the keys and, the same in every row, the values' constant: ``[L, 2 D]``."""
        if list(grid) == self.config["grid"]:
            return self.kv_table
        return self._positions.resize(self.position_table, tuple(self.config["query_grid"]), grid)


def weights_digest(projector: nn.Module) -> str:
    """SHA-256 of a module's state dict: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(projector.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
