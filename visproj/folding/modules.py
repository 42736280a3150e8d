"""The folded forms: modules with constant weights, called like the projectors they come from."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visproj import ops
from visproj.checks import check_features
from visproj.contents import FOLDED_FORMAT
from visproj.errors import InputError
from visproj.files import entries_of, replacing, tensor_bytes, write_safetensors
from visproj.folding.algebra import Scaled, or_zeros
from visproj.fusion import Reads, is_plain, linear_layer_norm, why_not_plain, why_touched
from visproj.ops.checks import check_alike
from visproj.ops.folded_linear import Inputs, check_input, fitting_folded_linear


class ScaledLinear(nn.Module):
    """A Linear whose rows are scaled by a norm that is computed from the same input.

    ``rstd (x Wᵀ + a) + shift + table`` with ``rstd = (‖x Rᵀ + r‖² + floor)^(-1/2)``. ``W`` and
    ``a`` are an ``nn.Linear`` child, so that quantisation tools find it. A plain child is fused, a
    replaced one is called. ``R`` (triangular), ``r`` and ``shift`` are buffers. Their shapes fit
    one another by construction, so only the input is checked.

    Args:
        weights: The tensors to hold; they are not copied.
    """

    factor: Tensor
    factor_bias: Tensor
    shift: Tensor

    def __init__(self, weights: Scaled) -> None:
        super().__init__()
        self.linear = frozen_linear(weights.weight, weights.bias)
        self.register_buffer("factor", weights.factor)
        self.register_buffer("factor_bias", weights.factor_bias)
        self.register_buffer("shift", weights.shift)
        self.floor = weights.floor

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        """Compute ``[..., L, C] -> [..., L, N]``.

        ``table [L, columns]`` is added to the first columns of every image.
        """
        scale = (self.factor, self.factor_bias, self.shift, table, self.floor)
        if is_plain(self, _PRODUCT):
            linear = self.linear
            check_input(x, linear.weight, table)
            return fitting_folded_linear(Inputs(x, linear.weight, linear.bias, *scale))
        return ops.scale_rows(self.linear(x), x, *scale)


_PRODUCT: Reads = {"linear": nn.Linear}


class Replaced(NamedTuple):
    """The module that a folded module replaces inside a model.

    Attributes:
        path: Its name inside the model.
        original: The module, or ``None`` if it was not kept.
    """

    path: str
    original: nn.Module | None


class FoldedProjector(nn.Module):
    """The base class of the folded forms: constant weights, and a record of what was folded.

    Attributes:
        config: Widths, grids, eps and a digest of the weights that were folded, as JSON values.
        replaced: The module that :func:`visproj.convert` replaced by this one, or ``None``.
    """

    config: dict[str, Any]
    replaced: Replaced | None = None

    def replace(self, path: str, original: nn.Module | None) -> None:
        """Record that this module replaces ``original`` inside a model; ``None`` if not kept."""
        self.__dict__["replaced"] = Replaced(path, original)  # not registered as a child

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return its own state dict; as part of a model's, that of the original module.

        Raises:
            ValueError: If it is part of a model's state dict and the original was not kept.
        """
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        if self.replaced is None or not prefix:
            return super().state_dict(*args, **kwargs)
        if self.replaced.original is None:
            raise InputError(
                f"{self.replaced.path} was folded by visproj.convert, and its original weights, "
                "which a checkpoint needs, were not kept: save the model before it is folded, fold "
                "with keep=True, or write this module alone with its save()"
            )
        return self.replaced.original.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.replaced is not None and prefix:
            raise InputError(
                f"{self.replaced.path} was folded by visproj.convert: load the model before it is "
                "folded, or put its modules back with visproj.revert first"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.replaced is not None and self.replaced.original is not None:
            self.replaced.original._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @property
    def like(self) -> Tensor:
        """A weight of the dtype and device that features must have."""
        raise NotImplementedError

    def check(self, x: Tensor, attn_mask: Tensor | None = None) -> None:
        """Raise if ``x`` cannot be projected, or if a gradient is required."""
        like = self.like
        check_features(x, self.config["vis_dim"])
        if x.dtype != like.dtype or x.device != like.device:
            check_alike("visual features", x, "the folded weights", like)
        if torch.is_grad_enabled() and (
            x.requires_grad
            or (isinstance(attn_mask, Tensor) and attn_mask.requires_grad)
            or any(parameter.requires_grad for parameter in self.parameters())
        ):
            raise RuntimeError(
                "a folded projector is inference-only and has no gradients: train the projector "
                "that it was folded from, or call it under torch.no_grad()"
            )

    def is_stale(self, projector: nn.Module) -> bool:
        """Return whether ``projector``'s weights differ from those that were folded; warn if so."""
        stale = weights_digest(projector) != self.config["digest"]
        if stale:
            warnings.warn(
                f"{type(projector).__name__} has changed since it was folded: fold it again",
                stacklevel=2,
            )
        return stale

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, with metadata about what was folded and for which grid.

        Raises:
            OSError: If the file cannot be written.
        """
        metadata = {
            "format": FOLDED_FORMAT,
            "class": type(self).__name__,
            "config": json.dumps(self.config),
        }
        with replacing(path) as partial:
            write_safetensors(partial, entries_of(self.state_dict()), metadata=metadata)

    def extra_repr(self) -> str:
        """Return the configuration without the digest."""
        return ", ".join(f"{key}={value}" for key, value in self.config.items() if key != "digest")


class FoldedLinear(FoldedProjector):
    """A ``LinearProjector`` with constant weights: ``[..., S, C] -> [..., S, D]``.

    It remains a Linear and a LayerNorm, which is the fastest form: as a :class:`ScaledLinear` it
    took 17.8, 53 and 186 µs on the kernels instead of 9.5, 36 and 145 for 1, 8 and 32 images (H200,
    C 1024, D 4096, 257 tokens, bf16).
    """

    def __init__(self, config: dict[str, Any], product: nn.Sequential) -> None:
        super().__init__()
        self.config = config
        self.product = product

    @property
    def like(self) -> Tensor:
        """See :attr:`FoldedProjector.like`."""
        norm: Any = self.product[1]
        return norm.weight

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`LinearProjector.forward`."""
        self.check(x)
        if is_plain(self.product, _LINEAR_NORM):
            return linear_layer_norm(x, *self.product)
        return self.product(x)


_LINEAR_NORM: Reads = {"0": nn.Linear, "1": nn.LayerNorm}


class FoldedViT(FoldedProjector):
    """A ``ViTProjector`` with its CLIP layer frozen and its tail as a :class:`FoldedLinear`."""

    def __init__(self, config: dict[str, Any], vis_layer: nn.Module, tail: FoldedLinear) -> None:
        super().__init__()
        self.config = config
        self.vis_layer = vis_layer.requires_grad_(False)
        self.tail = tail

    @property
    def like(self) -> Tensor:
        """See :attr:`FoldedProjector.like`."""
        return self.tail.like

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`ViTProjector.forward`."""
        self.check(x)
        return self.tail(self.vis_layer(x))


def fold_linear(projection: nn.Sequential, dtype: torch.dtype | None) -> FoldedLinear:
    """Fold a plain Linear and the plain LayerNorm after it; the caller adds the digest."""
    linear: Any
    norm: Any
    linear, norm = projection
    dtype = linear.weight.dtype if dtype is None else dtype
    config: dict[str, Any] = {
        "vis_dim": linear.in_features,
        "lang_dim": linear.out_features,
        "eps": norm.eps,
    }
    product = nn.Sequential(copied_linear(linear, dtype), copied_norm(norm, dtype))
    return FoldedLinear(config, product)


def copied_linear(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """Return a frozen copy, with a bias of zero if there was none."""
    bias = or_zeros(linear.bias, linear.weight)
    return frozen_linear(own(linear.weight, dtype), own(bias, dtype))


def copied_norm(norm: nn.LayerNorm, dtype: torch.dtype) -> nn.LayerNorm:
    """Return a frozen copy, with a shift of zero if there was none."""
    shift = or_zeros(norm.bias, norm.weight)
    return frozen_norm(own(norm.weight, dtype), own(shift, dtype), norm.eps)


def frozen_linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Return an ``nn.Linear`` with these tensors as frozen parameters."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def frozen_norm(gain: Tensor, shift: Tensor, eps: float) -> nn.LayerNorm:
    """Return an ``nn.LayerNorm`` with these tensors as frozen parameters."""
    norm = nn.LayerNorm(gain.shape[0], eps=eps, device="meta")
    norm.weight = nn.Parameter(gain, requires_grad=False)
    norm.bias = nn.Parameter(shift, requires_grad=False)
    return norm


def check_foldable(projector: nn.Module, kind: type[nn.Module], reads: Reads) -> None:
    """Raise ``InputError`` unless ``projector`` can be folded as a ``kind``.

    Its ``forward`` must be that of ``kind``, it must have no hooks, and the children in ``reads``
    must be plain (:func:`visproj.fusion.why_not_plain`). Every parameter must be whole and hold
    values.
    """
    name = type(projector).__name__
    for parameter_name, parameter in projector.named_parameters():
        if parameter.is_meta:
            raise InputError(
                f"cannot fold {name}: its {parameter_name} is on the device meta and has no values"
            )
        if getattr(parameter, "ds_shape", parameter.shape) != parameter.shape:
            raise InputError(
                f"cannot fold {name}: ZeRO-3 has partitioned its {parameter_name}; fold inside "
                "deepspeed.zero.GatheredParameters"
            )
    reason = why_touched(projector)
    if type(projector).forward is not kind.forward:
        reason = "its class has a forward of its own"
    if reason:
        raise InputError(f"cannot fold {name}: {reason}, which would be lost")
    if found := why_not_plain(projector, reads):
        raise InputError(
            f"cannot fold {found[0]} of {name}: {found[1]}; merge adapters, remove hooks and call "
            "eval() before folding"
        )


def copied(weights: Scaled, dtype: torch.dtype) -> Scaled:
    """Return copies of the tensors in ``dtype``."""
    tensors: dict[str, Any] = {
        name: own(value, dtype) for name, value in weights._asdict().items() if name != "floor"
    }
    return weights._replace(**tensors)


def own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a detached, contiguous copy in ``dtype``."""
    return tensor.detach().to(dtype, copy=True).contiguous()


def weights_digest(projector: nn.Module) -> str:
    """Return the SHA-256 digest of a module's state dict: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(projector.state_dict().items()):
        if not isinstance(value, Tensor):  # packed weights of a quantised module
            digest.update(f"{name} {value!r}".encode())
            continue
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(tensor_bytes(value.detach()))
    return digest.hexdigest()
