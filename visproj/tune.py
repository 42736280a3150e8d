"""Every configuration of the kernels timed beforehand, for what a projector will be called with.

Kernels time their configurations at first use and remember the fastest in a file. In an initialised
process group nothing is timed: its processes read that file. :func:`tune` fills it.
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
    """What the projectors will be called with.

    Attributes:
        kinds: Projectors, by the names that ``build_projector`` takes.
        width: Of the vision features.
        lang_dim: Width of the language model.
        tokens: Visual tokens per image, without CLS.
        has_cls: Whether each image has a CLS token besides.
        queries: Side of a Perceiver's square of queries.
        heads: Of a Perceiver and of the ViT projector's layer; ``None``: 128 wide in the former, 64
            wide in the latter.
        batches: Images per call.
        dtypes: By name; under autocast, its dtype.
        training: Whether to run the backward as well.
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
    """What :func:`tune` has recorded.

    Attributes:
        file: Where choices are kept.
        recorded: The new entries of the file: a kernel at a shape, and its configuration.
        left_out: The calls in which something ran out of memory.
    """

    file: Path
    recorded: dict[str, str]
    left_out: list[str]


def tune(options: TuningOptions, *, progress: Progress = SILENT) -> TuningReport:
    """Call projectors on the current GPU: kernels time their configurations, and record the best.

    Each projector is called without gradients, folded, and for training with its backward, which
    computes the gradient of the features too. What the file or this process knows already is not
    timed again.

    Args:
        options: What they are called with.
        progress: Is told of every call.

    Raises:
        BackendError: If the kernels do not run here, or are interpreted.
        InputError: If an option does not fit a projector, if this is one of several processes or in
            a process group, with ``VISPROJ_AUTOTUNE=0``, and where there is no cache folder.
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
    yield f"{len(report.recorded)} newly recorded in {report.file}"


def tuning_device() -> torch.device:
    """Return the current GPU.

    Raises:
        BackendError: If the kernels do not run on it, or are interpreted.
    """
    if not torch.cuda.is_available():
        raise BackendError("nothing can be timed here: there is no CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    reason = why_unavailable(device)
    if reason is None and torch.version.hip is not None:
        reason = "the GPU is not from NVIDIA"
    if reason is None:
        from visproj.kernels.device import INTERPRETING

        reason = "TRITON_INTERPRET is set" if INTERPRETING else None
    if reason is not None:
        raise BackendError(f"nothing can be timed here: {reason}")
    return device


def _writable_file() -> Path:
    """Return the file that choices are recorded in, after writing it once as it is."""
    from visproj.kernels.device import switched_on
    from visproj.kernels.tuning import cache_file, recorded

    if not switched_on("VISPROJ_AUTOTUNE"):
        raise InputError("nothing is timed with VISPROJ_AUTOTUNE=0: leave it out")
    refuse_parallel("tuning")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise InputError("nothing is timed in a process group: tune before it is initialised")
    file = cache_file()
    if file is None:
        raise InputError("there is no folder to record choices in: set VISPROJ_CACHE_DIR")
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        write_json(partial, recorded(file))
    return file


def _tune_projector(
    kind: str, dtype: str, options: TuningOptions, device: torch.device, progress: Progress
) -> Iterator[str]:
    """Make every call of one projector; yield those that ran out of memory."""
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
    """The most square one: every grid of so many tokens has the same shapes."""
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
    """Forward and backward, with gradients for the features as a trained encoder wants them."""
    out = projector(x.requires_grad_(), **options)
    wanted = [x, *(weight for weight in projector.parameters() if weight.requires_grad)]
    torch.autograd.grad(out, wanted, torch.randn_like(out))


def _fits(call: Callable[[Tensor], object], shape: tuple[int, ...], **where: Any) -> bool:
    """Make a call; whether neither it nor the timing in it ran out of memory."""
    before = _memory_errors()
    try:
        call(torch.randn(shape, **where))
    except torch.OutOfMemoryError:
        return False
    return _memory_errors() == before  # where timing has no memory, kernels run untimed


def _memory_errors() -> int:
    return torch.cuda.memory_stats().get("num_ooms", 0)
