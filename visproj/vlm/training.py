"""``visproj train``: data to features, features to a trained projector, and what it has learned."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visproj.errors import InputError
from visproj.files import cache_folder, replacing, write_json
from visproj.progress import SILENT, Progress
from visproj.projectors import KINDS
from visproj.vlm.captions import CaptionedPhotograph, check_captions, load_captions
from visproj.vlm.encoders import VisionEncoder, load_encoder
from visproj.vlm.figures import loss_figure, save_figure
from visproj.vlm.language import IMAGE_TOKEN, load_language_model
from visproj.vlm.loop import (
    STATE_NAME,
    Step,
    TrainingData,
    TrainingRun,
    TrainingSettings,
    train,
)
from visproj.vlm.model import VisualLanguageModel, check_backend, default_device
from visproj.vlm.pretrained import PretrainedProjector, located
from visproj.vlm.run_folder import check_writable, refuse_parallel, sole_writer
from visproj.vlm.scoring import Retrieval, caption_loss, caption_scores, own_loss, retrieval
from visproj.vlm.views import held_out_views, training_views

PROMPT = "Describe the photograph."
TRAINING_VIEWS = 14
EPOCHS = {"baseline": 3, "vit": 3, "perceiver": 6}  # a Perceiver learns slower, in shorter steps
# Retrieval scores every caption against every view: it grows with the square of the photographs.
SCORED_PHOTOGRAPHS = 32


@dataclass(frozen=True)
class TrainingOptions:
    """What ``visproj train`` is asked for; the command line says the same of each.

    Attributes:
        kind: ``baseline``, ``vit`` or ``perceiver``.
        out: Folder for the projector, its state and its logs.
        data: Folder with images and ``captions.jsonl``; ``None`` is the built-in set.
        encoder: CLIP or DINOv2 model, a directory or a name on the hub; ``None`` the offline one.
        language_model: Name on the hub, directory or GGUF file; ``None`` the offline one.
        prompt: What the model is asked about every image.
        queries: A Perceiver has this number squared.
        resume: Go on from the state in ``out``.
    """

    kind: str
    out: Path
    data: Path | None = None
    encoder: str | None = None
    language_model: str | None = None
    prompt: str = PROMPT
    queries: int = 8
    resume: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"unknown kind {self.kind!r}, choose from {', '.join(KINDS)}")
        if self.queries < 1:
            raise InputError(f"queries must be at least 1, got {self.queries}")
        if self.prompt.count(IMAGE_TOKEN) > 1:
            raise InputError(f"the prompt {self.prompt!r} has more than one {IMAGE_TOKEN}")


@dataclass(frozen=True)
class TrainingReport:
    """What came of it.

    Attributes:
        photographs: Their number.
        training_views: Over all photographs.
        parameters: That were trained.
        untrained_loss: Of the held-out views' captions, before training.
        trained_loss: The same afterwards.
        retrieval: Whether the right caption is found, and its control.
        seconds: By stage.
        peak_mib: Largest resident memory of the process so far; ``None`` where the system does
            not say.
    """

    photographs: int
    training_views: int
    parameters: int
    untrained_loss: float
    trained_loss: float
    retrieval: Retrieval
    seconds: dict[str, float]
    peak_mib: float | None


def run_training(
    options: TrainingOptions,
    settings: TrainingSettings,
    *,
    progress: Progress = SILENT,
    on_step: Callable[[Step, TrainingRun], None] = lambda step, run: None,
) -> TrainingReport:
    """Train a projector between two frozen models and measure what it has learned.

    The photographs' training views are random crops; the held-out ones, on which loss and retrieval
    are measured, are other crops, mirrored ones and other scales of the same photographs.

    Args:
        options: Models, data and folder.
        settings: Of the loop.
        progress: Receives each stage and its steps.
        on_step: Called after every optimiser step.

    Raises:
        InputError: This is one of several processes that were started together, or another process
            is training in ``out``.
        FileExistsError: ``out`` holds a run and ``resume`` is false.
        FileNotFoundError: ``resume`` is true and there is nothing to go on from.
        NotADirectoryError: ``out`` is a file.
        ConnectionError, ModuleNotFoundError: A model or package is missing.
        ValueError: As the data, the models and the loop say; data and encoder are read first.
        FloatingPointError, OSError: As :func:`visproj.vlm.loop.train` says.
        KeyboardInterrupt: Of the user's; its text says what is kept.
    """
    refuse_parallel("training")
    _check_folder(options)
    check_backend()
    with sole_writer(options.out), _says_what_is_kept(options.out):
        return _train(options, settings, progress, on_step)


def _check_folder(options: TrainingOptions) -> None:
    check_writable(options.out)
    exists = (options.out / STATE_NAME).exists()
    if exists and not options.resume:
        raise FileExistsError(
            f"{options.out} holds a training run: go on with --resume, or choose another --out"
        )
    if options.resume and not exists:
        raise FileNotFoundError(f"{options.out} holds no training run to resume")


@contextmanager
def _says_what_is_kept(out: Path) -> Iterator[None]:
    """Give Ctrl-C outside of the training loop, which has its own, a text."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if stop.args:
            raise
        kept = "go on with --resume" if (out / STATE_NAME).exists() else "nothing is kept"
        raise KeyboardInterrupt(f"stopped: {kept}") from stop


def _train(
    options: TrainingOptions,
    settings: TrainingSettings,
    progress: Progress,
    on_step: Callable[[Step, TrainingRun], None],
) -> TrainingReport:
    clock = _Clock()
    photographs = load_captions(options.data)
    encoder = load_encoder(options.encoder)
    progress.stage("loading the language model")
    model, projector, identity = _load_models(options, settings, encoder)
    check_captions(photographs, options.prompt, model)
    clock.lap("loading")

    progress.stage("encoding the photographs", len(photographs))
    data, held_out = _encode(model, photographs, options.prompt, progress)
    own_captions = [data.captions[index] for index in range(len(held_out))]
    clock.lap("encoding")

    def evaluate() -> float:
        model.eval()
        with settings.autocast(model.device):
            return caption_loss(model, held_out, own_captions, options.prompt)

    run = train(
        model,
        data,
        settings,
        options.out,
        identity=identity,
        save=lambda: projector.save_pretrained(options.out / "projector"),
        evaluate=evaluate,
        progress=progress,
        on_step=on_step,
    )
    clock.lap("training")

    views = sum(map(len, held_out))
    progress.stage("scoring every caption against every held-out view", views)
    with settings.autocast(model.device):
        scores, lengths = caption_scores(model, held_out, own_captions, options.prompt, progress)
    scored = scores, lengths, _owners(held_out), _owners(own_captions)
    clock.lap("scoring")

    report = TrainingReport(
        photographs=len(photographs),
        training_views=sum(map(len, data.views)),
        parameters=sum(p.numel() for p in projector.parameters() if p.requires_grad),
        untrained_loss=run.held_out[0][1],
        trained_loss=own_loss(*scored),
        retrieval=retrieval(*scored, settings.seed),
        seconds=clock.laps,
        peak_mib=peak_mib(),
    )
    _write(report, run, options)
    return report


def _load_models(
    options: TrainingOptions, settings: TrainingSettings, encoder: VisionEncoder
) -> tuple[VisualLanguageModel, PretrainedProjector, dict[str, str]]:
    """The model, its projector to be saved, and what has to be the same for a run to go on."""
    dtype, device = getattr(torch, settings.dtype), default_device()
    name, language_model, tokenizer = load_language_model(options.language_model, dtype)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(settings.seed)
        projector = PretrainedProjector(
            options.kind,
            asdict(encoder.config),
            language_model.get_input_embeddings().weight.shape[1],
            located(options.encoder, encoder.name),
            located(options.language_model, name),
            options.prompt,
            (options.queries, options.queries) if options.kind == "perceiver" else None,
            encoder.weights_digest,
        ).to(device)
    cache = cache_folder()
    model = VisualLanguageModel(
        encoder,
        projector.module,
        language_model.to(device),
        tokenizer,
        cache_dir=None if cache is None else cache / "features",
    )
    if device.type == "cpu":  # where the backward of fused attention costs a step 15 % more
        language_model.set_attn_implementation("eager")
    identity = {
        "kind": options.kind,
        "queries": str(options.queries),
        "encoder": encoder.name,
        "language model": name,
    }
    return model, projector, identity


def _write(report: TrainingReport, run: TrainingRun, options: TrainingOptions) -> None:
    curve = [(step.step, step.loss) for step in run.steps]
    save_figure(loss_figure(curve, run.held_out, options.kind), options.out / "loss.png")
    values = {**asdict(report), "retrieval": report.retrieval._asdict()}
    with replacing(options.out / "report.json") as partial:
        write_json(partial, values)


def _encode(
    model: VisualLanguageModel,
    photographs: list[CaptionedPhotograph],
    prompt: str,
    progress: Progress,
) -> tuple[TrainingData, list[Tensor]]:
    """Features of all training views, and of the held-out views of those that are scored."""
    views, held_out = [], []
    for index, photograph in enumerate(photographs):
        image = photograph.image
        views.append(model.features(training_views(image, TRAINING_VIEWS, index)))
        if index < SCORED_PHOTOGRAPHS:
            held_out.append(model.features(held_out_views(image)))
        progress.advance()
    return TrainingData(
        views, [photograph.captions for photograph in photographs], prompt
    ), held_out


def _owners(groups: Iterable[Any]) -> Tensor:
    """The number of each member's group, ``[members]``."""
    return torch.tensor([index for index, group in enumerate(groups) for _ in group])


def peak_mib() -> float | None:
    """Largest resident memory of this process so far, ``None`` on Windows."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class _Clock:
    """Seconds of each stage since the one before."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now
