"""A trained projector's checkpoint: its weights, and the models that it was trained with."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from torch import nn

from visproj.errors import InputError
from visproj.files import TensorFile, parse_device, parse_dtype
from visproj.projectors.description import check_described, describe
from visproj.vlm.encoders import VisionEncoder
from visproj.weights import (
    WEIGHTS_NAME,
    build_configured,
    check_folder,
    find_projector,
    load_file_into,
    refuse_folded,
    whole_state,
    write_state,
)

__all__ = ["PretrainedProjector", "find_projector", "load_pretrained", "located"]

MODEL_CARD = """\
---
{{ card_data }}
---

# A {{ kind }} projector from {{ encoder }} to {{ language_model }}

It turns the features of a frozen vision encoder into tokens for a frozen language model.

- kind: {{ kind }}
- widths: {{ vis_dim }} (vision encoder) to {{ lang_dim }} (language model)
- parameters: {{ parameters }}
- vision encoder: {{ encoder }}, {{ image_size }} px, patches of {{ patch_size }} px
- language model: {{ language_model }}
- prompt in training: {{ prompt }}

Load it with the name of this repository or the path of its folder:

```python
from visproj import PretrainedProjector

projector = PretrainedProjector.from_pretrained("NAME_OR_FOLDER")
tokens = projector(features)  # [N, 1 + patches, {{ vis_dim }}] -> [N, K, {{ lang_dim }}]
```

Chat about a photograph, with the path of the folder:

```bash
visproj chat --projector FOLDER --image photograph.jpg
```
"""


class PretrainedProjector(
    nn.Module, PyTorchModelHubMixin, library_name="visproj", model_card_template=MODEL_CARD
):
    """A projector of any kind with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    The directory holds ``model.safetensors`` with the projector's own keys, those of
    DeepSpeed-VisualChat, and ``config.json`` with the arguments below. Weights are loaded strictly.

    Args:
        kind: ``"baseline"``, ``"vit"`` or ``"perceiver"``.
        vision: The encoder's description, an :class:`~visproj.vlm.encoders.EncoderConfig` as a
            dictionary: width, heads, image and patch size.
        lang_dim: Width of the language model.
        encoder: Name of the vision encoder, or the path of its folder.
        language_model: Name of the language model, or the path of its folder or file.
        prompt: The question that was asked in training.
        query_grid: Rows and columns of a Perceiver's queries; 16 by 16 when ``None``.
        encoder_digest: The encoder's :attr:`~visproj.vlm.encoders.VisionEncoder.weights_digest`,
            by which it is recognised in any folder; ``None`` compares its name instead.
        has_cls: Whether the encoder's first token is a CLS token, which a Perceiver drops.
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
        encoder_digest: str | None = None,
        has_cls: bool = True,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.vision = vision
        self.lang_dim = lang_dim
        self.encoder = encoder
        self.language_model = language_model
        self.prompt = prompt
        self.query_grid = query_grid
        self.encoder_digest = encoder_digest
        self.has_cls = has_cls
        self.module = build_configured(kind, vision, lang_dim, query_grid, has_cls)

    def forward(self, *args: Any, **options: Any) -> Any:
        """Run the projector, ``[N, 1 + S, C] -> [N, K, D]``, with its own arguments."""
        return self.module(*args, **options)

    def trained_parameters(self) -> int:
        """Return the number of trainable parameters, over all processes."""
        return sum(_size(parameter) for parameter in self.parameters() if parameter.requires_grad)

    def fold(self, **options: Any) -> nn.Module:
        """Return :func:`visproj.fold` of the projector."""
        from visproj.folding import fold

        return fold(self.module, **options)

    def check_encoder(self, encoder: VisionEncoder) -> None:
        """Raise ``InputError`` unless ``encoder`` is the one that the projector was trained with.

        Configurations and digests of the weights are compared, whatever the encoders' paths are. If
        a digest is missing (checkpoints of older versions, the offline encoder), the last parts of
        the encoders' names are compared instead.
        """
        given, wanted = _as_json(asdict(encoder.config)), _as_json(self.vision)
        differing = [f"{key} {given[key]}" for key in given if given[key] != wanted.get(key)]
        digest = encoder.weights_digest
        if digest is None or self.encoder_digest is None:
            same = _last_part(encoder.name) == _last_part(self.encoder)
        else:
            same = digest == self.encoder_digest
            if not same:
                differing.append("other weights")
        if same and not differing:
            return
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
        """Write the checkpoint; an existing one stays intact if the new one cannot be written.

        A model card is written as README.md unless there is one already.

        Args:
            save_directory: Directory to write to; it is created if it is missing.
            push_to_hub: Also upload the checkpoint to the hub.
            repo_id: Name on the hub; ``None`` is the directory's name.
            options: Options of the mixin's ``save_pretrained``.

        Returns:
            The result of ``push_to_hub`` if that was asked for, otherwise ``None``.

        Raises:
            OSError: The directory cannot be written; the message names it.
        """
        final = Path(save_directory)
        options["config"] = options.get("config") or self._arguments()
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

    def _arguments(self) -> dict[str, Any]:
        """Return the arguments of the constructor, which ``config.json`` holds."""
        return {
            "kind": self.kind,
            "vision": self.vision,
            "lang_dim": self.lang_dim,
            "encoder": self.encoder,
            "language_model": self.language_model,
            "prompt": self.prompt,
            "query_grid": self.query_grid,
            "encoder_digest": self.encoder_digest,
            "has_cls": self.has_cls,
        }

    def generate_model_card(self, *args: Any, **options: Any) -> ModelCard:
        """Fill the card with this projector's kind, widths and models; options are the mixin's."""
        values = {
            "kind": self.kind,
            "vis_dim": self.vision["hidden_size"],
            "lang_dim": self.lang_dim,
            "parameters": f"{sum(map(_size, self.parameters())):,}",
            "encoder": self._public(self.encoder),
            "image_size": self.vision["image_size"],
            "patch_size": self.vision["patch_size"],
            "language_model": self._public(self.language_model),
            "prompt": json.dumps(self.prompt, ensure_ascii=False),
        }
        return super().generate_model_card(*args, **{**values, **options})

    @staticmethod
    def _public(name: str) -> str:
        """Return a model's name without the folders of this machine."""
        return Path(name).name if Path(name).is_absolute() else name

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the weights; safetensors itself would write a file that only its owner can read."""
        refuse_folded("a PretrainedProjector's save_pretrained", self.module)
        if (description := describe(self.module)) is not None:
            with torch.device("meta"):
                arguments = self.kind, self.vision, self.lang_dim, self.query_grid, self.has_cls
                built = build_configured(*arguments)
            check_described(built, description, "the configuration does not describe this module:")
        with whole_state(self.module) as state:
            write_state(save_directory / WEIGHTS_NAME, self.module, state)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, **options: Any
    ) -> PretrainedProjector:
        """Load a checkpoint, in eval mode.

        Args:
            pretrained_model_name_or_path: The checkpoint's directory, the ``OUT`` of ``visproj
                train`` that contains it, or a name on the hub.
            options: Options of the mixin, such as ``revision`` and ``map_location``, and ``dtype``,
                to which the weights are cast: float32 by default, ``None`` keeps the stored one.

        Raises:
            FileNotFoundError: The directory lacks a file.
            ValueError: The configuration or the weights are damaged, or do not fit each other.
        """
        path = Path(pretrained_model_name_or_path)
        if path.is_file():
            raise InputError(f"{path} is a file: pass the directory of the projector")
        if not path.is_dir():
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        folder = find_projector(path)
        check_folder(folder)
        try:
            return super().from_pretrained(folder, **options)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"cannot load the projector in {folder}: {reason}") from error

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        map_location: torch.device | str = "cpu",
        dtype: torch.dtype | str | None = torch.float32,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        proxies: Any = None,  # huggingface_hub passes these two before its version 1
        resume_download: Any = None,
        **arguments: Any,
    ) -> PretrainedProjector:
        """Load the weights strictly, without output; the mixin's ``from_pretrained`` calls this."""
        device, dtype = parse_device(map_location), parse_dtype(dtype)
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
        with torch.device("meta"):
            projector = cls(**arguments)
        load_file_into(projector.module, TensorFile(file), device, dtype)
        return projector.eval()


def load_pretrained(directory: str | Path) -> PretrainedProjector:
    """Load the checkpoint in ``directory``, or in an ``OUT`` of ``visproj train``, in eval mode.

    Raises:
        FileNotFoundError: There is no such directory, or it lacks a file.
        ValueError: The configuration or the weights are damaged, or do not fit each other.
    """
    folder = find_projector(Path(directory))
    check_folder(folder)
    return PretrainedProjector.from_pretrained(folder)


def located(typed: str | None, name: str) -> str:
    """Return the name to save for a model: its absolute path if a path was typed.

    Args:
        typed: A name on the hub or a path, as the user gave it; ``None`` for the offline model.
        name: The model's own name.
    """
    return name if typed is None or not Path(typed).exists() else str(Path(typed).resolve())


def _size(parameter: Any) -> int:
    """Return the number of elements of a parameter, even if ZeRO-3 has partitioned it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def _last_part(name: str) -> str:
    return Path(located(name, name)).name


def _as_json(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with tuples as lists, as JSON has them."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in config.items()
    }
