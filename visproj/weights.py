"""Loading of projectors from DeepSpeed-VisualChat checkpoints, and visproj's own save and load."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from visproj.checkpoints import LocalFiles, find_tensors
from visproj.checks import check_module, vision_width
from visproj.contents import (
    PROJECTOR_FORMAT,
    bare_kind,
    by_bare_key,
    compare_shapes,
    folder_of_ours,
    refuse_placeholders,
    top_names,
    what_it_holds,
)
from visproj.errors import InputError
from visproj.files import (
    TensorFile,
    entries_of,
    parse_device,
    parse_dtype,
    read_json_object,
    replacing,
    write_safetensors,
)
from visproj.folding import FoldedProjector
from visproj.positions import Grid, sincos_position_table
from visproj.projectors import LinearProjector, PerceiverProjector, ViTProjector, build_projector
from visproj.projectors.description import build_described, check_described, describe

PREFIX = "projection."
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
# First parts of keys in a file with a projector alone, which a full checkpoint does not have.
_OWN = {"vis_layer", "query", "kv_proj"}
_PROJECTORS = (LinearProjector, ViTProjector, PerceiverProjector)


def load_visualchat_projector(
    path: str | Path, *, vis_config: Any = None, num_heads: int | None = None
) -> nn.Module:
    """Build the projector that a DeepSpeed-VisualChat checkpoint holds under ``projection.*``.

    The kind of projector and its widths are read from the keys and shapes. Prefixes of wrappers
    such as ``module.`` and ``_orig_mod.`` are removed. Only the projector's own tensors are read.
    Pickles are read by PyTorch's restricted unpickler, which runs no code.

    Args:
        path: ``pytorch_model.bin``, a ``.safetensors`` file, or a directory with one of them or
            with an index of shards.
        vis_config: The vision encoder's configuration. A ViT projector needs it, because heads,
            activation and eps of its CLIP layer cannot be read from the weights.
        num_heads: Heads of a Perceiver; upstream's ``max(1, D // 128)`` when ``None``.

    Returns:
        The projector on the CPU, in the checkpoint's dtype and in training mode.

    Warns:
        UserWarning: If a Perceiver's ``pos_embed`` is missing, because DeepSpeed-VisualChat does
            not save it under ZeRO-3. The sine-cosine table is then computed.

    Raises:
        FileNotFoundError: If there is no such file or directory, or a shard is missing.
        ValueError: If a file is damaged, or holds something else, such as a projector alone; or if
            the keys or shapes under ``projection.`` are not those of a projector. The message says
            what was found.

    Source: DeepSpeed-VisualChat ``utils/model/modeling_dsvl.py``, ``self.projection``.
    """
    state = _projection_state(Path(path))
    try:
        if "query" in state and "pos_embed" not in state:
            state["pos_embed"] = _position_table(state)
            warnings.warn(
                f"{path} has no {PREFIX}pos_embed, which DeepSpeed-VisualChat does not save under "
                "ZeRO-3: the sine-cosine table was computed",
                stacklevel=2,
            )
        with torch.device("meta"):
            projector = _build(state, vis_config, num_heads)
        projector.load_state_dict(state, assign=True)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path}, under {PREFIX[:-1]}: {error}") from error
    return projector


def _projection_state(path: Path) -> dict[str, Tensor]:
    """Return copies of the tensors under ``projection.``."""
    if path.is_dir() and (found := folder_of_ours(path)):
        raise InputError(f"{path} is not a DeepSpeed-VisualChat checkpoint, it holds {found}")
    files = _find(path)
    tops = top_names(files)
    ours = {file.metadata.get("format", "").startswith("visproj-") for file in files.values()}
    if tops != {PREFIX[:-1]} or True in ours:
        if PREFIX[:-1] in tops and True not in ours and bare_kind(files) is None:
            raise InputError(
                f"{path} has keys under {PREFIX} and also keys of a projector without this prefix "
                f"({', '.join(sorted(tops - {PREFIX[:-1]}))}): remove one of the two"
            )
        lack = "" if tops else f": it has no keys that begin with {PREFIX!r}"
        raise InputError(
            f"{path} is not a DeepSpeed-VisualChat checkpoint{lack}. It holds {what_it_holds(path)}"
        )
    state = {
        name.removeprefix(PREFIX): files[key].read(key)
        for name, key in by_bare_key(files, str(path)).items()
    }
    refuse_placeholders({key: tensor.shape for key, tensor in state.items()}, str(path))
    return state


def _find(path: Path) -> dict[str, TensorFile]:
    """Return the file of every key that a projector may have, in a checkpoint or alone."""

    def wanted(key: str) -> bool:
        return top_names([key]) <= {PREFIX[:-1], *_OWN}

    if path.is_dir():
        return find_tensors(LocalFiles(path), wanted)[0]
    file = TensorFile(path)
    return {key: file for key in sorted(file.keys) if wanted(key)}


def _build(state: dict[str, Tensor], vis_config: Any, num_heads: int | None) -> nn.Module:
    """Build the projector that has these keys, with the widths of these tensors."""
    if state.keys() & {"query", "kv_proj.weight"}:
        width, vis_dim = _matrix(state, "kv_proj.weight")
        _check_given(vis_config, vis_dim)
        grid = _query_grid(state)
        return PerceiverProjector(vis_dim, width, query_grid=grid, num_heads=num_heads)
    if num_heads is not None:
        raise InputError("num_heads applies only to a Perceiver, which this projector is not")
    if any(key.startswith("vis_layer.") for key in state):
        if vis_config is None:
            raise InputError(
                "this is a ViT projector, whose heads, activation and eps are not in the "
                "checkpoint: pass the vision encoder's configuration as vis_config"
            )
        return ViTProjector(vis_config, _matrix(state, "projection.0.weight")[0])
    width, vis_dim = _matrix(state, "0.weight")
    _check_given(vis_config, vis_dim)
    return LinearProjector(vis_dim, width)


def _check_given(vis_config: Any, vis_dim: int) -> None:
    """Raise if a configuration was given and its width is not the projector's."""
    if vis_config is not None and (given := vision_width(vis_config)) != vis_dim:
        raise InputError(
            f"vis_config has a width of {given}, but the projector takes a width of {vis_dim}"
        )


def _query_grid(state: dict[str, Tensor]) -> Grid:
    """Return the grid whose sine-cosine table is ``pos_embed``; a square if there is none."""
    queries, width = _matrix(state, "query")
    side = math.isqrt(queries)
    table = state.get("pos_embed")
    if table is not None and table.shape == (queries, width) and width % 4 == 0:
        grids = [(n, queries // n) for n in range(1, queries + 1) if queries % n == 0]
        for grid in sorted(grids, key=lambda grid: abs(grid[0] - side)):
            # Twice the rounding error of the file's dtype: tables of two grids differ by more.
            with torch.device("cpu"):
                known = sincos_position_table(width, grid)
            allowed = 2 * torch.finfo(table.dtype).eps
            if torch.allclose(table.float(), known.to(table.dtype).float(), rtol=0, atol=allowed):
                return grid
    if side * side != queries:
        raise InputError(
            f"{queries} queries form no square grid, and pos_embed is not the sine-cosine table of "
            "another grid"
        )
    return side, side


def _position_table(state: dict[str, Tensor]) -> Tensor:
    width = _matrix(state, "query")[1]
    return sincos_position_table(width, _query_grid(state)).to(state["query"].dtype)


def _matrix(state: dict[str, Tensor], key: str) -> tuple[int, int]:
    if key not in state or state[key].ndim != 2:
        raise InputError(f"there is no matrix {key}; the keys are {', '.join(sorted(state))}")
    rows, columns = state[key].shape
    return rows, columns


def save_projector(projector: nn.Module, path: str | Path) -> None:
    """Write a projector to a safetensors file, with whole weights even if training shards them.

    The file's metadata describes the projector, so that :func:`load_projector` can build it again.
    Parameters that DeepSpeed ZeRO-3 or FSDP2 shards are gathered, so every process must call this
    function. Rank 0 writes the file, which is complete when the function returns there.

    Args:
        projector: A projector, which may be compiled or wrapped in DDP or
            :class:`visproj.PretrainedProjector`. For any other module, and for a projector with
            adapters or other replaced layers, only the state dict is written: read it with
            ``load_state_dict(safetensors.torch.load_file(path))``, because ``load_projector``
            raises for it.
        path: The file; an existing file is replaced in one step.

    Raises:
        OSError: If the file cannot be written.
        TypeError: If ``projector`` is not a module, or is a folded one, which has its own ``save``.
        ValueError: If a tensor is not floating point, as in a quantised projector, or has no data.
    """
    check_module("save_projector", projector)
    projector = _unwrapped(projector)
    refuse_folded("save_projector", projector)
    with whole_state(projector) as state:
        if _rank() != 0:
            return
        with replacing(path) as partial:
            write_state(partial, projector, state)


def load_projector(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
) -> nn.Module:
    """Build the projector that :func:`save_projector` or training wrote.

    Args:
        path: The file that :func:`save_projector` wrote, the directory of a
            :class:`visproj.PretrainedProjector`, or the ``OUT`` of ``visproj train`` around it.
        device: The device of the projector.
        dtype: Floating-point dtype to cast to; ``None`` keeps the stored dtype.

    Returns:
        The bare projector in eval mode, with the heads, eps and dropout that it was saved with.

    Raises:
        FileNotFoundError: If there is no such file or directory.
        ValueError: If it is damaged or holds something else; the message says what, and which
            function reads that.
    """
    path, device, dtype = Path(path), parse_device(device), parse_dtype(dtype)
    if path.is_dir():
        return _load_pretrained(path, device, dtype)
    file = TensorFile(path)
    if file.metadata.get("format") != PROJECTOR_FORMAT:
        raise InputError(
            f"{path} holds no projector of format {PROJECTOR_FORMAT}. It holds "
            f"{what_it_holds(path)}"
        )
    try:
        with torch.device("meta"):
            projector = build_described(_description(file))
        load_file_into(projector, file, device, dtype)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return projector.eval()


def _load_pretrained(path: Path, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    folder = find_projector(path)
    if not (folder / CONFIG_NAME).is_file():
        raise InputError(
            f"{path} is not a trained projector's directory: there is no {CONFIG_NAME}. It holds "
            f"{what_it_holds(path)}"
        )
    check_folder(folder)
    config = read_json_object(folder / CONFIG_NAME)
    names = ("kind", "vision", "lang_dim", "query_grid", "has_cls")
    try:
        with torch.device("meta"):
            projector = build_configured(*(config.get(name) for name in names))
        load_file_into(projector, TensorFile(folder / WEIGHTS_NAME), device, dtype)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"cannot load the projector in {folder}: {reason}") from error
    return projector.eval()


def build_configured(
    kind: Any, vision: Any, lang_dim: Any, query_grid: Any, has_cls: Any = None
) -> nn.Module:
    """Build the projector that a :class:`visproj.PretrainedProjector`'s configuration describes."""
    if not isinstance(vision, Mapping):
        raise TypeError(
            f"vision must be a dictionary that describes an encoder, got {type(vision).__name__}"
        )
    options: dict[str, Any] = {} if query_grid is None else {"query_grid": tuple(query_grid)}
    if kind == "perceiver" and has_cls is not None:
        options["has_cls"] = has_cls
    return build_projector(kind, SimpleNamespace(**vision), lang_dim, **options)


def find_projector(path: Path) -> Path:
    """Return the projector's directory: ``path``, or ``projector`` in a training run's folder."""
    inside = path / "projector"
    return inside if inside.is_dir() and not (path / CONFIG_NAME).exists() else path


def check_folder(folder: Path) -> None:
    """Raise unless ``folder`` holds the configuration of a projector, and its weights."""
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"the projector directory {folder} has no {CONFIG_NAME}")
    try:
        config = read_json_object(folder / CONFIG_NAME)
    except InputError as error:
        raise InputError(f"cannot load the projector in {folder}: {error}") from error
    if "model_type" in config and "kind" not in config:
        raise InputError(f"{folder} holds no projector. It holds {what_it_holds(folder)}")
    if not (folder / WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"the projector directory {folder} has no {WEIGHTS_NAME}")


def _description(file: TensorFile) -> dict[str, Any]:
    try:
        description = json.loads(file.metadata["projector"])
        description.pop("dtype")
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"the description of the projector is damaged ({error!r})") from error
    return description


def load_file_into(
    module: nn.Module, file: TensorFile, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Load copies of the weights in ``file`` into ``module``.

    Raises:
        InputError: If the file does not hold exactly the module's tensors, or its metadata
            describes another projector.
    """
    if file.metadata.get("format") == PROJECTOR_FORMAT:
        check_described(module, _description(file), f"{file.path.name} holds")
    stored = {key: file.tensor(key).shape for key in sorted(file.keys)}
    refuse_placeholders(stored, str(file.path))
    wanted = {key: tensor.shape for key, tensor in module.state_dict().items()}
    compare_shapes(stored, wanted, f"a {type(module).__name__} as it is described")
    state = {key: file.read(key, dtype).to(device) for key in stored}
    module.load_state_dict(state, assign=True)


def write_state(path: Path, module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write a module's whole state dict, with the module's description if it has one."""
    description, metadata = describe(module), {}
    if description is not None:
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}
        description["dtype"] = ", ".join(sorted(dtypes))
        metadata = {"format": PROJECTOR_FORMAT, "projector": json.dumps(description)}
    write_safetensors(path, entries_of(state), metadata=metadata)


@contextmanager
def whole_state(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield a module's state dict with whole tensors, also under ZeRO-3 and FSDP2.

    Every process must enter this context.

    Raises:
        InputError: If a tensor cannot be written: it is not floating point, or has no data.
    """
    with _gathered(module):
        state = {key: _whole(tensor) for key, tensor in module.state_dict().items()}
        for key, tensor in state.items():
            parse_dtype(tensor.dtype)
            if tensor.is_meta:
                raise InputError(f"{key} is on the device meta and has no values to write")
        yield state


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the projector inside ``torch.compile``, DDP or ``PretrainedProjector``, or itself."""
    inner: Any = module
    while not isinstance(inner, (*_PROJECTORS, FoldedProjector)):
        children = dict(inner.named_children())
        if len(children) != 1 or not children.keys() <= {"module", "_orig_mod"}:
            return module
        (inner,) = children.values()
    return inner


def refuse_folded(function: str, projector: nn.Module) -> None:
    """Raise ``TypeError`` for a folded projector, which has its own file format."""
    if isinstance(projector, FoldedProjector):
        raise TypeError(
            f"{function} does not take a {type(projector).__name__}: use its own save(path)"
        )


def _rank() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0


def _gathered(module: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which parameters that ZeRO-3 partitioned are whole."""
    partitioned = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)


def _whole(tensor: Any) -> Tensor:
    """Return the whole tensor of a DTensor, and any other tensor unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
