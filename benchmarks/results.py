"""The CSV file of results: one row per measurement, and notes about the machine."""

from __future__ import annotations

import csv
import math
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, get_type_hints

import torch

from visproj.errors import InputError

OK, FAILED, LEFT_OUT = "ok", "failed", "left out"
# The implementation that others are compared with between runs, because its code does not change.
YARDSTICK = "fair"
# Report only changes of at least this size that lie outside the spread of both runs.
LEAST_CHANGE = 0.05


@dataclass(frozen=True)
class Row:
    """One implementation at one shape in one mode.

    Columns that begin with ``model`` are counted, not measured. Times are medians with the 20th and
    80th percentile. ``vs_*`` is the time of that baseline divided by the row's, from pairs.
    """

    task: str
    implementation: str
    mode: str
    encoder: str
    vision_width: int
    tokens: int
    lang_dim: int
    batch: int
    dtype: str
    status: str = OK
    reason: str = ""
    output_error: float | None = None
    gradient_error: float | None = None
    checked_images: int | None = None
    samples: int | None = None
    time_us: float | None = None
    time_us_p20: float | None = None
    time_us_p80: float | None = None
    vs_upstream: float | None = None
    vs_upstream_p20: float | None = None
    vs_upstream_p80: float | None = None
    vs_fair: float | None = None
    vs_fair_p20: float | None = None
    vs_fair_p80: float | None = None
    peak_mib: float | None = None
    launches: int | None = None
    kernel_us: float | None = None
    model_gflop: float | None = None
    model_min_mb: float | None = None
    model_launches: int | None = None
    model_floor_us: float | None = None
    share_of_model_floor: float | None = None

    @property
    def shape(self) -> str:
        """Encoder, language width, batch and dtype in one word."""
        return f"{self.encoder}-D{self.lang_dim}-B{self.batch}-{self.dtype}"

    @property
    def beats_floor(self) -> bool:
        """True if it was faster than its floor, which is then not a lower bound."""
        return (self.share_of_model_floor or 0.0) > 1

    @property
    def key(self) -> tuple[str, str, str, str]:
        """The values that a row of another run must have to be compared with this one."""
        return self.task, self.shape, self.mode, self.implementation


_TYPES = get_type_hints(Row)


@dataclass(frozen=True)
class Results:
    """A whole file: notes by name, and rows."""

    notes: dict[str, str]
    rows: list[Row]


class Writer:
    """A writer that appends rows as they come, so that a run that ends early keeps its rows."""

    def __init__(self, path: Path, notes: dict[str, str]) -> None:
        self._file = path.open("w", newline="", encoding="utf-8")
        for name, text in notes.items():
            self.note(name, text)
        self._csv = csv.DictWriter(self._file, [field.name for field in fields(Row)])
        self._csv.writeheader()

    def write(self, rows: Iterable[Row]) -> None:
        """Append rows and flush them to the file."""
        self._csv.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            for row in rows
        )
        self._file.flush()

    def note(self, name: str, text: str) -> None:
        """Append a note, also after rows."""
        self._file.write(f"# {name}: {' '.join(text.split())}\n")

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def read(path: Path) -> Results:
    """Read what :class:`Writer` wrote.

    Raises:
        OSError: If it cannot be read.
        InputError: If it has other columns or is damaged; the message names the line.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a benchmark result: it is not text") from error
    notes: dict[str, str] = {}
    numbered = []
    for number, line in enumerate(lines, 1):
        if line.startswith("# "):
            name, _, text = line[2:].partition(": ")
            notes[name] = text
        elif line:
            numbered.append((number, line))
    try:
        columns, *table = csv.reader([line for _, line in numbered] or [""])
    except csv.Error as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if sorted(columns) != sorted(_TYPES):
        raise InputError(f"{path} is not a benchmark result, or is one of another version")
    rows = [
        _row(path, number, columns, cells)
        for (number, _), cells in zip(numbered[1:], table, strict=False)
    ]
    return Results(notes, rows)


def _row(path: Path, number: int, columns: list[str], cells: list[str]) -> Row:
    try:
        if len(cells) != len(columns):
            raise ValueError(f"{len(cells)} values instead of {len(columns)}")
        row = Row(**{name: _parse(name, text) for name, text in zip(columns, cells, strict=True)})
        _check(row)
    except ValueError as error:
        raise InputError(f"{path} is damaged in line {number}: {error}") from error
    return row


def _check(row: Row) -> None:
    """Raise ``ValueError`` if the values of this row contradict each other."""
    if row.status not in (OK, FAILED, LEFT_OUT):
        raise ValueError(f"status is {row.status!r}")
    if (row.status == OK) != (row.time_us is not None):
        raise ValueError(f"status is {row.status!r} and time_us {row.time_us}")
    for name in ("time_us", "vs_upstream", "vs_fair"):
        low, middle, high = (getattr(row, name + end) for end in ("_p20", "", "_p80"))
        if (low, middle, high) == (None, None, None):
            continue
        if None in (low, middle, high) or not 0 < low <= middle <= high:
            raise ValueError(f"{name} is {middle} between {low} and {high}")


def _parse(name: str, text: str) -> Any:
    kind = _TYPES[name]
    if kind is str:
        return text
    if text == "" and kind is not int:
        return None
    number = int(text) if kind in (int, int | None) else float(text)
    # A result that is not finite has an infinite error.
    if number < 0 or not (math.isfinite(number) or (name.endswith("_error") and number > 0)):
        raise ValueError(f"{name} is {text}")
    return number


@dataclass(frozen=True)
class Change:
    """A row in two runs.

    Attributes:
        old: The row of the old run.
        new: The same row of the new run.
        time: Change of the median time; 0.2 is 20 % slower.
        change: Change of the time divided by the fair baseline's. The two are measured in turn, so
            that a busier machine in one run does not count. If a run has no such ratio, this is the
            change of the time; for the fair baseline itself it is ``None``.
        beyond: The part of ``change`` by which the runs' spreads are apart; 0 if they overlap.
    """

    old: Row
    new: Row
    time: float
    change: float | None
    beyond: float


def compare(old: Results, new: Results) -> list[Change]:
    """Return all rows that both runs timed, largest slow-down first."""
    before = {row.key: row for row in old.rows if row.time_us is not None}
    changes = []
    for row in new.rows:
        other = before.get(row.key)
        if other is None or row.time_us is None:
            continue
        has_ratios = row.vs_fair is not None and other.vs_fair is not None
        (was, was_low, was_high), (now, low, high) = (_cost(r, has_ratios) for r in (other, row))
        time = _cost(row, False)[0] / _cost(other, False)[0] - 1
        if row.implementation == YARDSTICK:
            changes.append(Change(other, row, time, None, 0.0))
            continue
        change = now / was - 1
        beyond = max(low / was_high - 1, 0.0) + min(high / was_low - 1, 0.0)
        if abs(change) < LEAST_CHANGE:
            beyond = 0.0
        changes.append(Change(other, row, time, change, beyond))
    return sorted(changes, key=lambda change: -(change.change or 0.0))


def _cost(row: Row, as_ratio: bool) -> tuple[float, float, float]:
    """Return median, low and high of the time, or of the time divided by the fair baseline's."""
    values = (
        (row.vs_fair, row.vs_fair_p80, row.vs_fair_p20)
        if as_ratio
        else (row.time_us, row.time_us_p20, row.time_us_p80)
    )
    median, low, high = (float("nan") if v is None else 1 / v if as_ratio else v for v in values)
    return median, low, high


def machine_notes(device: torch.device) -> dict[str, str]:
    """Return the device, driver, versions and commit."""
    notes = {"device": _device_name(device)}
    if device.type == "cuda":
        notes["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
        notes["CUDA"] = str(torch.version.cuda)
    versions = {name: _version(name) for name in ("torch", "triton", "transformers", "visproj")}
    notes["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    notes["python"] = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    notes["fp32 matmul"] = torch.get_float32_matmul_precision()
    notes["commit"] = _output("git", "describe", "--always", "--dirty")
    return notes


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0]
