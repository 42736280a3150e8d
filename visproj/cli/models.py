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

# Options that several commands have.
ImageFolder = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=DATA,
        metavar="DIR",
        help="Folder that image paths are relative to. Default: the folder of the data.",
    ),
]


def _column(usual: str) -> typer.models.OptionInfo:
    return typer.Option(rich_help_panel=DATA, help=f"Default: {usual}.")


ImageColumn = Annotated[str | None, _column("`image` or `images`")]
CaptionColumn = Annotated[str | None, _column("`captions` or `caption`")]
QuestionColumn = Annotated[str | None, _column("`question`")]
AnswerColumn = Annotated[str | None, _column("`answer` or `answers`")]
ConversationColumn = Annotated[str | None, _column("`conversations` or `messages`")]
Trained = Annotated[Path, typer.Option(help="What `visproj train` left in OUT, or OUT/projector.")]
TrainedEncoder = Annotated[
    str | None, typer.Option(metavar=ID_OR_DIR, help="Default: the projector's in training.")
]
TrainedLanguageModel = Annotated[
    str | None,
    typer.Option(metavar=ID_OR_DIR_OR_GGUF, help="Default: the projector's in training."),
]
LongestAnswer = Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")]
RunsOn = Annotated[Backend, typer.Option(help="What the projector runs on.")]


def train(
    kind: Annotated[
        Kind | None,
        typer.Option(
            rich_help_panel=MODELS,
            help="The projector. Default: that of --from-projector, else a Perceiver.",
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=MODELS,
            metavar=ID_OR_DIR,
            help="A CLIP, SigLIP or DINOv2 model for transformers, or what `visproj extract` "
            "wrote. Default: one that needs no model hub.",
        ),
    ] = None,
    language_model: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=MODELS,
            metavar=ID_OR_DIR_OR_GGUF,
            help="A causal language model for transformers. Default: SmolLM2-135M-Instruct, "
            "without a model hub.",
        ),
    ] = None,
    queries: Annotated[
        int,
        typer.Option(
            rich_help_panel=MODELS,
            min=1,
            help="Side of a Perceiver's square of queries; DeepSpeed-VisualChat's is 16, which "
            "takes twice the time.",
        ),
    ] = 8,
    from_projector: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=MODELS,
            metavar="DIR",
            help="Begin with the weights of a projector that was trained before.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DATA,
            metavar="PATH_OR_NAME",
            help="A folder with captions.jsonl, LLaVA's JSON, an image folder with metadata, "
            "Parquet, Arrow or CSV files, WebDataset shards (*.tar), or a data set's name on the "
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
        str, typer.Option(rich_help_panel=DATA, help="The question that captions answer.")
    ] = "Describe the photograph.",
    split: Annotated[str, typer.Option(rich_help_panel=DATA, help="Split to train on.")] = "train",
    held_out: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DATA,
            metavar="PART_OR_SPLIT",
            help="Samples to measure the loss on: a part such as 0.02, or the name of a split. "
            "Default: none; of the built-in photographs, other views.",
        ),
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=DATA,
            min=1,
            help="Random crops of each image, each one a sample. Default: 1, the whole image; 14 "
            "of the built-in photographs.",
        ),
    ] = None,
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming",
            rich_help_panel=DATA,
            help="Read a hub's data set as it comes; needs --max-steps.",
        ),
    ] = False,
    cache_features: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=DATA,
            metavar="GIB",
            help="Keep up to this many GiB of the encoder's features on disk. Default: 0; 1 for "
            "the built-in photographs.",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=DATA,
            min=1,
            help="Tokens per sample, visual ones included; the ends of longer ones are cut. "
            "Default: what the language model reads.",
        ),
    ] = None,
    group_by_length: Annotated[
        bool,
        typer.Option(
            "--group-by-length",
            rich_help_panel=DATA,
            help="Put samples of similar lengths into a batch.",
        ),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            rich_help_panel=DATA,
            help="Stop at the first sample that cannot be used, instead of leaving up to 1 % out.",
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
            help="Passes over the training samples. Default: 1; of the built-in photographs 3, "
            "for a Perceiver 7.",
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(rich_help_panel=RUN, min=1, help="Optimiser steps, instead of --epochs."),
    ] = None,
    learning_rate: Annotated[
        float,
        typer.Option(rich_help_panel=RUN, callback=check_positive, help="Peak learning rate."),
    ] = 2e-3,
    batch: Annotated[
        int,
        typer.Option(rich_help_panel=RUN, min=1, help="Samples per forward pass and process."),
    ] = 2,
    accumulate: Annotated[
        int, typer.Option(rich_help_panel=RUN, min=1, help="Forward passes per optimiser step.")
    ] = 1,
    dtype: Annotated[
        TrainingDtype,
        typer.Option(
            rich_help_panel=RUN,
            help="bfloat16 trains under autocast and keeps the frozen models in it; auto takes "
            "the dtype that is faster on this machine.",
        ),
    ] = TrainingDtype.auto,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            rich_help_panel=RUN,
            help="Save memory: compute the language model's activations again in the backward "
            "pass.",
        ),
    ] = False,
    save_steps: Annotated[
        int, typer.Option(rich_help_panel=RUN, min=1, help="Steps between checkpoints.")
    ] = 100,
    eval_steps: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=RUN,
            min=1,
            help="Steps between losses on held-out samples. Default: after each epoch; of the "
            "built-in photographs before and after training.",
        ),
    ] = None,
    log_steps: Annotated[
        int, typer.Option(rich_help_panel=RUN, min=1, help="Steps between lines of the log.")
    ] = 1,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=RUN,
            help="Where the log goes: csv, tensorboard, none, or anything that transformers knows; "
            "repeat for more. Default: csv and tensorboard.",
        ),
    ] = None,
    retrieval: Annotated[
        bool | None,
        typer.Option(
            rich_help_panel=RUN,
            help="Afterwards, find the captions of held-out samples. Default: of the built-in "
            "photographs.",
        ),
    ] = None,
    deepspeed: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=RUN, metavar="JSON", help="DeepSpeed's configuration, for its launcher."
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            rich_help_panel=RUN,
            callback=check_seed,
            help="Seed of the initialisation and the order of the data.",
        ),
    ] = 0,
    backend: Annotated[
        Backend, typer.Option(rich_help_panel=RUN, help="What the projector runs on.")
    ] = Backend.auto,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            rich_help_panel=RUN,
            help="Go on from the last checkpoint in OUT, also for more epochs.",
        ),
    ] = False,
    local_rank: Annotated[int, typer.Option(hidden=True)] = -1,  # the deepspeed launcher adds it
) -> None:
    """Train a projector between a frozen vision encoder and a frozen language model.

    Started by torchrun, accelerate launch or deepspeed it trains in all of their processes.
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
        typer.Option(help="A photograph; repeat for more, all for one answer."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="`<image>` in it places an image. Default: the projector's in training."),
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive",
            help="Hold a conversation, which begins with the images and the prompt if given. "
            "Default: only if neither is given.",
        ),
    ] = False,
    encoder: TrainedEncoder = None,
    language_model: TrainedLanguageModel = None,
    attention: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Draw where the model looked as it wrote each word."),
    ] = None,
    max_new_tokens: LongestAnswer = 64,
    backend: RunsOn = Backend.auto,
) -> None:
    """Ask a trained projector's model about photographs.

    Without an image and a prompt this is a conversation: every line of the input is a question, and
    `/image PATH` shows an image with the next one. `/help` lists the other commands.
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
            help="Questions with images, in any form that `visproj train` takes; answers in it are "
            "kept as references.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="A .jsonl or .csv file; a run that was stopped goes on in it."
        ),
    ],
    images: ImageFolder = None,
    image_column: ImageColumn = None,
    question_column: QuestionColumn = None,
    answer_column: AnswerColumn = None,
    conversation_column: ConversationColumn = None,
    split: Annotated[str, typer.Option(help="Split to answer.")] = "train",
    prompt: Annotated[
        str | None,
        typer.Option(
            help="What is asked about images that come without a question. Default: the "
            "projector's in training."
        ),
    ] = None,
    encoder: TrainedEncoder = None,
    language_model: TrainedLanguageModel = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 8,
    max_new_tokens: LongestAnswer = 64,
    backend: RunsOn = Backend.auto,
) -> None:
    """Answer a file of questions about images with a trained projector's model."""
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
    without = f", {report.faults} without an answer: see their error" if report.faults else ""
    output.print(f"{report.total} rows in {out}, {report.written} of them new{without}")
