"""``visproj train``: data, two frozen models and a projector between them, trained and measured."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from visproj.errors import InputError
from visproj.files import cache_folder, replacing, write_json
from visproj.progress import SILENT, Progress
from visproj.vlm.checkpoints import (
    check_identity,
    checkpoints,
    remove_incomplete,
    write_identity,
)
from visproj.vlm.encoders import VisionEncoder, load_encoder
from visproj.vlm.engine import (
    TrainingSettings,
    check_engine,
    engine_of_its_own,
    is_launched_beside_the_first,
    settle_dtype,
    training_arguments,
)
from visproj.vlm.features import FeatureShards
from visproj.vlm.figures import loss_figure, save_figure
from visproj.vlm.language import embedding_shape, load_language_model
from visproj.vlm.loading import (
    PictureReader,
    Samples,
    StreamedSamples,
    Views,
    collate,
    encoded,
)
from visproj.vlm.model import VisualLanguageModel, check_backend
from visproj.vlm.objective import takes_branches
from visproj.vlm.options import TrainingOptions, TrainingReport
from visproj.vlm.preparing import DialogueEncoder, Prepared, prepare
from visproj.vlm.pretrained import PretrainedProjector, load_pretrained, located
from visproj.vlm.report import Clock, peak_mib
from visproj.vlm.run_folder import check_writable, sole_writer
from visproj.vlm.scoring import Retrieval, caption_scores, retrieval
from visproj.vlm.sources import Source, open_source
from visproj.vlm.views import HELD_OUT, held_out_view, training_view

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from visproj.vlm.trainer import ProjectorTrainer

EPOCHS = {"baseline": 3, "vit": 3, "perceiver": 7}  # of the built-in photographs
BUILT_IN_VIEWS = 12
# Retrieval scores every caption against every view: it grows with the square of the photographs.
SCORED_SAMPLES = 32
GIB = 2**30


class _Data(NamedTuple):
    """Samples to train on, those that are held out, and what their answers are asked."""

    training: Samples | StreamedSamples
    held_out: Samples | None


def run_training(
    options: TrainingOptions, settings: TrainingSettings, *, progress: Progress = SILENT
) -> TrainingReport | None:
    """Train a projector between two frozen models and measure what it has learned.

    Started by torchrun, ``accelerate launch`` or ``deepspeed``, every process calls this; the first
    one alone writes and reports.

    Args:
        options: Models, data and folder.
        settings: Of the training.
        progress: Receives each stage and its steps.

    Returns:
        The report in the first process, ``None`` in the others.

    Raises:
        InputError: The data, a model, a launcher or an option cannot be used, or another process
            is training in ``out``.
        FileExistsError: ``out`` holds a run and ``resume`` is false.
        FileNotFoundError: ``resume`` is true and there is nothing to go on from, or a file is
            missing.
        NotADirectoryError: ``out`` is a file.
        ConnectionError, ModuleNotFoundError: A model or package is missing.
        NotFiniteError: A loss or gradient is not finite; the last checkpoint stays as it is.
        OSError: Something cannot be written; the last checkpoint stays as it is.
        KeyboardInterrupt: Of the user's; its text says what is kept.
    """
    _check_folder(options)
    check_backend()
    clock = Clock()
    with ExitStack() as stack:
        stack.enter_context(_says_what_is_kept(options.out))
        stack.enter_context(engine_of_its_own())
        if is_launched_beside_the_first():
            progress = SILENT
            logging.getLogger("visproj").setLevel(logging.ERROR)  # the first one warns
        progress.stage("loading the models")
        source = open_source(options.data, options.images, streaming=options.streaming)
        _check_source(source, options, settings)
        # Before Trainer's arguments have transformers partition what it loads, under ZeRO-3.
        encoder = load_encoder(options.encoder)
        automatic = settings.dtype == "auto"
        settings = settle_dtype(settings, options.out)
        args = training_arguments(
            settings, options.out, evaluates=_evaluates(options), resumes=options.resume
        )
        first = args.process_index == 0
        if first:
            stack.enter_context(sole_writer(options.out))
            remove_incomplete(options.out)
        if automatic:
            progress.note(f"{settings.dtype} is the faster dtype here (--dtype auto)")
        run = _Run(options, settings, args, progress, clock)
        report = run.carry_out(source, encoder)
        return report if first else None


def _check_folder(options: TrainingOptions) -> None:
    check_writable(options.out)
    exists = bool(checkpoints(options.out)) or (options.out / "projector").exists()
    if exists and not options.resume:
        raise FileExistsError(
            f"{options.out} holds a training run: go on with --resume, or choose another --out"
        )
    if options.resume and not checkpoints(options.out):
        raise FileNotFoundError(f"{options.out} holds no training run to resume")


@contextmanager
def _says_what_is_kept(out: Path) -> Iterator[None]:
    """Give Ctrl-C a text that says what is kept."""
    try:
        yield
    except KeyboardInterrupt as stop:
        kept = checkpoints(out)
        text = f"{kept[-1].name} is kept, go on with --resume" if kept else "nothing is kept"
        raise KeyboardInterrupt(f"stopped: {text}") from stop


def _evaluates(options: TrainingOptions) -> bool:
    return options.is_built_in or options.held_out is not None


class _Run:
    """One run, from the data to the report."""

    def __init__(
        self,
        options: TrainingOptions,
        settings: TrainingSettings,
        args: TrainingArguments,
        progress: Progress,
        clock: Clock,
    ) -> None:
        self.options = options
        self.settings = settings
        self.args = args
        self.progress = progress
        self.clock = clock

    def carry_out(self, source: Source, encoder: VisionEncoder) -> TrainingReport:
        projector, model = self._load_models(encoder)
        self.clock.lap("loading")
        self.progress.stage("reading the data")
        shards = self._shards(encoder)
        with self.args.main_process_first(desc="reading the data"):
            data = self._data(source, model, shards)
        self.clock.lap("reading")
        trainer = self._trainer(projector, model, data, shards)
        self._identify(source, model, data)
        self._train(trainer, shards)
        self.clock.lap("training")
        is_sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        alone = self.args.process_index == 0 and not is_sharded  # no other process is needed
        found = self._retrieval(model, data) if alone else None
        return self._report(trainer, data, found)

    def _load_models(
        self, encoder: VisionEncoder
    ) -> tuple[PretrainedProjector, VisualLanguageModel]:
        dtype = getattr(torch, self.settings.dtype)
        name, language_model, tokenizer = load_language_model(self.options.language_model, dtype)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.settings.seed)
            projector = self._projector(encoder, embedding_shape(language_model)[1], name)
        projector.train()
        if self.args.device.type == "cpu":  # there fused attention's backward is slower
            language_model.set_attn_implementation("eager")
        model = VisualLanguageModel(encoder, projector, language_model, tokenizer)
        if self.settings.gradient_checkpointing:
            model.checkpoint_activations()
        encoder.to(self.args.device)
        return projector, model

    def _projector(self, encoder: VisionEncoder, width: int, name: str) -> PretrainedProjector:
        options = self.options
        places = located(options.encoder, encoder.name), located(options.language_model, name)
        if options.from_projector is not None:
            projector = load_pretrained(options.from_projector)
            if options.kind not in (None, projector.kind):
                raise InputError(
                    f"the projector in {options.from_projector} is a {projector.kind}, and a "
                    f"{options.kind} was asked for"
                )
            projector.check_encoder(encoder)
            projector.encoder, projector.language_model = places
            projector.prompt = options.prompt
            return projector
        kind = options.kind or "perceiver"
        return PretrainedProjector(
            kind,
            asdict(encoder.config),
            width,
            *places,
            options.prompt,
            (options.queries, options.queries) if kind == "perceiver" else None,
            encoder.weights_digest,
            encoder.has_cls,
        )

    def _shards(self, encoder: VisionEncoder) -> FeatureShards | None:
        asked, folder = self.options.cache_features, cache_folder()
        limit = float(self.options.is_built_in) if asked is None else asked
        if not limit or folder is None:
            return None
        return FeatureShards(encoder, folder / "features", int(limit * GIB))

    def _data(
        self, source: Source, model: VisualLanguageModel, shards: FeatureShards | None
    ) -> _Data:
        options = self.options
        limits = [n for n in (options.max_length, model.context_limit) if n is not None]
        encode = DialogueEncoder(model, min(limits, default=None))
        read = PictureReader(model.encoder, shards)
        alternatives = takes_branches(model.language_model)

        def prepared(split: str) -> Prepared:
            return prepare(
                source,
                split,
                options.columns,
                options.prompt,
                encode,
                alternatives=alternatives,
                strict=options.strict,
            )

        if source.is_stream:
            return _Data(self._stream(source, encode, read, alternatives), None)
        training = prepared(options.split)
        held_out = None
        if isinstance(options.held_out, str):
            held_out = Samples(prepared(options.held_out), encode, read)
        elif isinstance(options.held_out, float):
            training, kept = _parted(training, options.held_out, self.settings.seed)
            held_out = Samples(kept, encode, read)
        elif options.is_built_in and held_out is None:
            held_out = Samples(training, encode, read, Views(HELD_OUT, held_out_view))
        if self.args.process_index == 0 and training.cut:
            self.progress.note(
                f"{training.cut} samples are longer than {encode.limit} tokens: their ends are cut"
            )
        count = options.views or (BUILT_IN_VIEWS if options.is_built_in else 1)
        views = Views(count, training_view) if count > 1 else Views()
        return _Data(Samples(training, encode, read, views), held_out)

    def _stream(
        self, source: Source, encode: DialogueEncoder, read: PictureReader, alternatives: bool
    ) -> StreamedSamples:
        from datasets.distributed import split_dataset_by_node

        rows = source.split(self.options.split)
        rows = split_dataset_by_node(rows, self.args.process_index, self.args.world_size)
        return StreamedSamples(
            rows,
            self.options.columns,
            self.options.prompt,
            encode,
            read,
            self.settings.seed,
            alternatives=alternatives,
        )

    def _trainer(
        self,
        projector: PretrainedProjector,
        model: VisualLanguageModel,
        data: _Data,
        shards: FeatureShards | None,
    ) -> ProjectorTrainer:
        from transformers import PrinterCallback

        from visproj.vlm.logs import CsvLog, HeldOutLoss, ProgressLog
        from visproj.vlm.trainer import ProjectorTrainer

        trainer = ProjectorTrainer(
            projector,
            shards=shards,
            by_length=self.settings.by_length,
            strict=self.options.strict,
            model=model,
            args=self.args,
            data_collator=collate,
            train_dataset=data.training,
            eval_dataset=data.held_out,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(ProgressLog(self.progress, lambda: trainer.images))
        if data.held_out is not None:
            # The built-in set's is measured before and after: each takes as long as 25 steps.
            never = sys.maxsize if self.options.is_built_in else 0
            trainer.add_callback(HeldOutLoss(self.settings.eval_steps or never))
        if "csv" in self.settings.report_to:
            trainer.add_callback(CsvLog())
        check_engine(trainer.accelerator, self.settings)
        return trainer

    def _identify(self, source: Source, model: VisualLanguageModel, data: _Data) -> None:
        """Keep what the run is, or compare it with what the run was."""
        settings, options = self.settings, self.options
        training = data.training
        identity = {
            "kind": model.projector.kind,
            "queries": model.projector.query_grid,
            "encoder": model.encoder.name,
            "encoder's weights": model.encoder.weights_digest,
            "language model": model.projector.language_model,
            "prompt": options.prompt,
            "data": source.name,
            "samples": len(training) if isinstance(training, Samples) else None,
            "samples per step": settings.batch * settings.accumulate * self.args.world_size,
            "learning rate": settings.learning_rate,
            "warm-up": settings.warmup,
            "weight decay": settings.weight_decay,
            "clip": settings.clip,
            "dtype": settings.dtype,
            "seed": settings.seed,
            "by length": settings.by_length,
            "epochs": settings.epochs,
            "max steps": settings.max_steps,
        }
        if options.resume:
            check_identity(options.out, identity)
        if self.args.process_index == 0:
            write_identity(options.out, identity)

    def _train(self, trainer: ProjectorTrainer, shards: FeatureShards | None) -> None:
        last = checkpoints(self.options.out)[-1:] if self.options.resume else []
        try:
            trainer.train(resume_from_checkpoint=str(last[0]) if last else None)
            trainer.save_model(str(self.options.out / "projector"))
        except InputError as error:
            # A loader worker's comes with its traceback, in the last line of which it stands.
            raise InputError(str(error).strip().splitlines()[-1].split("Error: ")[-1]) from error
        finally:
            if shards is not None:
                shards.flush()

    def _retrieval(self, model: VisualLanguageModel, data: _Data) -> Retrieval | None:
        wanted = self.options.is_built_in
        if self.options.retrieval is not None:
            wanted = self.options.retrieval
        if not wanted or data.held_out is None:
            return None
        captions = _captions(data.held_out)
        views = [
            torch.cat([_features(model, example.pictures) for example in examples])
            for _, examples in captions
        ]
        texts = [answers for answers, _ in captions]
        model.eval()
        count = sum(map(len, views))
        self.progress.stage("scoring every caption against every held-out view", count)
        with self.settings.autocast(model.device):
            scores, lengths = caption_scores(
                model, views, texts, self.options.prompt, self.progress
            )
        self.clock.lap("scoring")
        scored = scores, lengths, _owners(views), _owners(texts)
        return retrieval(*scored, self.settings.seed)

    def _report(
        self, trainer: ProjectorTrainer, data: _Data, found: Retrieval | None
    ) -> TrainingReport:
        history = trainer.state.log_history
        held_out = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
        training = data.training
        report = TrainingReport(
            kind=trainer.projector.kind,
            samples=len(training) if isinstance(training, Samples) else None,
            steps=trainer.state.global_step,
            parameters=trainer.projector.trained_parameters(),
            dtype=self.settings.dtype,
            untrained_loss=held_out[0][1] if held_out else None,
            trained_loss=held_out[-1][1] if held_out else None,
            retrieval=found,
            seconds=self.clock.laps,
            peak_mib=peak_mib(),
        )
        if self.args.process_index == 0:
            curve = [(row["step"], row["loss"]) for row in history if "loss" in row]
            figure = loss_figure(curve, held_out, report.kind)
            save_figure(figure, self.options.out / "loss.png")
            with replacing(self.options.out / "report.json") as partial:
                write_json(partial, _as_json(report))
        return report


def _check_source(source: Source, options: TrainingOptions, settings: TrainingSettings) -> None:
    """Raise for what a file, which has one split, or a stream, of unknown length, cannot give."""
    for name in (options.split, options.held_out):
        if source.file is not None and isinstance(name, str) and name != "train":
            raise InputError(f"{source.name} has no split {name}: it has train")
    if not source.is_stream:
        return
    reasons = {
        "--max-steps is required": settings.max_steps == -1,
        "samples cannot be grouped by length": settings.by_length,
        "samples cannot be held out": options.held_out is not None,
        "--views are not available": options.views not in (None, 1),
    }
    broken = [reason for reason, is_broken in reasons.items() if is_broken]
    if broken:
        raise InputError(f"{source.name} is read as a stream: {'; '.join(broken)}")


def _parted(prepared: Prepared, part: float, seed: int) -> tuple[Prepared, Prepared]:
    """Samples to train on, and a part that is held out, at least one of each."""
    count = len(prepared.table)
    if count < 2:
        raise InputError("one sample cannot be parted into training and held-out samples")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = min(max(1, round(part * count)), count - 1)
    kept = sorted(order[:held_out]), sorted(order[held_out:])
    return prepared.select(kept[1]), prepared.select(kept[0])


def _captions(samples: Samples) -> list[tuple[list[str], list[Any]]]:
    """Answers and views of the first held-out samples with one image and one question."""
    found = []
    table, views = samples.prepared.table, samples.views.count
    for number, row in enumerate(table):
        if row["images"] != 1 or len(row["questions"]) != 1:
            continue
        examples = [samples[number * views + view] for view in range(views)]
        found.append((row["answers"][0], examples))
        if len(found) == SCORED_SAMPLES:
            break
    if not found:
        raise InputError("retrieval needs held-out samples with one image and one question")
    return found


def _features(model: VisualLanguageModel, pictures: list[Any]) -> Tensor:
    return encoded([picture.content for picture in pictures], [""] * len(pictures), model, None)


def _as_json(report: TrainingReport) -> dict[str, Any]:
    found = report.retrieval
    return {**asdict(report), "retrieval": None if found is None else found._asdict()}


def _owners(groups: Any) -> Tensor:
    """The number of each member's group, ``[members]``."""
    return torch.tensor([index for index, group in enumerate(groups) for _ in group])
