"""A trained projector as a checkpoint of its own: its weights, and what it was trained between."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from visproj.errors import InputError
from visproj.projectors import build_projector
from visproj.vlm.encoders import VisionEncoder

WEIGHTS_NAME = "model.safetensors"


class PretrainedProjector(nn.Module, PyTorchModelHubMixin, library_name="visproj"):
    """Any of the projectors with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    The directory holds ``model.safetensors`` with the projector's own keys, those of
    DeepSpeed-VisualChat, and ``config.json`` with the arguments below. Weights are loaded strictly.

    Args:
        kind: ``"baseline"``, ``"vit"`` or ``"perceiver"``.
        vision: The encoder's description, an :class:`~visproj.vlm.encoders.EncoderConfig` as a
            dictionary: width, heads, image and patch size.
        lang_dim: Width of the language model.
        encoder: Name of the vision encoder.
        language_model: Name of the language model.
        prompt: What it was asked in training.
        query_grid: Rows and columns of a Perceiver's queries; 16 by 16 when ``None``.
    """

    def __init__(
        self,
        kind: str,
        vision: dict[str, Any],
        lang_dim: int,
        encoder: str,
        language_model: str,
        prompt: str,
        query_grid: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.vision = vision
        self.lang_dim = lang_dim
        self.encoder = encoder
        self.language_model = language_model
        self.prompt = prompt
        options: dict[str, Any] = {} if query_grid is None else {"query_grid": tuple(query_grid)}
        self.module = build_projector(kind, SimpleNamespace(**vision), lang_dim, **options)

    def forward(self, *args: Any, **options: Any) -> Any:
        """As the projector's own."""
        return self.module(*args, **options)

    def fold(self, **options: Any) -> nn.Module:
        """:func:`visproj.fold` of the projector."""
        from visproj.folding import fold

        return fold(self.module, **options)

    def check_encoder(self, encoder: VisionEncoder) -> None:
        """Raise ``ValueError`` unless ``encoder`` is the one it was trained with."""
        given, wanted = _as_json(asdict(encoder.config)), _as_json(self.vision)
        # A model's directory may have moved, or be a copy of what was fetched from the hub.
        if Path(encoder.name).name == Path(self.encoder).name and given == wanted:
            return
        differing = [f"{key} {given[key]}" for key in given if given[key] != wanted.get(key)]
        raise InputError(
            f"the projector was trained with the encoder {self.encoder}, not with {encoder.name}"
            + (f" ({', '.join(differing)})" if differing else "")
        )

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> str | None:
        """Write the checkpoint; one that is there survives whole if the new one cannot be written.

        A README.md that is there stays. Options are the mixin's.

        Raises:
            OSError: The directory cannot be written; the message names it.
        """
        final = Path(save_directory)
        try:
            final.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=final, prefix=".partial-") as partial:
                super().save_pretrained(partial, **options)
                for file in Path(partial).iterdir():
                    if file.name != "README.md" or not (final / file.name).exists():
                        os.replace(file, final / file.name)
        except OSError as error:
            raise OSError(f"cannot save the projector in {final}: {error}") from error
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or final.resolve().name, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        """The projector's own keys. A file of safetensors' making would be its owner's alone."""
        weights = {key: value.contiguous() for key, value in self.module.state_dict().items()}
        (save_directory / WEIGHTS_NAME).write_bytes(save(weights, {"format": "pt"}))

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        map_location: str = "cpu",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        proxies: Any = None,  # huggingface_hub passes these two before its version 1
        resume_download: Any = None,
        **arguments: Any,
    ) -> PretrainedProjector:
        """What the mixin's ``from_pretrained`` calls, strict and without a word on stdout."""
        file = Path(model_id, WEIGHTS_NAME)
        if not Path(model_id).is_dir():
            file = Path(
                hf_hub_download(
                    model_id,
                    WEIGHTS_NAME,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        projector = cls(**arguments)
        projector.module.load_state_dict(load_file(file, device=map_location))
        return projector.to(map_location).eval()


def load_pretrained(directory: str | Path) -> PretrainedProjector:
    """The checkpoint in ``directory``, in eval mode.

    Raises:
        FileNotFoundError: There is no such directory, or it lacks a file.
        ValueError: The configuration or the weights are damaged, or not each other's.
    """
    for name in ("config.json", WEIGHTS_NAME):
        if not Path(directory, name).is_file():
            raise FileNotFoundError(f"the projector directory {directory} has no {name}")
    try:
        return PretrainedProjector.from_pretrained(directory)
    except (RuntimeError, SafetensorError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"cannot load the projector in {directory}: {reason}") from error


def _as_json(config: dict[str, Any]) -> dict[str, Any]:
    """Tuples as the lists that JSON makes of them."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in config.items()
    }
