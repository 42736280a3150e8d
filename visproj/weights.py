"""Projector weights out of DeepSpeed-VisualChat checkpoints, and a projector saved by itself."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visproj.errors import InputError
from visproj.files import TensorFile, entries_of, parse_dtype, replacing, write_safetensors
from visproj.projectors import LinearProjector, PerceiverProjector, ViTProjector

PREFIX = "projection."


def load_visualchat_projector(
    path: str | Path, *, vis_config: Any = None, num_heads: int | None = None
) -> nn.Module:
    """Build the projector that a DeepSpeed-VisualChat checkpoint holds under ``projection.*``.

    Which of the three it is and its widths are read from the keys and shapes. Nothing but its own
    tensors is read, pickles by PyTorch's restricted unpickler, which runs no code.

    Args:
        path: ``pytorch_model.bin``, a ``.safetensors`` file, or a directory with one of them or
            with an index of shards.
        vis_config: The vision encoder's configuration, which the ViT projector needs: heads,
            activation and eps of its CLIP layer leave no trace in the weights.
        num_heads: Heads of a Perceiver, ``max(1, D // 128)`` when ``None``, as upstream has it.

    Returns:
        The projector on the CPU, in the checkpoint's dtype and in training mode.

    Raises:
        FileNotFoundError: If there is no such file or directory, or a shard is missing.
        ValueError: If a file is damaged, or if the keys or shapes under ``projection.`` are not
            those of a projector; the message names them.

    Source: DeepSpeed-VisualChat ``utils/model/modeling_dsvl.py``, ``self.projection``.
    """
    state = _projection_state(Path(path))
    try:
        with torch.device("meta"):
            projector = _build(state, vis_config, num_heads)
        projector.load_state_dict(state, assign=True)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path}, below {PREFIX[:-1]}: {error}") from error
    return projector


def _projection_state(path: Path) -> dict[str, Tensor]:
    """The tensors under ``projection.``, copied out of their files."""
    from visproj.qwen_vl.checkpoint import LocalFiles, find_tensors
    from visproj.qwen_vl.keys import a_few

    if path.is_dir():
        found, _, first_keys = find_tensors(LocalFiles(path), _is_ours)
    else:
        file = TensorFile(path)
        found = {key: file for key in sorted(file.keys) if _is_ours(key)}
        first_keys = sorted(file.keys)[:5]
    if not found:
        raise InputError(
            f"{path} has no keys that begin with {PREFIX!r}, so it is no DeepSpeed-VisualChat "
            f"checkpoint; the first keys are {a_few(first_keys)}"
        )
    return {key.removeprefix(PREFIX): file.tensor(key).clone() for key, file in found.items()}


def _is_ours(key: str) -> bool:
    return key.startswith(PREFIX)


def _build(state: dict[str, Tensor], vis_config: Any, num_heads: int | None) -> nn.Module:
    """The projector whose keys these are, with the widths that these tensors have."""
    if "query" in state:
        queries, _ = _matrix(state, "query")
        width, vis_dim = _matrix(state, "kv_proj.weight")
        side = math.isqrt(queries)
        return PerceiverProjector(vis_dim, width, query_grid=(side, side), num_heads=num_heads)
    if any(key.startswith("vis_layer.") for key in state):
        if vis_config is None:
            raise InputError(
                "this is a ViT projector, whose heads, activation and eps are not in the "
                "checkpoint: pass the vision encoder's configuration as vis_config"
            )
        return ViTProjector(vis_config, _matrix(state, "projection.0.weight")[0])
    width, vis_dim = _matrix(state, "0.weight")
    return LinearProjector(vis_dim, width)


def _matrix(state: dict[str, Tensor], key: str) -> tuple[int, int]:
    if key not in state or state[key].ndim != 2:
        raise InputError(f"no matrix {key}; there are {', '.join(sorted(state))}")
    rows, columns = state[key].shape
    return rows, columns


def save_projector(projector: nn.Module, path: str | Path) -> None:
    """Write a projector's state dict to a safetensors file, whole also where training splits it.

    Parameters that DeepSpeed ZeRO-3 keeps in pieces are gathered for it, and FSDP2's DTensors put
    together. Every process has to call this; the one of rank 0 writes, and the file is complete
    once it returns there. ``projector.load_state_dict(safetensors.torch.load_file(path))`` reads
    it back.

    Args:
        projector: A projector, or any other module.
        path: The file; what is there is replaced in one step.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If a tensor is not floating point, as in a quantised projector.
    """
    with _gathered(projector.parameters()):
        state = {key: _whole(tensor) for key, tensor in projector.state_dict().items()}
        for tensor in state.values():
            parse_dtype(tensor.dtype)
        if _rank() != 0:
            return
        with replacing(path) as partial:
            write_safetensors(partial, entries_of(state))


def _rank() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0


def _gathered(parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Where parameters of ZeRO-3 are whole, and any others as they are."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)


def _whole(tensor: Any) -> Tensor:
    """All of a DTensor, and any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
