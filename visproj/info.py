"""Output of ``visproj info``: installed packages, devices and backends, settings, caches."""

import os
import platform
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from visproj import __version__
from visproj.errors import VisprojError
from visproj.outcome import REQUIREMENTS

if TYPE_CHECKING:
    import torch

# Environment variables of other packages that change what visproj does.
OTHER_SETTINGS = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "TRITON_INTERPRET",
    "XDG_CACHE_HOME",
)


def describe() -> Iterator[str]:
    """Yield the lines. A section that raises ends with its error, and the next ones follow."""
    yield f"visproj {__version__} in {Path(__file__).parent}"
    yield f"Python {platform.python_version()} on {platform.platform()}"
    yield from _section("packages", _packages)
    yield from _section("devices and their backends", _devices)
    yield from _section("settings", _settings)
    yield from _section("cache", _cache)


def _section(title: str, lines: Callable[[], Iterable[str]]) -> Iterator[str]:
    yield f"{title}:"
    try:
        for line in lines():
            yield f"  {line}"
    except Exception as error:  # a broken package can raise anything when it is imported
        yield f"  cannot be determined: {_reason(error)}"


def _reason(error: Exception) -> str:
    kind = "" if isinstance(error, VisprojError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())


def _packages() -> Iterator[str]:
    for distribution, requirement in distributions().items():
        try:
            version = metadata.version(distribution) or "damaged: it has no version"
        except metadata.PackageNotFoundError:
            version = f"not installed (pip install '{requirement}')"
        yield f"{distribution} {version}"


def distributions() -> dict[str, str]:
    """Return the requirement to install for each package that visproj can use, by its pip name."""
    names = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"}
    found = {
        names.get(package, package).replace("_", "-"): requirement
        for package, requirement in REQUIREMENTS.items()
    }
    return dict(sorted({**found, "triton": "triton"}.items()))


def _devices() -> Iterator[str]:
    import torch

    built = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    found = [f"{name} {version}" for name, version in built.items() if version]
    yield f"torch is built for {', '.join(found) or 'the CPU alone'}"
    yield f"cpu: {torch.get_num_threads()} threads; {_backend(torch.device('cpu'))}"
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(device)
        yield (
            f"{device}: {properties.name}, compute capability "
            f"{properties.major}.{properties.minor}, {properties.total_memory / 2**30:.0f} GiB; "
            f"{_backend(device)}"
        )


def _backend(device: "torch.device") -> str:
    """Return what runs operations on tensors of the device, and why."""
    import torch

    from visproj.backend import runs_triton
    from visproj.kernels.support import why_unavailable

    chosen = os.environ.get("VISPROJ_BACKEND", "auto")
    try:
        if runs_triton(torch.empty(0, device=device)):
            return f"Triton kernels (backend {chosen})"
    except Exception as error:
        return f"operations fail (backend {chosen}): {_reason(error)}"
    if chosen == "torch":
        return "PyTorch (backend torch)"
    try:
        why = why_unavailable(device) or "the GPU is not from NVIDIA"
    except Exception as error:
        why = _reason(error)
    return f"PyTorch (backend {chosen}: {why})"


def _settings() -> Iterator[str]:
    names = [name for name in os.environ if name.startswith("VISPROJ_") or name in OTHER_SETTINGS]
    for name in sorted(names):
        yield f"{name}={os.environ[name]}"
    if not names:
        yield "none in the environment"


def _cache() -> Iterator[str]:
    from visproj.files import cache_folder

    folder = cache_folder()
    if folder is None:
        yield "none: there is no home directory, and VISPROJ_CACHE_DIR is not set"
    elif not folder.exists():
        yield f"{folder}: does not exist yet"
    else:
        yield f"{folder}: {_size(folder)}"
        for entry in sorted(folder.iterdir()):
            yield f"  {entry.name}: {_size(entry)}"


def _size(path: Path) -> str:
    """Return the number of files at or below a path and their total size, as text."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{len(files)} files, {sum(file.stat().st_size for file in files) / 2**20:.1f} MiB"
