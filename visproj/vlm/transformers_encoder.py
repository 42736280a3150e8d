"""Loading a vision model by transformers, with errors shortened to one line."""

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
    """Call a ``from_pretrained``, with errors shortened to one line."""
    try:
        return loader(id_or_dir, **options)
    except Exception as error:  # transformers can raise anything for damaged files
        text = repr(error) if isinstance(error, KeyError) else str(error) or repr(error)
        reason = textwrap.shorten(text, 200, placeholder=" ...")
        if Path(id_or_dir).is_dir():
            raise InputError(f"cannot load the encoder directory {id_or_dir}: {reason}") from error
        if not isinstance(error, OSError):
            raise InputError(f"cannot load the encoder {id_or_dir}: {reason}") from error
        raise ConnectionError(
            f"{id_or_dir} is not a local directory and could not be downloaded from the model hub: "
            "pass the directory of a downloaded model, or leave out --encoder to use the offline "
            f"encoder ({reason})"
        ) from error


def vision_config(id_or_dir: str) -> Any:
    """Return the configuration of a vision model, which must be of a family in ``FAMILIES``."""
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
    """Return the object in a JSON file of an encoder directory, or ``{}`` without such a file.

    transformers accepts a file that does not hold an object, and then fails elsewhere.
    """
    if not (folder / name).is_file():
        return {}
    try:
        return read_json_object(folder / name)
    except InputError as error:
        raise InputError(f"cannot load the encoder directory {folder}: {error}") from error


def check_loaded(report: dict[str, Any], name: str) -> None:
    """Raise ``InputError`` unless the weights are those of the model that config.json describes."""
    # Unused weights of a text model or of heads are fine, those of further vision layers are not.
    left = [
        key
        for key in report["unexpected_keys"]
        if re.search(r"\blayers?\.\d", key) and not key.startswith("text_model.")
    ]
    # Entries are names in transformers 4, and names with both shapes in 5.
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    for keys, what in (
        (report["missing_keys"], "lacks the weights"),
        (mismatched, "does not have the shapes of config.json in"),
        (left, "has more layers than config.json says:"),
    ):
        if keys:
            shown = sorted(keys)
            more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
            raise InputError(f"encoder {name} {what} {', '.join(shown[:4])}{more}")
