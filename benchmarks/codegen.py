"""The compiled code of every shipped configuration, checked without a GPU.

``python -m benchmarks.codegen`` compiles each kernel through its own launcher, at the shapes of a
Perceiver between CLIP-L and a 4096-wide language model. The architectures need not be present. It
prints registers, spills, shared memory, blocks per SM and matrix instructions, and fails if a
requirement is not met. The requirements are those of :func:`complaints`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    if find_spec("triton") is None:
        sys.exit("error: triton is not installed: pip install triton")

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.command import Parser, check_folder, run_command
from benchmarks.driver import AbsentDriver
from visproj.errors import InputError
from visproj.kernels import configs, plans, registry
from visproj.kernels.device import architecture
from visproj.kernels.launch import Config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
AMD_SHARED = 65536
REFERENCE = {name: example for name, example in registry.load().items() if example.compiled}
# A head wider than 128 has rows of its own in the table of configurations.
_WIDE = {
    f"{name}_wide": replace(example, table=f"{example.table}_wide")
    for name, example in REFERENCE.items()
    if f"{example.table}_wide" in configs.KERNELS
}
_OTHERS = {
    f"{name}_{'_'.join(map(str, sizes.values()))}": example.at(sizes)
    for name, example in REFERENCE.items()
    for sizes in example.others
}
EXAMPLES = REFERENCE | _WIDE | _OTHERS


@dataclass(frozen=True)
class Limits:
    """Shared memory per SM and, at most, per block, in bytes, and warps per SM."""

    shared: int
    block: int
    warps: int


_LARGE, _SMALL = (233472, 232448), (102400, 101376)
LIMITS = {
    80: Limits(167936, 166912, 64),
    86: Limits(*_SMALL, 48),
    89: Limits(*_SMALL, 48),
    90: Limits(*_LARGE, 64),
    100: Limits(*_LARGE, 64),
    120: Limits(*_SMALL, 48),
}


@dataclass(frozen=True)
class Row:
    """One compiled kernel.

    Attributes:
        kernel: Name of the example in the registry.
        arch: Compute capability, 80 for 8.0.
        dtype: Dtype of the operands.
        precision: ``tf32`` or ``ieee`` for fp32 matmuls.
        config: Configuration as in the table; empty for a kernel without configurations.
        first: Whether it is the first configuration with pointers, or with descriptors.
        width: Head width, 0 if there is none.
        registers: Registers per thread.
        stack: Bytes of stack per thread, spills included.
        shared: Bytes of shared memory per block.
        tensor_memory: Columns of sm_100's tensor memory.
        blocks: Blocks per SM that registers, shared memory and warps allow.
        instructions: How often each instruction of interest occurs.
        seconds: Time of the compilation, s.
    """

    kernel: str
    arch: int
    dtype: str
    precision: str
    config: str
    first: bool
    width: int
    registers: int
    stack: int
    shared: int
    tensor_memory: int
    blocks: int
    seconds: float
    instructions: dict[str, int] = field(default_factory=dict)

    def count(self, instruction: str) -> int:
        """Return how often an instruction occurs."""
        return self.instructions.get(instruction, 0)


@contextmanager
def compiling_for(target: GPUTarget) -> Iterator[list[tuple[str, Any, float]]]:
    """Inside the block, a launch only compiles its kernel for ``target`` and appends the result."""
    compiled: list[tuple[str, Any, float]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.__name__, kernel, time.perf_counter() - start))
        return kernel

    with (
        mock.patch.object(driver, "_active", AbsentDriver(target)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(plans, "REMEMBERS", False),
        mock.patch.dict(os.environ, VISPROJ_AUTOTUNE="0"),
    ):
        architecture.cache_clear()
        try:
            yield compiled
        finally:
            architecture.cache_clear()


def head_width(kernel: str) -> int:
    """Return the width of a head in the example of a kernel."""
    return 144 if kernel.endswith("_wide") else 128


def call(kernel: str, dtype: str) -> None:
    """Launch one kernel at the reference shape: 8 images, C 1024, D 4096, 256 keys and queries."""
    width = head_width(kernel)
    heads = 4096 // width
    EXAMPLES[kernel].call(registry.Sizes(width=width, heads=heads, dtype=DTYPES[dtype]))


def read(kernel: Any, arch: int) -> dict[str, Any]:
    """Return resources and instructions of a compiled kernel, from the tools that triton ships."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [tools / tool, option, file.name], check=True, capture_output=True, text=True
            ).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    resources = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    opcodes = re.findall(
        r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]+)(\S*)", sass, re.M
    )
    counts = Counter(name for name, _ in opcodes)
    counts["LDG.128"] = sum(name == "LDG" and ".128" in rest for name, rest in opcodes)
    kept = {name: n for name, n in counts.items() if n and (name in _SHOWN or "MMA" in name)}
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    # Registers are allocated in units of 256 per warp.
    allocated = -(-resources["REG"] * 32 // 256) * 256 * warps
    limits = LIMITS[arch]
    return {
        "registers": resources["REG"],
        "stack": resources["STACK"],
        "shared": shared,
        "tensor_memory": getattr(kernel.metadata, "tmem_size", None) or 0,
        "blocks": min(65536 // allocated, limits.warps // warps, limits.shared // (shared + 1024)),
        "instructions": kept,
    }


_SHOWN = {"LDL", "STL", "LDGSTS", "UTMALDG", "UTMASTG", "FFMA", "LDG", "LDG.128"}


def compile_row(
    kernel: str, arch: int, dtype: str, config: Config | None, first: bool, precision: str
) -> Row:
    """Compile one kernel with one configuration, and read its resources and instructions.

    Raises:
        RuntimeError: If it does not compile; the message states the configuration.
    """
    _set_precision(precision)
    only = mock.patch.object(configs, "candidates", return_value=(config,))
    with compiling_for(GPUTarget("cuda", arch, 32)) as compiled, only:
        call(kernel, dtype)
    _, result, seconds = compiled[-1]
    return Row(
        kernel,
        arch,
        dtype,
        precision,
        "" if config is None else str(config),
        first,
        head_width(kernel) if "d" in "".join(EXAMPLES[kernel].products) else 0,
        seconds=round(seconds, 2),
        **read(result, arch),
    )


def _set_precision(precision: str) -> None:
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def jobs(
    archs: list[int], dtypes: list[str], first_only: bool
) -> Iterator[tuple[str, int, str, Config | None, bool, str]]:
    """Yield arguments of :func:`compile_row`: shipped configurations, and kernels without one."""
    for dtype in dtypes:
        precisions = ("ieee", "tf32") if dtype == "fp32" else ("ieee",)
        for arch in archs:
            for (kernel, example), precision in itertools.product(EXAMPLES.items(), precisions):
                if not example.table:
                    continue
                seen = set()
                for config in configs.shipped(example.table, DTYPES[dtype], arch, precision):
                    first = config.descriptors not in seen
                    seen.add(config.descriptors)
                    if first or not first_only:
                        yield kernel, arch, dtype, config, first, precision
            for kernel, example in EXAMPLES.items():
                if not example.table:
                    yield kernel, arch, dtype, None, True, "ieee"


def compile_amd(kernel: str, dtype: str) -> tuple[int, int]:
    """Compile a kernel's default configuration for AMD's gfx942.

    Returns:
        Bytes of shared memory (there are :data:`AMD_SHARED`), and the number of matrix
        instructions.
    """
    _set_precision("tf32")
    default: tuple[Config | None, ...] = (None,)
    if table := EXAMPLES[kernel].table:
        arch = configs.nearest("gfx942")
        default = configs.shipped(table, DTYPES[dtype], arch, "tf32")[:1]
    only = mock.patch.object(configs, "candidates", return_value=default)
    with compiling_for(GPUTarget("hip", "gfx942", 64)) as compiled, only:
        call(kernel, dtype)
    result = compiled[-1][1]
    return result.metadata.shared, result.asm["amdgcn"].count("v_mfma")


def complaints(row: Row) -> list[str]:
    """Return the requirements that a compiled kernel does not meet, with their figures."""
    found = []

    def want(holds: bool, bar: str) -> None:
        if not holds:
            found.append(bar)

    limits = LIMITS[row.arch]
    want(row.stack == 0, f"{row.stack} bytes of stack")
    want(row.count("LDL") + row.count("STL") == 0, "spills")
    want(row.shared <= limits.block, f"{row.shared} bytes of shared memory above {limits.block}")
    want(row.blocks >= 1, "no block fits an SM")
    want(row.tensor_memory <= 512, f"{row.tensor_memory} columns of tensor memory above 512")
    if not row.config:
        narrow_loads = not EXAMPLES[row.kernel].wide_loads
        want(narrow_loads or row.count("LDG.128") > 0, "no 128-bit loads")
        return found
    matrix = sum(n for name, n in row.instructions.items() if "MMA" in name)
    if row.dtype == "fp32" and row.precision == "ieee":
        want(matrix == 0, "tensor cores in an ieee product")
        return found
    want(matrix > 0, "no matrix instruction")
    # For heads wider than 128, configurations with pointers may have tiles of 32 rows to avoid
    # spills. These have mma.sync only.
    narrow = row.width > 128 and row.config.endswith("pointers")
    if row.arch in (90, 100) and row.dtype != "fp32" and not narrow:
        want(row.count("HMMA") == 0, f"{row.count('HMMA')} HMMA instead of wgmma or tcgen05")
    found += _product_complaints(row) if row.dtype != "fp32" and not narrow else []
    return found


def _products(row: Row) -> list[tuple[int, int, int]]:
    """Return rows, columns and depth of each matmul in one iteration of the loop."""
    example = EXAMPLES[row.kernel]
    blocks = map(int, row.config.split("/")[0].split("x"))
    sizes = dict(zip(example.tile, blocks, strict=True)) | {"d": 128 if row.width <= 128 else 256}
    return [(sizes[m], sizes[n], sizes[k]) for m, n, k in example.products]


def _product_complaints(row: Row) -> list[str]:
    """Return the requirements on the instructions of 16-bit matmuls that are not met."""
    products, operands = _products(row), EXAMPLES[row.kernel].descriptors
    warps = int(row.config.split("/")[1].split("w")[0])
    descriptors = row.config.endswith("descriptors")
    found = []
    if descriptors and row.count("UTMALDG") < operands:
        found.append(f"{row.count('UTMALDG')} UTMALDG for {operands} descriptors")
    pipelined = int(re.findall(r"w(\d+)s", row.config)[0]) > 1
    if not descriptors and pipelined and row.count("LDGSTS") == 0:
        found.append("no LDGSTS")
    if row.arch == 90:
        groups = warps // 4
        if row.width <= 128 and all(rows % (64 * groups) == 0 for rows, _, _ in products):
            exact = sum(depth // 16 * (rows // (64 * groups)) for rows, _, depth in products)
            if row.count("HGMMA") != exact:
                found.append(f"{row.count('HGMMA')} HGMMA instead of {exact}")
        elif row.count("HGMMA") == 0:
            found.append("no HGMMA")
        blocks = EXAMPLES[row.kernel].blocks
        if row.blocks < blocks and row.first and descriptors:
            found.append(f"{row.blocks} block per SM instead of {blocks}")
    elif row.arch == 100:
        least = products[0][2] // 16 if len(products) == 1 else 12
        if row.count("UTCHMMA") < least:
            found.append(f"{row.count('UTCHMMA')} UTCHMMA, fewer than {least}")
    else:
        least = sum(m * n * k for m, n, k in products) // (2048 * warps)
        if row.count("HMMA") < least:
            found.append(f"{row.count('HMMA')} HMMA, fewer than {least}")
    return found


def _part(text: str) -> tuple[int, int]:
    """Parse ``I/N`` with I below N."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    index, parts = map(int, found.groups()) if found else (0, 0)
    if index >= parts:
        raise argparse.ArgumentTypeError(f"must be I/N with I below N, got {text!r}")
    return index, parts


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print a table, and return 1 if a requirement is not met.

    Raises:
        InputError: If options exclude each other.
        OSError: If the file cannot be written; this is checked before anything is compiled.
    """
    parser = Parser("python -m benchmarks.codegen", __doc__)
    several: dict[str, Any] = {"action": "append"}
    parser.add_argument(
        "--arch", type=int, choices=LIMITS, help="architecture; repeat for more", **several
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype; repeat for more", **several)
    parser.add_argument(
        "--first",
        action="store_true",
        help="only the first configuration with pointers and the first with descriptors",
    )
    parser.add_argument(
        "--part", type=_part, default=(0, 1), help="I/N: compile every N-th kernel from the I-th on"
    )
    parser.add_argument("--out", type=Path, help="file for JSON lines, one per kernel")
    parser.add_argument("--amd", action="store_true", help="compile for gfx942 instead")
    options = parser.parse_args(arguments)
    dtypes = options.dtype or list(DTYPES)
    if options.amd:
        if options.arch or options.out or options.first or options.part != (0, 1):
            raise InputError("--amd takes no other option than --dtype")
        return _amd(dtypes)
    if options.out is not None:
        check_folder(options.out.parent)
        options.out.touch()
    index, parts = options.part
    selected = list(jobs(options.arch or list(LIMITS), dtypes, options.first))[index::parts]
    rows = [(row, complaints(row)) for row in (compile_row(*job) for job in selected)]
    if options.out is not None:
        lines = (json.dumps({**asdict(row), "complaints": wrong}) for row, wrong in rows)
        options.out.write_text("\n".join(lines), encoding="utf-8")
    Console(width=200).print(_table(rows))
    failed = sum(bool(wrong) for _, wrong in rows)
    print(f"triton {triton.__version__}: {len(selected)} compiled, {failed} with complaints")
    return 1 if failed else 0


def _amd(dtypes: list[str]) -> int:
    for kernel in EXAMPLES:
        for name in dtypes:
            shared, mfma = compile_amd(kernel, name)
            print(f"gfx942 {kernel} {name}: {shared} bytes shared, {mfma} v_mfma")
            if shared > AMD_SHARED:
                return 1
    return 0


def _table(rows: Sequence[tuple[Row, list[str]]]) -> Table:
    table = Table("kernel", "sm", "dtype", "configuration", "registers", "stack", "shared KiB")
    for column in ("blocks per SM", "matrix instructions", "s", "complaints"):
        table.add_column(column)
    for row, wrong in rows:
        matrix = {name: n for name, n in row.instructions.items() if "MMA" in name}
        dtype_name = f"fp32 {row.precision}" if row.dtype == "fp32" else row.dtype
        cells = (row.kernel, row.arch, dtype_name, row.config, row.registers, row.stack)
        more = (f"{row.shared / 1024:.0f}", row.blocks, matrix or "", row.seconds, "; ".join(wrong))
        table.add_row(*map(str, (*cells, *more)))
    return table


if __name__ == "__main__":
    run_command(main)
