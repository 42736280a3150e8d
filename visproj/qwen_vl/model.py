"""The Qwen-VL vision encoder: a pre-norm transformer over patches, then a Perceiver resampler."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visproj.errors import InputError
from visproj.ops.checks import check_device, check_floating
from visproj.positions import Grid, PositionedModule
from visproj.projectors.resamplers import QwenVLResampler
from visproj.qwen_vl.config import QwenVisionConfig


class VisualAttention(nn.Module):
    """Multi-head self-attention through SDPA, ``[B, L, W] -> [B, L, W]``.

    The ``3 W`` outputs of ``in_proj`` are laid out head by head, ``[q, k, v]`` within a head.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every token to every token."""
        per_head = (self.num_heads, 3, x.shape[-1] // self.num_heads)
        q, k, v = self.in_proj(x).unflatten(-1, per_head).transpose(1, 2).unbind(3)  # [B, H, L, d]
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class VisualAttentionBlock(nn.Module):
    """A pre-norm block: ``x = x + attn(ln_1(x))``, then ``x + mlp(ln_2(x))``, with exact GELU."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        width = config.width
        self.ln_1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.ln_2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attn = VisualAttention(width, config.heads)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, config.mlp_width),
                gelu=nn.GELU(),
                c_proj=nn.Linear(config.mlp_width, width),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block: ``[B, L, W] -> [B, L, W]``."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisualTransformer(nn.Module):
    """A sequence of blocks, each recomputed in the backward with gradient checkpointing."""

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(VisualAttentionBlock(config) for _ in range(config.layers))
        self.checkpointing: dict[str, Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks: ``[B, L, W] -> [B, L, W]``."""
        for block in self.resblocks:
            if self.checkpointing is not None and torch.is_grad_enabled():
                x = checkpoint(block, x, **self.checkpointing)
            else:
                x = block(x)
        return x


class QwenVisionTransformer(PositionedModule):
    """Qwen-VL's vision encoder: from an image, ``n_queries`` tokens of width ``output_dim``.

    ``x = ln_pre(conv1(image) + positions)``; ``layers`` pre-norm blocks; attention pooling;
    ``ln_post``. Patches are ``conv1``'s cells in row-major order. ``positions`` and the positions
    of the pooling's keys are square tables resized bicubically to the grid of patches, in fp32.
    Every LayerNorm has eps 1e-6. At the released size a 448 x 448 image gives 1024 patches and 256
    tokens of width 4096.

    State-dict keys are Qwen-VL-Chat's without their prefix ``transformer.visual.``:
    ``conv1.weight``, ``positional_embedding``, ``ln_pre.*``,
    ``transformer.resblocks.N.{ln_1, ln_2, attn.in_proj, attn.out_proj, mlp.c_fc, mlp.c_proj}.*``,
    ``attn_pool.*``, ``ln_post.*``;
    :func:`visproj.qwen_vl.expected_shapes` lists them. Initial weights follow upstream's rules.

    An encoder starts frozen and in eval mode. ``requires_grad_()`` makes all parameters trainable
    except the sine-cosine table ``attn_pool.pos_embed``.

    Args:
        config: The architecture.

    Source: DeepSpeed-VisualChat ``utils/model/third_party_model/qwen_clip/qwen_clip.py``; Bai et
    al. 2023, Qwen-VL.
    """

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.config = config
        width, eps = config.width, config.layer_norm_eps
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        table = torch.randn(config.positions, width) * width**-0.5
        self.positional_embedding = nn.Parameter(table)
        self.ln_pre = nn.LayerNorm(width, eps=eps)
        self.transformer = VisualTransformer(config)
        side = math.isqrt(config.n_queries)
        self.attn_pool = QwenVLResampler(
            width,
            config.output_dim,
            query_grid=(side, side),
            num_heads=config.pool_heads,
            eps=eps,
        )
        self.ln_post = nn.LayerNorm(config.output_dim, eps=eps)
        self.requires_grad_(False).eval()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixel_values: Normalised pixels ``[B, 3, h, w]``, floating, cast to the weights' dtype;
                ``h`` and ``w`` are multiples of ``patch_size``, not necessarily ``image_size``.

        Returns:
            ``[B, n_queries, output_dim]`` in the weights' dtype (``ln_post``'s under autocast).

        Raises:
            TypeError: If the pixels are not floating point.
            ValueError: If their shape or device does not fit.
        """
        grid = self._check(pixel_values)
        patches = self.conv1(pixel_values.to(self.conv1.weight.dtype))
        x = patches.flatten(2).transpose(1, 2)  # [B, L, W]
        side = math.isqrt(self.config.positions)
        x = x + self._resized(self.positional_embedding, (side, side), grid)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(self.attn_pool(x, grid=grid))

    def _check(self, pixel_values: Tensor) -> Grid:
        """Return the grid of patches, or raise as :meth:`forward` says."""
        check_floating("pixel_values", pixel_values)
        check_device("pixel_values", pixel_values, "conv1.weight", self.conv1.weight)
        shape = list(pixel_values.shape)
        if len(shape) != 4 or shape[1] != 3:
            raise InputError(f"pixel_values must be [B, 3, h, w], got shape {shape}")
        patch = self.config.patch_size
        if any(side % patch or not side for side in shape[2:]):
            raise InputError(
                f"the sides of an image must be positive multiples of {patch}, got "
                f"{shape[2]}x{shape[3]}"
            )
        return shape[2] // patch, shape[3] // patch

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Recompute each block's activations in the backward instead of keeping them.

        Args:
            gradient_checkpointing_kwargs: Keyword arguments of
                ``torch.utils.checkpoint.checkpoint``; ``use_reentrant`` is ``False`` by default.
        """
        self.transformer.checkpointing = {
            "use_reentrant": False,
            **(gradient_checkpointing_kwargs or {}),
        }

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again instead of recomputing them."""
        self.transformer.checkpointing = None

    @property
    def is_gradient_checkpointing(self) -> bool:
        """True if blocks are recomputed in the backward."""
        return self.transformer.checkpointing is not None

    def requires_grad_(self, requires_grad: bool = True) -> QwenVisionTransformer:
        """Unfreeze or freeze every parameter except the sine-cosine table, which stays frozen."""
        super().requires_grad_(requires_grad)
        if isinstance(self.attn_pool, QwenVLResampler):  # not if a folded one has replaced it
            self.attn_pool.pos_embed.requires_grad_(False)
        return self

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, dtype: torch.dtype | None = None
    ) -> QwenVisionTransformer:
        """Load an encoder that ``visproj extract`` or :meth:`save_pretrained` wrote.

        Args:
            directory: Directory with ``config.json``, and ``model.safetensors`` or
                ``pytorch_model.bin``.
            dtype: Floating-point dtype to cast to; ``None`` keeps the stored dtype.

        Returns:
            The encoder on the CPU, frozen and in eval mode.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged, or if tensors are missing, unexpected or of another
                shape; the message names them.
        """
        from visproj.qwen_vl.storage import load_encoder_tensors

        config = QwenVisionConfig.from_pretrained(directory)
        tensors = load_encoder_tensors(Path(directory), config, dtype)
        with torch.device("meta"):
            encoder = cls(config)
        encoder.load_state_dict(tensors, strict=True, assign=True)
        return encoder

    def save_pretrained(self, destination: str | Path, *, overwrite: bool = False) -> None:
        """Write all files that :meth:`from_pretrained` and ``CLIPImageProcessor`` load, or none.

        Args:
            destination: A directory that does not exist yet.
            overwrite: Replace an existing encoder.

        Raises:
            FileExistsError: If the destination exists, and is not an encoder or ``overwrite`` is
                false.
            OSError: If it cannot be written; the destination is then unchanged.
            ValueError: If the module's tensors are not those of its config, for example because of
                adapters that were not merged.
        """
        from visproj.files import entries_of
        from visproj.qwen_vl.storage import write_encoder

        write_encoder(destination, self.config, entries_of(self.state_dict()), overwrite=overwrite)
