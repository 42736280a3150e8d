"""The commands that use a language model: ``visproj train | chat | answer``."""

from pathlib import Path
from typing import Annotated

import typer

from visproj.cli.choices import (
    Backend,
    Kind,
    TrainingDtype,
    check_positive,
    check_seed,
    quiet_libraries,
)
from visproj.outcome import errors, output

ID_OR_DIR = "ID_OR_DIR"
ID_OR_DIR_OR_GGUF = "ID_OR_DIR_OR_GGUF"
DATA, MODELS, RUN = "Data", "Models", "Training"

# Options that several commands share.
ImageFolder = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=DATA,
        metavar="DIR",
        help="Folder that image paths are relative to. Default: the folder of the data.",
    ),
]


def _column(usual: str) -> typer.models.OptionInfo:
    return typer.Option(rich_help_panel=DATA, help=f"Name of the column. Default: {usual}.")


ImageColumn = Annotated[str | None, _column("`image` or `images`")]
CaptionColumn = Annotated[str | None, _column("`captions` or `caption`")]
QuestionColumn = Annotated[str | None, _column("`question`")]
AnswerColumn = Annotated[str | None, _column("`answer` or `answers`")]
ConversationColumn = Annotated[str | None, _column("`conversations` or `messages`")]
Trained = Annotated[
    Path, typer.Option(help="Trained projector: the OUT of `visproj train`, or OUT/projector.")
]
TrainedEncoder = Annotated[
    str | None, typer.Option(metavar=ID_OR_DIR, help="Vision encoder. Default: as in training.")
]
TrainedLanguageModel = Annotated[
    str | None,
    typer.Option(metavar=ID_OR_DIR_OR_GGUF, help="Language model. Default: as in training."),
]
LongestAnswer = Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")]
RUNS_ON = "Implementation of the projector. auto: Triton kernels where they run, else PyTorch."
RunsOn = Annotated[Backend, typer.Option(help=RUNS_ON)]


def train(
    kind: Annotated[
        Kind | None,
        typer.Option(
            rich_help_panel=MODELS,
            help="Kind of projector. Default: that of --from-projector, else perceiver.",
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=MODELS,
            metavar=ID_OR_DIR,
            help="CLIP, SigLIP or DINOv2 model, or the output of `visproj extract`. Default: an "
            "encoder that needs no model hub.",
        ),
    ] = None,
    language_model: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=MODELS,
            metavar=ID_OR_DIR_OR_GGUF,
            help="Causal language model. Default: SmolLM2-135M-Instruct, which needs no model hub.",
        ),
    ] = None,
    queries: Annotated[
        int,
        typer.Option(
            rich_help_panel=MODELS,
            min=1,
            help="Side of the Perceiver's square grid of queries. DeepSpeed-VisualChat uses 16.",
        ),
    ] = 6,
    from_projector: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=MODELS,
            metavar="DIR",
            help="Start from the weights of this trained projector.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DATA,
            metavar="PATH_OR_NAME",
            help="Folder with captions.jsonl, JSON in LLaVA's format, image folder with metadata, "
            "Parquet, Arrow or CSV files, WebDataset shards (*.tar), or name of a data set on the "
            "hub. Default: 15 photographs that come with scikit-image and scikit-learn.",
        ),
    ] = None,
    images: ImageFolder = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    question_column: QuestionColumn = None,
    answer_column: AnswerColumn = None,
    conversation_column: ConversationColumn = None,
    prompt: Annotated[
        str, typer.Option(rich_help_panel=DATA, help="Question to ask about images with captions.")
    ] = "Describe the photograph.",
    split: Annotated[str, typer.Option(rich_help_panel=DATA, help="Split to train on.")] = "train",
    held_out: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DATA,
            metavar="FRACTION_OR_SPLIT",
            help="Samples to measure the loss on: a fraction such as 0.02, or the name of a split. "
            "Default: none; for the built-in photographs, views that are not trained on.",
        ),
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=DATA,
            min=1,
            help="Random crops per image, each of which is a sample. Default: 1, the whole image; "
            "12 for the built-in photographs.",
        ),
    ] = None,
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming",
            rich_help_panel=DATA,
            help="Stream a data set from the hub without a copy on disk; needs --max-steps.",
        ),
    ] = False,
    cache_features: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=DATA,
            metavar="GIB",
            help="Cache up to this many GiB of the encoder's features on disk. Default: 0; 1 for "
            "the built-in photographs.",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=DATA,
            min=1,
            help="Maximum number of tokens per sample, with the visual tokens; longer samples are "
            "truncated at the end. Default: the language model's context length.",
        ),
    ] = None,
    group_by_length: Annotated[
        bool,
        typer.Option(
            "--group-by-length",
            rich_help_panel=DATA,
            help="Batch samples of similar lengths together.",
        ),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            rich_help_panel=DATA,
            help="Stop at the first unusable sample instead of skipping up to 1 % of the samples.",
        ),
    ] = False,
    workers: Annotated[
        int,
        typer.Option(
            rich_help_panel=DATA,
            min=0,
            help="Processes that decode images, per training process.",
        ),
    ] = 2,
    out: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=RUN,
            help="Folder for projector, checkpoints and logs. Default: visproj-train/KIND.",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=RUN,
            min=1,
            help="Passes over the training samples. Default: 1; for the built-in photographs 3, or "
            "7 with a Perceiver.",
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(rich_help_panel=RUN, min=1, help="Optimiser steps; overrides --epochs."),
    ] = None,
    learning_rate: Annotated[
        float,
        typer.Option(rich_help_panel=RUN, callback=check_positive, help="Peak learning rate."),
    ] = 2e-3,
    batch: Annotated[
        int,
        typer.Option(rich_help_panel=RUN, min=1, help="Per-process batch size (samples)."),
    ] = 2,
    accumulate: Annotated[
        int, typer.Option(rich_help_panel=RUN, min=1, help="Forward passes per optimiser step.")
    ] = 1,
    dtype: Annotated[
        TrainingDtype,
        typer.Option(
            rich_help_panel=RUN,
            help="bfloat16 trains under autocast and loads the language model in bfloat16; auto "
            "takes the dtype that is faster on this machine.",
        ),
    ] = TrainingDtype.auto,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            rich_help_panel=RUN,
            help="Save memory: recompute the language model's activations in the backward pass.",
        ),
    ] = False,
    save_steps: Annotated[
        int, typer.Option(rich_help_panel=RUN, min=1, help="Optimiser steps between checkpoints.")
    ] = 100,
    eval_steps: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=RUN,
            min=1,
            help="Optimiser steps between evaluations on the held-out samples. Default: one after "
            "each epoch; for the built-in photographs one before and one after training.",
        ),
    ] = None,
    log_steps: Annotated[
        int, typer.Option(rich_help_panel=RUN, min=1, help="Optimiser steps between log lines.")
    ] = 1,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=RUN,
            help="Destination of the log (may be repeated): csv, tensorboard, none, or one "
            "that transformers' Trainer supports. Default: csv and tensorboard.",
        ),
    ] = None,
    retrieval: Annotated[
        bool | None,
        typer.Option(
            rich_help_panel=RUN,
            help="After training, test whether the model finds the captions of held-out samples. "
            "Default: only for the built-in photographs.",
        ),
    ] = None,
    deepspeed: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=RUN,
            metavar="JSON",
            help="DeepSpeed's configuration file, for use with the deepspeed launcher.",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            rich_help_panel=RUN,
            callback=check_seed,
            help="Seed of the projector's initialisation and of the data order.",
        ),
    ] = 0,
    backend: Annotated[Backend, typer.Option(rich_help_panel=RUN, help=RUNS_ON)] = Backend.auto,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            rich_help_panel=RUN,
            help="Continue from the last checkpoint in OUT; --epochs may be larger than before.",
        ),
    ] = False,
    local_rank: Annotated[int, typer.Option(hidden=True)] = -1,  # the deepspeed launcher adds it
) -> None:
    """Train a projector between a frozen vision encoder and a frozen language model.

    Start it with torchrun, accelerate launch or deepspeed to train in several processes.
    """
    with errors.status("importing torch and transformers"):
        from visproj import use_backend
        from visproj.progress import ConsoleProgress
        from visproj.vlm.engine import TrainingSettings
        from visproj.vlm.options import TrainingOptions, part_or_split
        from visproj.vlm.report import render_report
        from visproj.vlm.samples import Columns
        from visproj.vlm.training import EPOCHS, run_training

        quiet_libraries()
    chosen = None if kind is None else kind.value
    name = chosen or ("perceiver" if from_projector is None else "continued")
    folder = out or Path("visproj-train", name)
    settings = TrainingSettings(
        epochs=epochs or (EPOCHS.get(name, EPOCHS["perceiver"]) if data is None else 1),
        max_steps=max_steps or -1,
        learning_rate=learning_rate,
        batch=batch,
        accumulate=accumulate,
        dtype=dtype.value,
        save_steps=save_steps,
        eval_steps=eval_steps or 0,
        log_steps=log_steps,
        workers=workers,
        gradient_checkpointing=gradient_checkpointing,
        by_length=group_by_length,
        report_to=tuple(report_to or ("csv", "tensorboard")),
        deepspeed=deepspeed,
        seed=seed,
    )
    options = TrainingOptions(
        folder,
        chosen,
        data,
        images,
        Columns(image_column, caption_column, question_column, answer_column, conversation_column),
        split,
        part_or_split(held_out),
        views,
        streaming,
        cache_features,
        encoder,
        language_model,
        prompt,
        queries,
        max_length,
        from_projector,
        resume,
        retrieval,
        strict,
    )
    with use_backend(backend.value), ConsoleProgress(errors, "reading the data") as progress:
        report = run_training(options, settings, progress=progress)
    if report is not None:
        output.print(render_report(report), soft_wrap=False)
        output.print(f"projector, checkpoints, log and loss curve in {folder}")


def chat(
    projector: Trained,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Image file (may be repeated, for several images in one question)."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Question. `<image>` marks the place of an image. Default: that of the "
            "projector's training."
        ),
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive",
            help="Hold a conversation that begins with the given images and prompt. Default if "
            "neither is given.",
        ),
    ] = False,
    encoder: TrainedEncoder = None,
    language_model: TrainedLanguageModel = None,
    attention: Annotated[
        Path | None,
        typer.Option(
            metavar="PNG",
            help="Draw the language model's attention to the image for each word of the answer.",
        ),
    ] = None,
    max_new_tokens: LongestAnswer = 64,
    backend: RunsOn = Backend.auto,
) -> None:
    """Ask questions about photographs with a trained projector.

    Without an image and a prompt this is a conversation: every line of the input is a question, and
    `/image PATH` adds an image to the next one. `/help` lists the other commands.
    """
    with errors.status("importing torch and transformers"):
        from visproj import use_backend
        from visproj.progress import ConsoleProgress
        from visproj.vlm.chat import ChatOptions, read_line, run_chat, run_conversation

        quiet_libraries()
    options = ChatOptions(
        projector,
        image or (),
        prompt,
        encoder,
        language_model,
        attention,
        max_new_tokens,
        interactive,
    )
    began = False

    def write(piece: str) -> None:
        nonlocal began
        began = True
        progress.stop()
        print(piece, end="", flush=True)

    def read() -> str | None:
        progress.stop()
        return read_line()

    first = "loading the projector" if options.is_conversation else "reading the photographs"
    reading = ConsoleProgress(errors, first, transient=True)
    with use_backend(backend.value), reading as progress:
        if options.is_conversation:
            run_conversation(options, read=read, write=write, say=errors.print, progress=progress)
            return
        try:
            run_chat(options, write=write, progress=progress)
        finally:
            if began:
                print(flush=True)


def answer(
    projector: Trained,
    data: Annotated[
        str,
        typer.Option(
            metavar="PATH_OR_NAME",
            help="Questions with images, in any format that `visproj train` reads. Answers in the "
            "data are copied to FILE as references.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Output file, .jsonl or .csv. A stopped run continues where the file ends.",
        ),
    ],
    images: ImageFolder = None,
    image_column: ImageColumn = None,
    question_column: QuestionColumn = None,
    answer_column: AnswerColumn = None,
    conversation_column: ConversationColumn = None,
    split: Annotated[str, typer.Option(help="Split whose questions are answered.")] = "train",
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Question for images that come without one. Default: that of the projector's "
            "training."
        ),
    ] = None,
    encoder: TrainedEncoder = None,
    language_model: TrainedLanguageModel = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 8,
    max_new_tokens: LongestAnswer = 64,
    backend: RunsOn = Backend.auto,
) -> None:
    """Answer a file of questions about images with a trained projector."""
    with errors.status("importing torch and transformers"):
        from visproj import use_backend
        from visproj.progress import ConsoleProgress
        from visproj.vlm.answering import AnswerOptions, run_answer
        from visproj.vlm.samples import Columns

        quiet_libraries()
    columns = Columns(image_column, None, question_column, answer_column, conversation_column)
    options = AnswerOptions(
        projector,
        data,
        out,
        images,
        columns,
        split,
        prompt,
        encoder,
        language_model,
        batch,
        max_new_tokens,
    )
    with use_backend(backend.value), ConsoleProgress(errors, "reading the data") as progress:
        report = run_answer(options, progress=progress)
    without = f", {report.faults} without an answer: see the field error" if report.faults else ""
    output.print(f"{report.total} rows in {out}, {report.written} of them new{without}")
