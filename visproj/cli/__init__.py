"""The command line: ``visproj demo | extract | train | chat | answer | tune | bench | info``.

Nothing here imports torch before a command runs, so that help and shell completion are quick.
"""

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich import box
from rich.table import Table
from typer.core import TyperGroup

from visproj import __version__
from visproj.cli.choices import (
    Format,
    KernelDtype,
    Kind,
    StoredDtype,
    check_seed,
    quiet_hub,
    quiet_libraries,
)
from visproj.cli.models import answer, chat, train
from visproj.errors import InputError
from visproj.outcome import discard_output, end_group_member, errors, fail, output, stop

if TYPE_CHECKING:
    from visproj.vlm.demo import DemoReport


class _Commands(TyperGroup):
    """Command group that prints a line after Ctrl-C; typer would only set the exit status."""

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
        typer.Option(help="Image file (may be repeated). Default: scikit-learn's two photographs."),
    ] = None,
    kind: Annotated[
        list[Kind] | None, typer.Option(help="Projector to run (may be repeated). Default: all.")
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="ID_OR_DIR",
            help="CLIP, SigLIP or DINOv2 model: a directory or a name on the hub. Default: an "
            "encoder that needs no hub.",
        ),
    ] = None,
    prompt: Annotated[
        str,
        typer.Option(
            help="Prompt for each image. `<image>` marks the place of the image, which comes first "
            "without it."
        ),
    ] = "Describe the photograph.",
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("visproj-demo"),
    seed: Annotated[
        int, typer.Option(callback=check_seed, help="Seed of the projectors' initialisation.")
    ] = 0,
) -> None:
    """Run untrained projectors on photographs and save pictures of the results."""
    with errors.status("importing transformers and matplotlib"):
        from visproj.progress import ConsoleProgress
        from visproj.vlm.demo import run_demo

        quiet_libraries()
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
            help="Qwen-VL checkpoint: a directory or a model's name on the hub.",
        ),
    ],
    dest: Annotated[
        Path,
        typer.Argument(
            metavar="DEST", help="Directory of the encoder. It is not created if an error occurs."
        ),
    ],
    dtype: Annotated[
        StoredDtype | None, typer.Option(help="Dtype to write. Default: that of the checkpoint.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")
    ] = None,
    format: Annotated[
        Format,
        typer.Option(
            help="`safetensors`, or `bin` to also write the pytorch_model.bin that "
            "DeepSpeed-VisualChat loads."
        ),
    ] = Format.safetensors,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an encoder that is already at DEST.")
    ] = False,
) -> None:
    """Save the vision encoder of a Qwen-VL checkpoint as a separate model."""
    from visproj.progress import ConsoleProgress
    from visproj.qwen_vl import extract_vision_encoder, render_summary

    if not Path(source).is_dir():
        quiet_hub()
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


for _command in (train, chat, answer):
    app.command()(_command)


@app.command()
def tune(
    kind: Annotated[
        list[Kind] | None,
        typer.Option(help="Projector to tune for (may be repeated). Default: all."),
    ] = None,
    width: Annotated[int, typer.Option(min=1, help="Width of the vision features.")] = 1024,
    lang_dim: Annotated[
        int, typer.Option(min=1, help="Width of the language model's embeddings.")
    ] = 4096,
    tokens: Annotated[
        int, typer.Option(min=1, help="Visual tokens per image, without a CLS token.")
    ] = 256,
    cls: Annotated[bool, typer.Option(help="Whether each image also has a CLS token.")] = True,
    queries: Annotated[
        int, typer.Option(min=1, help="Side of the Perceiver's square grid of queries.")
    ] = 16,
    heads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Attention heads. Default: LANG_DIM / 128 (Perceiver), WIDTH / 64 (ViT)."
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Images per call (may be repeated). Default: 1 and 8."),
    ] = None,
    dtype: Annotated[
        list[KernelDtype] | None,
        typer.Option(
            help="Dtype of the projector or of autocast (may be repeated). Default: bfloat16."
        ),
    ] = None,
    training: Annotated[bool, typer.Option(help="Also time the backward pass.")] = True,
) -> None:
    """Time the kernels on this GPU and record the fastest configurations for later runs."""
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
    """Benchmark against DeepSpeed-VisualChat's projectors and a fair PyTorch baseline.

    `visproj bench --help` lists the options.
    """
    root = Path(__file__).parent.parent.parent
    if not (root / "benchmarks" / "report.py").is_file():
        raise InputError(
            "the installed package does not contain the benchmarks: run the command in a clone"
        )
    sys.path.insert(0, str(root))
    from benchmarks.report import main as report

    raise typer.Exit(report(context.args))


@app.command()
def info(
    models: Annotated[
        bool,
        typer.Option(
            "--models", help="Print only the models that can be converted, with their GMACs."
        ),
    ] = False,
) -> None:
    """Print versions, devices and their backends, environment variables and cache sizes."""
    if models:
        from visproj.supported import describe_models as describe
    else:
        from visproj.info import describe
    for line in describe():
        output.print(line)


def main() -> None:
    """Run the command line and exit; print an error that the user can cause as one stderr line.

    The exit status is 1 after an error, 2 after arguments that cannot be used, 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        # Characters that the terminal's encoding lacks are printed as "?".
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    try:
        _run()
    except SystemExit as end:
        end_group_member(int(end.code or 0))
        raise


def _run() -> NoReturn:
    try:
        status = app(prog_name="visproj", standalone_mode=False)
        output.file.flush()
    except (KeyboardInterrupt, typer.Abort):
        stop()
    except BrokenPipeError:  # the reader has closed the pipe, as in `visproj ... | head`
        discard_output()
        sys.exit(1)
    except Exception as error:
        fail(error)
    if status == 130:  # set by typer after Ctrl-C while it reads arguments
        stop()
    sys.exit(status or 0)
