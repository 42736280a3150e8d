"""Recognition of weight files and folders by keys and shapes, with texts for error messages."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from visproj.checkpoints import LocalFiles, find_tensors
from visproj.errors import InputError
from visproj.files import TensorFile, read_json_object

FOLDED_FORMAT = "visproj-folded-4"
PROJECTOR_FORMAT = "visproj-projector-1"

# torch.compile, FSDP and activation checkpointing may wrap any child; the others wrap a model.
_WRAPPED_CHILD = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_WRAPPED_MODEL = re.compile(r"^(?:base_model\.model\.|module\.|model\.)+")
_BASELINE = {"0.weight", "0.bias", "1.weight", "1.bias"}


def bare_key(key: str) -> str:
    """Return ``key`` without the prefixes of wrappers such as ``module.`` and ``_orig_mod.``."""
    return _WRAPPED_MODEL.sub("", _WRAPPED_CHILD.sub("", key))


def by_bare_key(keys: Iterable[str], where: str) -> dict[str, str]:
    """Return a dictionary from the :func:`bare_key` of each key to the key.

    Raises:
        InputError: If two keys differ only in their prefixes.
    """
    found: dict[str, str] = {}
    for key in keys:
        name = bare_key(key)
        if name in found:
            raise InputError(f"{where} holds {name} twice, as {found[name]} and as {key}")
        found[name] = key
    return found


def top_names(keys: Iterable[str]) -> set[str]:
    """Return the first part of every key, without the prefixes of wrappers."""
    return {bare_key(key).partition(".")[0] for key in keys}


def bare_kind(keys: Collection[str]) -> str | None:
    """Return the kind of the projector that has these keys without a prefix, or ``None``."""
    if {"query", "kv_proj"} <= (tops := top_names(keys)):
        return "perceiver"
    if "vis_layer" in tops:
        return "vit"
    return "baseline" if keys and {bare_key(key) for key in keys} <= _BASELINE else None


def what_it_holds(path: Path) -> str:
    """Describe what a weight file or a model's folder holds and which function reads it.

    Raises:
        FileNotFoundError: If there are no weights at all.
        InputError: If a file is damaged.
    """
    if path.is_dir():
        if found := folder_of_ours(path):
            return found
        if found := _projector_file(path):
            return found
        tensors, _, _ = find_tensors(LocalFiles(path), lambda key: True)
        return _describe_file("", tensors)
    file = TensorFile(path)
    return _describe_file(file.metadata.get("format", ""), file.keys)


def folder_of_ours(path: Path) -> str | None:
    """Describe what visproj wrote into a folder and which function reads it, or return ``None``."""
    config = _config(path)
    if {"kind", "vision"} <= config.keys() or _config(path / "projector"):
        return (
            "a trained projector: load it with load_projector or PretrainedProjector."
            "from_pretrained"
        )
    if config.get("model_type") == "qwen_vl_vision_encoder":
        return "a Qwen-VL vision encoder: load it with QwenVisionTransformer.from_pretrained"
    return None


def _projector_file(folder: Path) -> str | None:
    """Describe the first file in a folder that holds a single projector, or return ``None``."""
    for path in sorted(folder.glob("*.safetensors")):
        form = TensorFile(path).metadata.get("format", "")
        if form.startswith("visproj-"):
            return f"the file {path.name}, {_describe_file(form, ())}"
    return None


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return read_json_object(path) if path.is_file() else {}
    except InputError:
        return {}


def _describe_file(form: str, keys: Collection[str]) -> str:
    if form.startswith("visproj-folded-"):
        return "a folded projector: load it with load_folded"
    if form == PROJECTOR_FORMAT:
        return "a projector that save_projector wrote: load it with load_projector"
    if form.startswith("visproj-projector-"):
        return f"a projector of format {form}, which a newer visproj reads"
    if any("transformer.visual." in key for key in keys):
        return "a Qwen-VL checkpoint: take its encoder out with extract_vision_encoder"
    if kind := bare_kind(keys):
        return (
            f"the weights of a {kind} projector without its description: build one with "
            "build_projector and give it these weights with load_state_dict"
        )
    tops = top_names(keys)
    if "projection" in tops:
        return "a DeepSpeed-VisualChat checkpoint: load it with load_visualchat_projector"
    if "attn_pool" in tops:
        return (
            "a Qwen-VL vision encoder: load its folder with QwenVisionTransformer.from_pretrained"
        )
    if not keys:
        return "no tensors"
    return f"something else, whose first keys are {a_few(sorted(keys), 5)}"


def refuse_placeholders(shapes: Mapping[str, Sequence[int]], where: str) -> None:
    """Raise ``InputError`` if tensors are placeholders for weights that ZeRO-3 partitioned."""
    empty = [name for name, shape in shapes.items() if list(shape) == [0]]
    if empty:
        raise InputError(
            f"{where} holds placeholders of shape [0] ({a_few(empty, 3)}): DeepSpeed ZeRO-3 has "
            "partitioned these weights. Merge them with the zero_to_fp32.py in the run's folder, "
            "or set stage3_gather_16bit_weights_on_model_save and save with save_16bit_model"
        )


def compare_shapes(
    found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]], whose: str
) -> None:
    """Raise ``InputError`` naming missing, unexpected and misshapen tensors, if there are any."""

    def shown(shapes: Mapping[str, Sequence[int]], names: list[str]) -> str:
        return a_few([f"{name} {list(shapes[name])}" for name in names])

    complaints = []
    if missing := [name for name in wanted if name not in found]:
        complaints.append(f"missing {shown(wanted, missing)}")
    if unexpected := [name for name in found if name not in wanted]:
        complaints.append(f"unexpected {shown(found, unexpected)}")
    misshapen = [n for n in wanted if n in found and tuple(found[n]) != tuple(wanted[n])]
    if misshapen:
        different = [f"{n} {list(found[n])}, not {list(wanted[n])}" for n in misshapen]
        complaints.append(f"of another shape {a_few(different)}")
    if complaints:
        raise InputError(f"the tensors are not those of {whose}: {'; '.join(complaints)}")


def a_few(names: Iterable[str], most: int = 20) -> str:
    """Return the first names as text, with the number of further ones."""
    names = list(names)
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more
