"""What the compiler makes of every shipped configuration, read without a GPU.

``python -m benchmarks.codegen`` compiles each kernel through its own launcher, at the shapes of a
Perceiver between CLIP-L and a 4096-wide language model, for architectures that need not be there,
and prints registers, spills, shared memory, blocks an SM and matrix instructions. It fails where a
bar does not hold; the bars are :func:`complaints`.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from visproj.kernels import configs
from visproj.kernels.launch import Config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
AMD_SHARED = 65536
# What a folded projector launches, with the configurations of the kernel named beside it.
FOLDED = {
    "linear_squares": "linear",
    "linear_folded": "linear",
    "linear_table_folded": "linear_table",
}
PRODUCTS_AND_ATTENTION = (*configs.KERNELS, *FOLDED)
ROW_KERNELS = ("layer_norm_fwd", "layer_norm_bwd", "fold_gain", "merge_statistics", "delta")


@dataclass(frozen=True)
class Limits:
    """Shared memory of an SM and of one block on request, in bytes, and warps an SM."""

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
        kernel: Its name in the table of configurations, or of a row kernel.
        arch: Compute capability, 80 for 8.0.
        dtype: Of the operands.
        precision: ``tf32`` or ``ieee`` for fp32 products.
        config: As the table has it; empty for a row kernel.
        first: Whether it is the first choice of its style.
        width: Head width, 0 where there is none.
        registers: A thread.
        stack: Bytes a thread; spills are part of it.
        shared: Bytes a block.
        tensor_memory: Columns of sm_100's tensor memory.
        blocks: Blocks an SM, as far as registers, shared memory and warps allow.
        instructions: How often each instruction of interest occurs.
        seconds: What compiling took.
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
        """How often it occurs."""
        return self.instructions.get(instruction, 0)


class _Driver:
    """As much of a driver as compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target
        self.utils = self

    def is_active(self) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"{self._target.backend}{self._target.arch}"

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_device_properties(self, device: object = None) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": 132, "warpSize": 32}


@contextmanager
def compiling_for(target: GPUTarget) -> Iterator[list[tuple[str, Any, float]]]:
    """Inside, launching a kernel compiles it for ``target`` and appends what came of it."""
    compiled: list[tuple[str, Any, float]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.__name__, kernel, time.perf_counter() - start))
        return kernel

    with (
        mock.patch.object(driver, "_active", _Driver(target)),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        yield compiled


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def call(kernel: str, dtype: torch.dtype, width: int = 128) -> None:
    """Launch one kernel at the reference shape: 8 images, C 1024, D 4096, 256 keys and queries."""
    from visproj.kernels import cross_attention, cross_attention_backward, layer_norm, linear
    from visproj.kernels.linear_backward import linear_bwd_weight

    B, L, Q, C, D = 8, 256, 256, 1024, 4096
    x, y = _empty(B, L + 1, C, dtype=dtype)[:, 1:], _empty(B, L, D, dtype=dtype)
    gain, weight = _empty(D, dtype=dtype), _empty(2 * D, D, dtype=dtype)
    mean, sums = _empty(B, L, dtype=torch.float32), _empty(2 * D, dtype=torch.float32)
    rows, flat = y.flatten(0, 1), mean.flatten()
    H = D // (width or 128)
    q, kv = _empty(Q, H, width, dtype=dtype), _empty(B, L, 2, H, width, dtype=dtype)
    k, v = kv.unbind(2)
    dk, dv = torch.empty_like(kv).unbind(2)
    mask = _empty(B, 1, Q, L, dtype=dtype) if "masked" in kernel else None
    out, stats = _empty(B, Q, H, width, dtype=dtype), _empty(B, H, Q, dtype=torch.float32)
    table, squares = _empty(L, 2 * D, dtype=dtype), _empty(32, B * L, dtype=torch.float32)
    folded = {"bias": table[0], "squares": squares, "eps": 1e-12}
    backward = (q, k, v, mask, out, stats, None if mask is None else stats, stats)
    launches: dict[str, Callable[[], object]] = {
        "linear": lambda: linear.linear_fwd(x, weight[:D, :C].contiguous(), statistics=True),
        "linear_table": lambda: linear.linear_fwd(
            y, weight, mean=mean, rstd=mean, weight_sum=sums, shift=sums, table=y[0]
        ),
        "linear_bwd_weight": lambda: linear_bwd_weight(
            y, y, bias=True, mean=mean, rstd=mean, gain=gain, shift=gain
        ),
        "cross_attention_fwd": lambda: cross_attention.cross_attention_fwd(
            q, k, v, mask, statistics=True
        ),
        "linear_squares": lambda: linear.linear_fwd(
            x, weight[:C, :C].contiguous(), bias=gain[:C], store=False, triangular=True
        ),
        "linear_folded": lambda: linear.linear_fwd(y, weight, **folded),
        "linear_table_folded": lambda: linear.linear_fwd(y, weight, **folded, table=table),
        "cross_attention_bwd_dkv": lambda: cross_attention_backward._dkv(dk, dv, *backward),
        "cross_attention_bwd_dq": lambda: cross_attention_backward._dq(*backward),
        "layer_norm_fwd": lambda: layer_norm.layer_norm_fwd(
            rows, gain, gain, 1e-12, out_dtype=dtype, in_place=False, statistics=True
        ),
        "layer_norm_bwd": lambda: layer_norm.layer_norm_bwd(rows, rows, flat, flat, gain),
        "fold_gain": lambda: layer_norm.fold_gain(weight, gain, gain, weight[:, 0]),
        "merge_statistics": lambda: linear.merge_statistics(
            _empty(2, 32, B * L, dtype=torch.float32), mean, mean, D, 128, 1e-12
        ),
        "delta": lambda: cross_attention_backward._delta(out, out),
    }
    launches[kernel.removesuffix("_wide").removesuffix("_masked")]()


def read(kernel: Any, arch: int) -> dict[str, Any]:
    """Resources and instructions of a compiled kernel, from the tools that triton ships."""
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
    allocated = -(-resources["REG"] * 32 // 256) * 256 * warps  # registers, by 256 a warp
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
    """Compile one kernel with one configuration and read what came of it.

    Raises:
        RuntimeError: If it does not compile; the message has the configuration.
    """
    width = 144 if kernel.endswith("_wide") else 128
    _set_precision(precision)
    only = mock.patch.object(configs, "candidates", return_value=(config,))
    with compiling_for(GPUTarget("cuda", arch, 32)) as compiled, only:
        call(kernel, DTYPES[dtype], width)
    _, result, seconds = compiled[-1]
    return Row(
        kernel,
        arch,
        dtype,
        precision,
        "" if config is None else str(config),
        first,
        width if "attention" in kernel or kernel == "delta" else 0,
        seconds=round(seconds, 2),
        **read(result, arch),
    )


def _set_precision(precision: str) -> None:
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def jobs(
    archs: list[int], dtypes: list[str], first_only: bool
) -> Iterator[tuple[str, int, str, Config | None, bool, str]]:
    """Arguments of :func:`compile_row`: every shipped configuration, and the row kernels."""
    for dtype in dtypes:
        precisions = ("ieee", "tf32") if dtype == "fp32" else ("ieee",)
        for arch in archs:
            for kernel, precision in itertools.product(PRODUCTS_AND_ATTENTION, precisions):
                _set_precision(precision)
                seen = set()
                for config in configs.shipped(FOLDED.get(kernel, kernel), DTYPES[dtype], arch):
                    first = config.descriptors not in seen
                    seen.add(config.descriptors)
                    if first or not first_only:
                        yield kernel, arch, dtype, config, first, precision
            for kernel in ROW_KERNELS:
                yield kernel, arch, dtype, None, True, "ieee"


def compile_amd(kernel: str, dtype: str) -> tuple[int, int]:
    """Compile a kernel's default configuration for AMD's gfx942.

    Returns:
        Bytes of shared memory, of which there are :data:`AMD_SHARED`, and matrix instructions.
    """
    _set_precision("tf32")
    width = 144 if kernel.endswith("_wide") else 128
    default: tuple[Config | None, ...] = (None,)
    if kernel in PRODUCTS_AND_ATTENTION:
        kernel_of_table = FOLDED.get(kernel, kernel)
        default = configs.shipped(kernel_of_table, DTYPES[dtype], configs.nearest("gfx942"))[:1]
    only = mock.patch.object(configs, "candidates", return_value=default)
    with compiling_for(GPUTarget("hip", "gfx942", 64)) as compiled, only:
        call(kernel, DTYPES[dtype], width)
    result = compiled[-1][1]
    return result.metadata.shared, result.asm["amdgcn"].count("v_mfma")


def complaints(row: Row) -> list[str]:
    """The bars that a compiled kernel misses, each as a sentence with its figures."""
    found = []

    def want(holds: bool, bar: str) -> None:
        if not holds:
            found.append(bar)

    limits = LIMITS[row.arch]
    want(row.stack == 0, f"{row.stack} bytes of stack")
    want(row.count("LDL") + row.count("STL") == 0, "spills")
    want(row.shared <= limits.block, f"{row.shared} bytes of shared memory of {limits.block}")
    want(row.blocks >= 1, "no block fits an SM")
    want(row.tensor_memory <= 512, f"{row.tensor_memory} columns of tensor memory")
    if not row.config:
        want(row.kernel == "merge_statistics" or row.count("LDG.128") > 0, "no 128-bit loads")
        return found
    matrix = sum(n for name, n in row.instructions.items() if "MMA" in name)
    if row.dtype == "fp32" and row.precision == "ieee":
        want(matrix == 0, "tensor cores in an ieee product")
        return found
    want(matrix > 0, "no matrix instruction")
    # Above a head of 128, pointers may take tiles of 32 rows so as not to spill: mma.sync only.
    narrow = row.width > 128 and row.config.endswith("pointers")
    if row.arch in (90, 100) and row.dtype != "fp32" and not narrow:
        want(row.count("HMMA") == 0, f"{row.count('HMMA')} HMMA instead of wgmma or tcgen05")
    found += _product_complaints(row) if row.dtype != "fp32" and not narrow else []
    return found


# Operands that move through descriptors, and the products of one pass through the loop: the
# dimensions, among rows q, keys l and head width d, of (output rows, output columns, depth).
_OPERANDS = {
    "linear": 2,
    "linear_squares": 2,
    "linear_folded": 2,
    "linear_table": 3,
    "linear_table_folded": 3,
    "linear_bwd_weight": 2,
}
_ATTENTION = {
    "cross_attention_fwd": (3, ("qld", "qdl")),
    "cross_attention_bwd_dkv": (4, ("lqd", "ldq", "lqd", "ldq")),
    "cross_attention_bwd_dq": (4, ("qld", "qld", "qdl")),
}


def _products(row: Row) -> tuple[int, list[tuple[int, int, int]]]:
    """Descriptor operands, and rows, columns and depth of the products of one pass."""
    blocks = tuple(map(int, row.config.split("/")[0].split("x")))
    name = row.kernel.removesuffix("_wide").removesuffix("_masked")
    if name in _OPERANDS:
        return _OPERANDS[name], [(blocks[0], blocks[1], blocks[2])]
    operands, products = _ATTENTION[name]
    padded = 128 if row.width <= 128 else 256
    sizes = {"q": blocks[0], "l": blocks[1], "d": padded}
    return operands, [(sizes[names[0]], sizes[names[1]], sizes[names[2]]) for names in products]


def _product_complaints(row: Row) -> list[str]:
    """Bars on the instructions of 16-bit products."""
    operands, products = _products(row)
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
        two = ("linear_table", "linear_table_folded", "linear_bwd_weight")
        if row.kernel in two and row.first and descriptors:
            found += [f"{row.blocks} block an SM instead of 2"] * (row.blocks < 2)
    elif row.arch == 100:
        least = products[0][2] // 16 if "linear" in row.kernel else 12
        if row.count("UTCHMMA") < least:
            found.append(f"{row.count('UTCHMMA')} UTCHMMA, fewer than {least}")
    else:
        least = sum(m * n * k for m, n, k in products) // (2048 * warps)
        if row.count("HMMA") < least:
            found.append(f"{row.count('HMMA')} HMMA, fewer than {least}")
    return found


def main(
    arch: Annotated[list[int] | None, typer.Option(help="80, 86, 89, 90, 100 or 120.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bf16, fp16 or fp32.")] = None,
    first: Annotated[bool, typer.Option(help="Only the first choices.")] = False,
    part: Annotated[str, typer.Option(help="I/N: every N-th kernel from I on.")] = "0/1",
    out: Annotated[Path | None, typer.Option(help="JSON lines, one a kernel.")] = None,
    amd: Annotated[bool, typer.Option(help="Compile for gfx942 instead.")] = False,
) -> None:
    """Compile, print a table, and exit with 1 if a bar does not hold."""
    if amd:
        for kernel in (*PRODUCTS_AND_ATTENTION, *ROW_KERNELS):
            for name in dtype or DTYPES:
                shared, mfma = compile_amd(kernel, name)
                print(f"gfx942 {kernel} {name}: {shared} bytes shared, {mfma} v_mfma")
                if shared > AMD_SHARED:
                    raise typer.Exit(1)
        return
    index, parts = map(int, part.split("/"))
    selected = list(jobs(arch or list(LIMITS), dtype or list(DTYPES), first))[index::parts]
    table = Table("kernel", "sm", "dtype", "configuration", "registers", "stack", "shared KiB")
    for column in ("blocks an SM", "matrix instructions", "s", "complaints"):
        table.add_column(column)
    failed, lines = 0, []
    for job in selected:
        row = compile_row(*job)
        wrong = complaints(row)
        failed += bool(wrong)
        lines.append(json.dumps({**asdict(row), "complaints": wrong}))
        matrix = {name: n for name, n in row.instructions.items() if "MMA" in name}
        dtype_name = f"fp32 {row.precision}" if row.dtype == "fp32" else row.dtype
        cells = (row.kernel, row.arch, dtype_name, row.config, row.registers, row.stack)
        more = (f"{row.shared / 1024:.0f}", row.blocks, matrix or "", row.seconds, "; ".join(wrong))
        table.add_row(*map(str, (*cells, *more)))
    if out is not None:
        out.write_text("\n".join(lines), encoding="utf-8")
    Console(width=200).print(table)
    print(f"triton {triton.__version__}: {len(selected)} compiled, {failed} with complaints")
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
