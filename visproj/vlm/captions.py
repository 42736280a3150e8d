"""Photographs with captions: the caller's own folder, or the set that comes with visproj."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from visproj.errors import InputError
from visproj.vlm.bundled import bundled_file
from visproj.vlm.language import IMAGE_TOKEN
from visproj.vlm.photographs import Photograph, free_name, read_rgb

if TYPE_CHECKING:
    from visproj.vlm.model import VisualLanguageModel

CAPTIONS = "captions.jsonl"


@dataclass(frozen=True)
class CaptionedPhotograph(Photograph):
    """A photograph and what it shows."""

    captions: tuple[str, ...]


def load_captions(folder: Path | None = None) -> list[CaptionedPhotograph]:
    """Read ``captions.jsonl`` and check that every image it names can be decoded.

    A line is ``{"image": "a.jpg", "captions": ["...", "..."]}``, or has ``caption`` with one text
    instead of ``captions``. Blank lines are skipped.

    Args:
        folder: Where ``captions.jsonl`` lies, and what its image paths are relative to; None
            means the 15 photographs of scikit-image and scikit-learn, four captions each.

    Raises:
        FileNotFoundError: There is no ``captions.jsonl`` or not every image of it.
        InputError: A line is not what is described above, a caption has ``<image>`` in it, the
            image is damaged, lies outside the folder or was on an earlier line, or there are no
            lines. The message has the file, the number of the line and what is wrong.
        ModuleNotFoundError: No folder was given and scikit-image or scikit-learn is not installed.
    """
    file = bundled_file("visproj", f"vlm/{CAPTIONS}") if folder is None else folder / CAPTIONS
    if not file.is_file():
        raise FileNotFoundError(f"no such captions file: {file}")
    loaded: list[CaptionedPhotograph] = []
    line_of: dict[Path, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        path, captions = _parse(line, where)
        if path in line_of:
            raise InputError(f"{where}: the image {path} was on line {line_of[path]} already")
        line_of[path] = number
        name = free_name(path.stem, {photograph.name for photograph in loaded})
        image, size = _check_image(folder, path, where)
        loaded.append(CaptionedPhotograph(name, image, size, captions))
    if not loaded:
        raise InputError(f"{file} has no lines")
    return loaded


def _parse(line: bytes, where: str) -> tuple[Path, tuple[str, ...]]:
    """The image's path and the captions on one line."""
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 ({error})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise InputError(f"{where}: not a JSON object but {line.decode('utf-8-sig').strip():.40}")
    if unknown := sorted(entry.keys() - {"image", "caption", "captions"}):
        raise InputError(f"{where}: unknown keys {unknown}")
    if "image" not in entry:
        raise InputError(f"{where}: the key image is missing")
    if ("caption" in entry) == ("captions" in entry):
        raise InputError(f"{where}: one of the keys caption and captions is needed, not both")
    return _image_path(entry["image"], where), _captions(entry, where)


def _image_path(image: object, where: str) -> Path:
    if not _is_text(image):
        raise InputError(f"{where}: image is {image!r}, not a path")
    path = Path(str(image))
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"{where}: the image {image} leaves the folder of the captions file")
    return path


def _captions(entry: dict[str, object], where: str) -> tuple[str, ...]:
    captions = entry["captions"] if "captions" in entry else [entry["caption"]]
    if not isinstance(captions, list) or not captions:
        raise InputError(f"{where}: captions is {captions!r}, not a list of texts")
    for caption in captions:
        if not _is_text(caption):
            raise InputError(f"{where}: the caption {caption!r} is not a text, or is blank")
        if IMAGE_TOKEN in caption:
            raise InputError(f"{where}: the caption {caption!r} has {IMAGE_TOKEN} in it")
        if not _is_unicode(caption):
            raise InputError(f"{where}: the caption {caption!r} has half a surrogate pair in it")
    return tuple(caption.strip() for caption in captions)


def check_captions(
    photographs: Sequence[CaptionedPhotograph], prompt: str, model: "VisualLanguageModel"
) -> None:
    """Raise unless the model can be trained on every caption: what is known with a tokenizer only.

    Raises:
        InputError: A caption has no tokens, or is longer than the language model reads after an
            image and the prompt; the message has the photograph and the caption.
    """
    for photograph in photographs:
        for caption in photograph.captions:
            _check_caption(photograph.name, caption, prompt, model)


def _check_caption(name: str, caption: str, prompt: str, model: "VisualLanguageModel") -> None:
    try:
        model.check_answer(prompt, caption)
    except InputError as error:
        raise InputError(f"the caption {caption!r:.60} of {name}: {error}") from error


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _check_image(folder: Path | None, path: Path, where: str) -> tuple[Path, tuple[int, int]]:
    """The file and the size of the image at ``path`` below the folder.

    Without a folder ``path`` begins with the name of the package that the image is in.
    """
    try:
        file = (
            bundled_file(path.parts[0], "/".join(path.parts[1:]))
            if folder is None
            else folder / path
        )
        return file, read_rgb(file).size
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: {error}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: {error}") from error
