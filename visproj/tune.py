"""Autotuning of the kernels ahead of time, for the shapes that a projector will be called with.

A kernel times its configurations at first use and records the fastest in a file. In an initialised
process group nothing is timed, and every process reads that file. :func:`tune` fills it beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visproj.backend import use_backend
from visproj.clip import VisionConfig
from visproj.errors import BackendError, InputError
from visproj.files import replacing, write_json
from visproj.kernels.support import why_unavailable
from visproj.progress import SILENT, Progress
from visproj.projectors import KINDS, build_projector
from visproj.vlm.run_folder import refuse_parallel

DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}


@dataclass(frozen=True)
class TuningOptions:
    """Projectors, shapes and dtypes to tune the kernels for.

    Attributes:
        kinds: Projectors, by the names that ``build_projector`` takes.
        width: Width of the vision features.
        lang_dim: Width of the language model's embeddings.
        tokens: Visual tokens per image, without a CLS token.
        has_cls: Whether each image also has a CLS token.
        queries: Side of the Perceiver's square grid of queries.
        heads: Attention heads of the Perceiver and of the ViT projector's layer; ``None`` makes
            heads of width 128 in the Perceiver and 64 in the ViT projector.
        batches: Numbers of images per call.
        dtypes: Names of the projectors' dtypes, or of autocast's dtype.
        training: Whether to also run the backward pass.
    """

    kinds: tuple[str, ...] = KINDS
    width: int = 1024
    lang_dim: int = 4096
    tokens: int = 256
    has_cls: bool = True
    queries: int = 16
    heads: int | None = None
    batches: tuple[int, ...] = (1, 8)
    dtypes: tuple[str, ...] = ("bfloat16",)
    training: bool = True

    def __post_init__(self) -> None:
        for name, count in (("tokens", self.tokens), *(("batch", n) for n in self.batches)):
            if count < 1:
                raise InputError(f"{name} must be at least 1, got {count}")
        for name in self.dtypes:
            if name not in DTYPES:
                raise InputError(f"unknown dtype {name!r}, choose from {', '.join(DTYPES)}")


class TuningReport(NamedTuple):
    """Result of :func:`tune`.

    Attributes:
        file: File that holds the fastest configurations.
        recorded: New entries of the file: the configuration for each kernel and shape.
        left_out: Calls that ran out of memory, themselves or in the timing of a kernel.
    """

    file: Path
    recorded: dict[str, str]
    left_out: list[str]


def tune(options: TuningOptions, *, progress: Progress = SILENT) -> TuningReport:
    """Call projectors on the current GPU, so that kernels time and record their configurations.

    Each projector is called without gradients, then folded, then (with ``options.training``) with
    its backward pass, which also computes the gradient of the features. Kernels and shapes that the
    file or this process already knows are not timed again.

    Args:
        options: Projectors, shapes and dtypes of the calls.
        progress: Receives each call.

    Returns:
        The file, its new entries, and the calls that ran out of memory.

    Raises:
        BackendError: If the kernels cannot run on this machine, or Triton interprets them.
        InputError: If an option does not fit a projector, if this is one of several processes or a
            process group is initialised, if ``VISPROJ_AUTOTUNE`` is 0, or if there is no cache
            folder.
        OSError: If the file cannot be written.
    """
    device = tuning_device()
    from visproj.kernels.tuning import recorded

    file = _writable_file()
    before = recorded(file)
    left_out: list[str] = []
    with use_backend("triton"):
        for kind, dtype in product(options.kinds, options.dtypes):
            left_out += _tune_projector(kind, dtype, options, device, progress)
    new = {key: name for key, name in recorded(file).items() if before.get(key) != name}
    return TuningReport(file, new, left_out)


def render_tuning(report: TuningReport) -> Iterator[str]:
    """Yield the report's lines."""
    for key, name in sorted(report.recorded.items()):
        yield f"{key}: {name}"
    for call in report.left_out:
        yield f"note: out of memory, not everything was timed: {call}"
    yield f"{len(report.recorded)} configurations newly recorded in {report.file}"


def tuning_device() -> torch.device:
    """Return the current GPU.

    Raises:
        BackendError: If the kernels cannot run on it, or Triton interprets them.
    """
    if not torch.cuda.is_available():
        raise BackendError("nothing can be timed here: there is no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    reason = why_unavailable(device)
    if reason is None and torch.version.hip is not None:
        reason = "the GPU is not from NVIDIA"
    if reason is None:
        from visproj.kernels.device import INTERPRETING

        reason = "TRITON_INTERPRET is set, unset it" if INTERPRETING else None
    if reason is not None:
        raise BackendError(f"nothing can be timed here: {reason}")
    return device


def _writable_file() -> Path:
    """Return the file of configurations, rewritten once to check that it can be written."""
    from visproj.kernels.device import switched_on
    from visproj.kernels.tuning import cache_file, recorded

    if not switched_on("VISPROJ_AUTOTUNE"):
        raise InputError("nothing is timed with VISPROJ_AUTOTUNE=0: unset it")
    refuse_parallel("tuning")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise InputError("nothing is timed in a process group: tune before initialising it")
    file = cache_file()
    if file is None:
        raise InputError("there is no folder to record configurations in: set VISPROJ_CACHE_DIR")
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        write_json(partial, recorded(file))
    return file


def _tune_projector(
    kind: str, dtype: str, options: TuningOptions, device: torch.device, progress: Progress
) -> Iterator[str]:
    """Make all calls of one projector and yield those that ran out of memory."""
    projector = _build(kind, options).to(device, DTYPES[dtype])
    grid = {"grid": _grid(options.tokens)} if kind == "perceiver" else {}
    folded = projector.fold(**grid)
    calls: dict[str, Callable[[Tensor], object]] = {
        "forward": torch.no_grad()(lambda x: projector(x, **grid)),
        "folded": torch.no_grad()(lambda x: folded(x, **grid)),
    }
    if options.training:
        calls["forward and backward"] = lambda x: _train(projector, x, **grid)
    progress.stage(f"timing {kind} in {dtype}", len(options.batches) * len(calls))
    for batch, (name, call) in product(options.batches, calls.items()):
        shape = batch, options.has_cls + options.tokens, options.width
        if not _fits(call, shape, dtype=DTYPES[dtype], device=device):
            yield f"{kind} in {dtype}, {batch} images, {name}"
        progress.advance(f"{batch} images, {name}")


def _grid(tokens: int) -> tuple[int, int]:
    """Return the most nearly square grid; tensor shapes depend only on the number of tokens."""
    rows = max(n for n in range(1, math.isqrt(tokens) + 1) if tokens % n == 0)
    return rows, tokens // rows


def _build(kind: str, options: TuningOptions) -> Any:
    config: Any = options.width
    if kind == "vit":
        heads = max(1, options.width // 64) if options.heads is None else options.heads
        config = VisionConfig(options.width, 4 * options.width, heads, "quick_gelu", 1e-5, 0.0)
    if kind != "perceiver":
        return build_projector(kind, config, options.lang_dim)
    return build_projector(
        kind,
        config,
        options.lang_dim,
        query_grid=(options.queries, options.queries),
        num_heads=options.heads,
        has_cls=options.has_cls,
    )


def _train(projector: nn.Module, x: Tensor, **options: Any) -> None:
    """Run a forward and a backward pass; the features get a gradient, as from a trained encoder."""
    out = projector(x.requires_grad_(), **options)
    wanted = [x, *(weight for weight in projector.parameters() if weight.requires_grad)]
    torch.autograd.grad(out, wanted, torch.randn_like(out))


def _fits(call: Callable[[Tensor], object], shape: tuple[int, ...], **where: Any) -> bool:
    """Make a call and return whether it and the timing in it had enough memory."""
    before = _memory_errors()
    try:
        call(torch.randn(shape, **where))
    except torch.OutOfMemoryError:
        return False
    return _memory_errors() == before  # a kernel whose timing runs out of memory is run untimed


def _memory_errors() -> int:
    return torch.cuda.memory_stats().get("num_ooms", 0)
