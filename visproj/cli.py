"""The command line: ``visproj demo | train | chat | extract | tune | bench | info``.

Nothing here imports torch before a command runs, so that help and shell completion are quick.
"""

import io
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from typer.core import TyperGroup

from visproj import __version__
from visproj.errors import InputError
from visproj.outcome import discard_output, errors, fail, output, stop

if TYPE_CHECKING:
    from visproj.vlm.demo import DemoReport


# The choices of options, which typer checks and completes. The tests compare them with the lists in
# the modules that take them, which import torch.
class Kind(str, Enum):
    """Projectors."""

    baseline = "baseline"
    vit = "vit"
    perceiver = "perceiver"


class Backend(str, Enum):
    """What runs a projector."""

    auto = "auto"
    triton = "triton"
    torch = "torch"


class TrainingDtype(str, Enum):
    """Dtypes to train in."""

    bfloat16 = "bfloat16"
    float32 = "float32"


class KernelDtype(str, Enum):
    """Dtypes that the kernels compute in."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class StoredDtype(str, Enum):
    """Dtypes to write."""

    float64 = "float64"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Format(str, Enum):
    """What an extracted encoder is written as."""

    safetensors = "safetensors"
    bin = "bin"


class _Commands(TyperGroup):
    """The commands; typer itself would turn Ctrl-C into an exit status without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            stop(interrupt)


app = typer.Typer(cls=_Commands, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        output.print(f"visproj {__version__}")
        raise typer.Exit


def _check_positive(value: float) -> float:
    if not 0 < value < float("inf"):
        raise typer.BadParameter(f"{value} is not a positive number")
    return value


def _check_seed(value: int) -> int:
    if not 0 <= value < 2**63:
        raise typer.BadParameter(f"{value} is not at least 0 and less than 2**63")
    return value


@app.callback(invoke_without_command=True)
def visproj(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Vision-to-language projectors."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    image: Annotated[
        list[Path] | None,
        typer.Option(help="A photograph; repeat for more. Default: two of scikit-learn's."),
    ] = None,
    kind: Annotated[
        list[Kind] | None, typer.Option(help="A projector; repeat for more. Default: all.")
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="ID_OR_DIR",
            help="A CLIP or DINOv2 model for transformers. Default: one that needs no model hub.",
        ),
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="Text beside each image; `<image>` in it places the image.")
    ] = "Describe the photograph.",
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("visproj-demo"),
    seed: Annotated[
        int, typer.Option(callback=_check_seed, help="Seed of the projectors' initialisation.")
    ] = 0,
) -> None:
    """Project photographs with every projector, untrained, and draw what there is to see."""
    with errors.status("importing transformers and matplotlib"):
        from visproj.progress import ConsoleProgress
        from visproj.vlm.demo import run_demo

        _quiet_libraries()
    with ConsoleProgress(errors, "reading the photographs", transient=True) as progress:
        report = run_demo(
            image or (),
            kinds=[member.value for member in kind or Kind],
            encoder=encoder,
            prompt=prompt,
            out=out,
            seed=seed,
            progress=progress,
        )
    _print_report(report, out, seed)


def _quiet_libraries() -> None:
    """Silence what the libraries say on the way: our own lines show progress and errors."""
    from transformers.utils import logging

    _quiet_hub()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _quiet_hub() -> None:
    """Silence the client's many lines about retries, and its bars where no terminal shows them."""
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not errors.is_terminal:
        disable_progress_bars()


def _print_report(report: "DemoReport", out: Path, seed: int) -> None:
    title = f"Untrained projectors (random initialisation, seed {seed})"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("projector")
    numbers = ("parameters", "tokens\nin", "tokens\nout", "ms per\nimage", "max error\nvs fp64")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("embedding\nsequence", no_wrap=True)
    for row in report.rows:
        table.add_row(
            row.kind,
            f"{row.parameters:,}",
            str(row.tokens_in),
            str(row.tokens_out),
            f"{row.milliseconds:.1f}",
            f"{row.max_error:.1e}",
            str(list(row.sequence)),
        )
    output.print(f"photographs: {', '.join(report.photographs)}")
    output.print(f"encoder: {report.encoder}")
    output.print(f"prompt tokens and embeddings: {report.language}")
    output.print(table, soft_wrap=False)
    for note in report.notes:
        output.print(f"note: {note}")
    output.print(f"{len(report.pictures)} pictures in {out}")


@app.command()
def extract(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A Qwen-VL checkpoint: a directory, or a model's name on the hub.",
        ),
    ],
    dest: Annotated[
        Path,
        typer.Argument(
            metavar="DEST", help="The encoder's directory, created whole or not at all."
        ),
    ],
    dtype: Annotated[
        StoredDtype | None, typer.Option(help="Dtype to write. Default: as stored.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")
    ] = None,
    format: Annotated[
        Format,
        typer.Option(
            help="`safetensors`, or `bin` to add the pytorch_model.bin of DeepSpeed-VisualChat."
        ),
    ] = Format.safetensors,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an encoder that is at DEST.")
    ] = False,
) -> None:
    """Write the vision encoder of a Qwen-VL checkpoint as a model of its own."""
    from visproj.progress import ConsoleProgress
    from visproj.qwen_vl import extract_vision_encoder, render_summary

    if not Path(source).is_dir():
        _quiet_hub()
    with ConsoleProgress(errors, "opening the checkpoint", transient=True) as progress:
        summary = extract_vision_encoder(
            source,
            dest,
            dtype=None if dtype is None else dtype.value,
            revision=revision,
            format=format.value,
            overwrite=overwrite,
            progress=progress,
        )
    output.print(render_summary(summary))


@app.command()
def train(
    kind: Annotated[Kind, typer.Option(help="The projector.")] = Kind.perceiver,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with images and a captions.jsonl. Default: 15 photographs that come with "
            "scikit-image and scikit-learn."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for projector, state and logs. Default: visproj-train/KIND."),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="ID_OR_DIR",
            help="A CLIP or DINOv2 model for transformers. Default: one that needs no model hub.",
        ),
    ] = None,
    language_model: Annotated[
        str | None,
        typer.Option(
            metavar="ID_OR_DIR_OR_GGUF",
            help="A causal language model for transformers. Default: SmolLM2-135M-Instruct, "
            "without a model hub.",
        ),
    ] = None,
    queries: Annotated[
        int,
        typer.Option(
            min=1,
            help="Side of a Perceiver's square of queries; DeepSpeed-VisualChat's is 16, which "
            "takes twice the time.",
        ),
    ] = 8,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Passes over the training views. Default: 3, of a Perceiver 6."),
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(callback=_check_positive, help="Peak learning rate.")
    ] = 2e-3,
    batch: Annotated[
        int, typer.Option(min=1, help="Views per forward pass, each with its captions.")
    ] = 2,
    accumulate: Annotated[int, typer.Option(min=1, help="Forward passes per optimiser step.")] = 1,
    dtype: Annotated[
        TrainingDtype,
        typer.Option(help="bfloat16 trains under autocast and keeps the frozen models in it."),
    ] = TrainingDtype.bfloat16,
    seed: Annotated[
        int,
        typer.Option(
            callback=_check_seed, help="Seed of the initialisation and the order of the data."
        ),
    ] = 0,
    backend: Annotated[Backend, typer.Option(help="What the projector runs on.")] = Backend.auto,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where OUT stopped.")] = False,
) -> None:
    """Train a projector between a frozen vision encoder and a frozen language model."""
    with errors.status("importing torch and transformers"):
        from visproj import use_backend
        from visproj.progress import ConsoleProgress
        from visproj.vlm.loop import TrainingSettings
        from visproj.vlm.report import render_report
        from visproj.vlm.training import EPOCHS, TrainingOptions, run_training

        _quiet_libraries()
    settings = TrainingSettings(
        epochs=EPOCHS[kind.value] if epochs is None else epochs,
        learning_rate=learning_rate,
        batch=batch,
        accumulate=accumulate,
        dtype=dtype.value,
        seed=seed,
    )
    folder = out or Path("visproj-train", kind.value)
    options = TrainingOptions(
        kind.value, folder, data, encoder, language_model, queries=queries, resume=resume
    )
    with use_backend(backend.value), ConsoleProgress(errors, "reading the data") as progress:
        report = run_training(options, settings, progress=progress)
    output.print(render_report(report, kind.value), soft_wrap=False)
    output.print(f"projector, log and loss curve in {folder}")


@app.command()
def chat(
    projector: Annotated[
        Path, typer.Option(help="What `visproj train` left in OUT, or OUT/projector.")
    ],
    image: Annotated[
        list[Path], typer.Option(help="A photograph; repeat for more, all for one answer.")
    ],
    prompt: Annotated[
        str | None,
        typer.Option(help="`<image>` in it places an image. Default: the projector's in training."),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(metavar="ID_OR_DIR", help="Default: the projector's in training."),
    ] = None,
    language_model: Annotated[
        str | None,
        typer.Option(metavar="ID_OR_DIR_OR_GGUF", help="Default: the projector's in training."),
    ] = None,
    attention: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Draw where the model looked as it wrote each word."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    backend: Annotated[Backend, typer.Option(help="What the projector runs on.")] = Backend.auto,
) -> None:
    """Ask a trained projector's model about photographs."""
    with errors.status("importing torch and transformers"):
        from visproj import use_backend
        from visproj.progress import ConsoleProgress
        from visproj.vlm.chat import ChatOptions, run_chat

        _quiet_libraries()
    options = ChatOptions(
        projector, image, prompt, encoder, language_model, attention, max_new_tokens
    )
    began = False

    def write(piece: str) -> None:
        nonlocal began
        began = True
        progress.stop()
        print(piece, end="", flush=True)

    try:
        reading = ConsoleProgress(errors, "reading the photographs", transient=True)
        with use_backend(backend.value), reading as progress:
            run_chat(options, write=write, progress=progress)
    finally:
        if began:
            print(flush=True)


@app.command()
def tune(
    kind: Annotated[
        list[Kind] | None, typer.Option(help="A projector; repeat for more. Default: all.")
    ] = None,
    width: Annotated[int, typer.Option(min=1, help="Width of the vision features.")] = 1024,
    lang_dim: Annotated[int, typer.Option(min=1, help="Width of the language model.")] = 4096,
    tokens: Annotated[int, typer.Option(min=1, help="Visual tokens per image, without CLS.")] = 256,
    cls: Annotated[bool, typer.Option(help="Each image has a CLS token besides.")] = True,
    queries: Annotated[int, typer.Option(min=1, help="Side of a Perceiver's queries.")] = 16,
    heads: Annotated[
        int | None,
        typer.Option(min=1, help="Default: of a Perceiver LANG_DIM / 128, of a ViT WIDTH / 64."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Images per call; repeat. Default: 1, 8.")
    ] = None,
    dtype: Annotated[
        list[KernelDtype] | None,
        typer.Option(help="The projector's, or autocast's; repeat for more. Default: bfloat16."),
    ] = None,
    training: Annotated[bool, typer.Option(help="Time the backward as well.")] = True,
) -> None:
    """Time the kernels on this GPU beforehand and record the fastest configurations."""
    with errors.status("importing torch"):
        from visproj.progress import ConsoleProgress
        from visproj.tune import TuningOptions, render_tuning
        from visproj.tune import tune as run_tuning

    kinds = tuple(member.value for member in kind or Kind)
    dtypes = tuple(member.value for member in dtype or [KernelDtype.bfloat16])
    shape = (width, lang_dim, tokens, cls, queries, heads)
    options = TuningOptions(kinds, *shape, tuple(batch or (1, 8)), dtypes, training)
    with ConsoleProgress(errors, "building the projectors") as progress:
        report = run_tuning(options, progress=progress)
    for line in render_tuning(report):
        output.print(line)


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def bench(context: typer.Context) -> None:
    """Measure against upstream and a fair baseline; `visproj bench --help` has the options."""
    root = Path(__file__).parent.parent
    if not (root / "benchmarks" / "report.py").is_file():
        raise InputError("the benchmarks are in the repository, not in the package: use a clone")
    sys.path.insert(0, str(root))
    from benchmarks.report import main as report

    raise typer.Exit(report(context.args))


@app.command()
def info(
    models: Annotated[
        bool, typer.Option("--models", help="Instead, the models that convert, and what they gain.")
    ] = False,
) -> None:
    """Print versions, devices and the backend of each, settings, and caches with their sizes."""
    if models:
        from visproj.supported import describe_models as describe
    else:
        from visproj.info import describe
    for line in describe():
        output.print(line)


def main() -> None:
    """Run the command line and exit; what the user can cause becomes one line on stderr.

    The exit status is 1 after an error, 2 after arguments that cannot be read, 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal of few characters shows a "?" for the others.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    try:
        status = app(prog_name="visproj", standalone_mode=False)
        output.file.flush()
    except (KeyboardInterrupt, typer.Abort):
        stop()
    except BrokenPipeError:  # `visproj ... | head` has seen enough
        discard_output()
        sys.exit(1)
    except Exception as error:
        fail(error)
    if status == 130:  # typer's for Ctrl-C while arguments are read
        stop()
    sys.exit(status or 0)


if __name__ == "__main__":
    main()
