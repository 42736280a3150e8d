"""Loading a vision model by transformers, with its many-line errors put into one line."""

import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from visproj.errors import InputError
from visproj.files import read_json_object

FAMILIES = {
    "clip_vision_model": "CLIPVisionModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "siglip_vision_model": "SiglipVisionModel",
}


def load(loader: Callable[..., Any], id_or_dir: str, **options: Any) -> Any:
    """Call a ``from_pretrained`` and put its many-line errors into one line."""
    try:
        return loader(id_or_dir, **options)
    except Exception as error:  # whatever transformers makes of what is in the files
        text = repr(error) if isinstance(error, KeyError) else str(error) or repr(error)
        reason = textwrap.shorten(text, 200, placeholder=" ...")
        if Path(id_or_dir).is_dir():
            raise InputError(f"cannot load the encoder directory {id_or_dir}: {reason}") from error
        if not isinstance(error, OSError):
            raise InputError(f"cannot load the encoder {id_or_dir}: {reason}") from error
        raise ConnectionError(
            f"no directory {id_or_dir}, and the model hub did not give it: pass the directory of "
            f"a downloaded model, or leave out --encoder for the offline one ({reason})"
        ) from error


def vision_config(id_or_dir: str) -> Any:
    """The configuration of the vision model, of a family that is known here."""
    from transformers import AutoConfig

    folder = Path(id_or_dir)
    # Without this, transformers 4 guesses the kind of model from the folder's name.
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"the encoder directory {id_or_dir} has no config.json")
    check_json(folder, "config.json")
    loaded = load(AutoConfig.from_pretrained, id_or_dir, trust_remote_code=False)
    config = getattr(loaded, "vision_config", loaded)
    if config.model_type == "siglip2_vision_model":
        raise InputError(
            f"encoder {id_or_dir} is a NaFlex SigLIP 2, whose number of tokens differs between "
            "images: use a SigLIP 2 of a fixed resolution"
        )
    if config.model_type not in FAMILIES:
        raise InputError(
            f"encoder {id_or_dir} is a {config.model_type} model, not a CLIP, SigLIP or DINOv2 one"
        )
    return config


def check_json(folder: Path, name: str) -> dict[str, Any]:
    """What a JSON file of an encoder directory holds; nothing if there is no such file.

    transformers goes on where there is something else than an object, and fails elsewhere.
    """
    if not (folder / name).is_file():
        return {}
    try:
        return read_json_object(folder / name)
    except InputError as error:
        raise InputError(f"cannot load the encoder directory {folder}: {error}") from error


def check_loaded(report: dict[str, Any], name: str) -> None:
    """Raise ``InputError`` unless the weights are those of the model that config.json describes."""
    # Weights beside the vision model (text model, heads) are not wanted, further layers of it are.
    left = [
        key
        for key in report["unexpected_keys"]
        if re.search(r"\blayers?\.\d", key) and not key.startswith("text_model.")
    ]
    # Names in transformers 4, with both shapes in 5.
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    for keys, what in (
        (report["missing_keys"], "lacks the weights"),
        (mismatched, "has other shapes in config.json than of"),
        (left, "has more layers than config.json says:"),
    ):
        if keys:
            shown = sorted(keys)
            more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
            raise InputError(f"encoder {name} {what} {', '.join(shown[:4])}{more}")
