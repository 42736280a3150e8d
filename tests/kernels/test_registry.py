"""A kernel that registers itself is counted, compiled, tried at its edges and sanitized."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

registry = pytest.importorskip("visproj.kernels.registry", reason="kernels need triton")

ROOT = Path(__file__).parents[2]

# Beside the other kernels as far as imports go: their package has no __init__.py.
TOY = """
import torch
import triton
import triton.language as tl
from visproj.kernels.launch import Config, Launch
from visproj.kernels.registry import Example, register


@triton.jit
def _toy_fwd_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cells, mask=cells < count, other=0.0)
    tl.store(out_ptr + cells, 2 * x, mask=cells < count)


@torch.library.custom_op("visproj::toy", mutates_args=())
def toy(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    config = Config((1024,), warps=4, stages=1)
    programs, count = triton.cdiv(x.numel(), 1024), x.numel()
    launch = Launch(_toy_fwd_kernel, programs, config, x.device, count=count, BLOCK=1024)
    launch(x_ptr=x, out_ptr=out)
    return out


register(
    _toy_fwd_kernel,
    {"toy": Example(lambda s: toy._init_fn(s.tensor(s.images, s.length, s.outputs)))},
    flops=lambda arguments: 3 * arguments["count"],
)
"""

CONSUMERS = """
import json
import sys

import torch
import visproj

visproj.__path__.append(sys.argv[1])

import kernels_edges
from benchmarks import codegen, model
from sanitizer.test_examples import cases


class Toy(torch.nn.Module):
    def forward(self, x):
        return torch.ops.visproj.toy(x)


jobs = [job for job in codegen.jobs([90], ["bf16"], True) if job[0] == "toy"]
edges = [launch for launch in kernels_edges.launches() if launch[0] == "toy"]
found = {
    "FLOPs": model.costs(Toy(), [torch.empty(5, 7)], trains=False)["forward"].flops,
    "compiled": [codegen.complaints(codegen.compile_row(*job)) for job in jobs],
    "edges": [kernels_edges.complaint(*launch) for launch in edges],
    "sanitized": "toy" in cases(),
}
print(json.dumps(found))
"""


def test_a_new_kernel_is_found_by_all(tmp_path):
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "toy.py").write_text(TOY)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CONSUMERS, str(tmp_path)],
        env=environment | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))},
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    edges = found.pop("edges")
    assert found == {"FLOPs": 3 * 5 * 7, "compiled": [[]], "sanitized": True}
    assert edges
    assert not any(edges)


def test_every_kernel_is_registered():
    registry.load()
    kernels = {
        function.name
        for path in (ROOT / "kernels").glob("*.py")
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef) and function.name.endswith("_kernel")
    }
    assert kernels == set(registry.FLOPS)
