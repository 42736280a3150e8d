"""``visproj demo``: photographs encoded, projected and inserted into a prompt's embeddings."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from visproj.errors import InputError
from visproj.progress import SILENT, Progress
from visproj.projectors import KINDS, PerceiverProjector, build_projector
from visproj.reference import projector_ref
from visproj.vlm.compose import insert_visual_tokens
from visproj.vlm.encoders import VisionEncoder, cropped_notes, load_encoder
from visproj.vlm.figures import (
    attention_figure,
    features_figure,
    pca_colours,
    positions_figure,
    save_figure,
)
from visproj.vlm.language import IMAGE_TOKEN, LanguageEmbedding, load_language_embedding
from visproj.vlm.photographs import Photograph, load_photographs
from visproj.vlm.run_folder import check_writable

REPEATS = 5
BATCH = 8  # photographs encoded together


@dataclass(frozen=True)
class DemoRow:
    """Measurements of one projector.

    Attributes:
        kind: ``baseline``, ``vit`` or ``perceiver``.
        parameters: Number of parameters, frozen ones included.
        tokens_in: Encoder tokens per image, CLS included.
        tokens_out: Visual tokens per image.
        milliseconds: Median time per image in ms, with all photographs in one batch.
        max_error: Largest absolute difference from the fp64 reference.
        sequence: Shape of the prompt's embeddings with the visual tokens, ``(images, tokens, D)``.
    """

    kind: str
    parameters: int
    tokens_in: int
    tokens_out: int
    milliseconds: float
    max_error: float
    sequence: tuple[int, ...]


@dataclass(frozen=True)
class DemoReport:
    """Results of the demo: names of models and photographs, rows, picture files and notes."""

    encoder: str
    language: str
    photographs: list[str]
    rows: list[DemoRow]
    pictures: list[Path]
    notes: list[str] = field(default_factory=list)


def run_demo(
    images: Sequence[Path | str] = (),
    *,
    kinds: Sequence[str] = KINDS,
    encoder: str | None = None,
    prompt: str = "Describe the photograph.",
    out: Path = Path("visproj-demo"),
    seed: int = 0,
    progress: Progress = SILENT,
) -> DemoReport:
    """Run untrained projectors on photographs and save pictures of the results.

    Nothing is written before every input has been read and every projector has run. The global
    random state is not changed.

    Args:
        images: Image files; if empty, scikit-learn's two photographs.
        kinds: Projectors to run.
        encoder: Directory or hub name of a CLIP, SigLIP or DINOv2 model; ``None`` takes the
            offline encoder.
        prompt: Prompt for each image, with the image in the place of ``<image>``, or else first.
        out: Folder for the pictures, created if it is missing.
        seed: Seed of each projector's initialisation.
        progress: Receives each stage.

    Returns:
        One row per projector, and the files that were written.

    Raises:
        ValueError: A kind is unknown, or an input cannot be used.
        FileNotFoundError: An image does not exist.
        NotADirectoryError: ``out`` is a file.
        PermissionError: ``out`` cannot be written.
        ConnectionError: A model must be downloaded and cannot be.
        ModuleNotFoundError: A package of the extra ``demo`` is not installed.
    """
    check_writable(out)
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise InputError(f"unknown kind {unknown[0]!r}, choose from {', '.join(KINDS)}")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must be at least 0 and less than 2**32, got {seed}")
    if prompt.count(IMAGE_TOKEN) > 1:
        raise InputError(f"the prompt {prompt!r} has more than one {IMAGE_TOKEN}")
    if IMAGE_TOKEN not in prompt:
        prompt = f"{IMAGE_TOKEN}\n{prompt}"
    photographs = load_photographs(images)
    progress.stage("loading the vision encoder")
    eye = load_encoder(encoder)
    progress.stage("loading the language model's embedding table")
    language = load_language_embedding()
    projectors = {kind: _untrained(kind, eye, language, seed) for kind in kinds}

    progress.stage("encoding the photographs")
    crops = [eye.crop(photograph.image) for photograph in photographs]
    batches = [crops[start : start + BATCH] for start in range(0, len(crops), BATCH)]
    features = torch.cat([eye.encode(eye.normalise(batch)) for batch in batches])
    rows = []
    for kind, projector in projectors.items():
        progress.stage(f"running the {kind} projector")
        rows.append(_measure(kind, projector, features, prompt, language))

    progress.stage("drawing")
    pictures = _draw(photographs, crops, eye, features, projectors, language, out)
    names = [photograph.name for photograph in photographs]
    notes = cropped_notes(eye, photographs)
    return DemoReport(eye.name, language.name, names, rows, pictures, notes)


def _untrained(kind: str, eye: VisionEncoder, language: LanguageEmbedding, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        options: dict[str, Any] = {"has_cls": eye.has_cls} if kind == "perceiver" else {}
        return build_projector(kind, eye.config, language.table.shape[1], **options).eval()


@torch.inference_mode()
def _measure(
    kind: str, projector: nn.Module, features: Tensor, prompt: str, language: LanguageEmbedding
) -> DemoRow:
    tokens = projector(features)  # [N, K, D]
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        projector(features)
        seconds.append(time.perf_counter() - begin)
    return DemoRow(
        kind=kind,
        parameters=sum(parameter.numel() for parameter in projector.parameters()),
        tokens_in=features.shape[1],
        tokens_out=tokens.shape[1],
        milliseconds=1000 * statistics.median(seconds) / len(features),
        max_error=float((tokens - projector_ref(projector, features)).abs().max()),
        sequence=tuple(compose(tokens, prompt, language).shape),
    )


def compose(tokens: Tensor, prompt: str, language: LanguageEmbedding) -> Tensor:
    """Insert each image's visual tokens into the embeddings of the prompt.

    Args:
        tokens: Visual tokens ``[N, K, D]``.
        prompt: Text with one ``<image>`` in it.
        language: Tokenizer and embedding table of the prompt.

    Returns:
        Embeddings ``[N, T, D]``, one sample per image.

    Raises:
        ValueError: The prompt does not have exactly one ``<image>``.
    """
    count = len(tokens)
    ids = language.encode(prompt).expand(count, -1)
    return insert_visual_tokens(
        language.embed(ids), ids, tokens, [1] * count, language.image_token_id
    ).inputs_embeds


def _draw(
    photographs: list[Photograph],
    crops: list[Image.Image],
    eye: VisionEncoder,
    features: Tensor,
    projectors: dict[str, nn.Module],
    language: LanguageEmbedding,
    out: Path,
) -> list[Path]:
    width = language.table.shape[1]
    pictures = [save_figure(positions_figure(width), out / "positions.png")]
    colours = pca_colours(features[:, int(eye.has_cls) :])
    maps = None
    if "perceiver" in projectors:
        perceiver = cast(PerceiverProjector, projectors["perceiver"])
        with torch.inference_mode():
            _, maps = perceiver(features, return_attention=True)
    for index, (photograph, crop) in enumerate(zip(photographs, crops, strict=True)):
        name, file = photograph.name, photograph.path.name
        figure = features_figure(crop, colours[index], eye.grid, eye.name, file)
        pictures.append(save_figure(figure, out / f"{name}-features.png"))
        if maps is not None:
            figure = attention_figure(crop, maps[index], eye.grid, file)
            pictures.append(save_figure(figure, out / f"{name}-attention.png"))
    return pictures
