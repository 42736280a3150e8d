"""Products of two 32-bit sizes: a tensor may hold 2**31 elements, so that they wrap around."""

import ast
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton")

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "kernels").glob("*.py"))

# What fits into 32 bits for another reason.
SMALL = {
    "images * row_tiles": "tiles, fewer than programs or steps of a loop",
    "heads * width": "the width of one row",
}


def kernels(source):
    """The functions that triton compiles."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and any(
            "triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list
        ):
            yield node


class Products(ast.NodeVisitor):
    """Finds the products of two runtime integers of 32 bits in a kernel, in the order of lines.

    An argument is one unless it is a constant, a pointer or a float; so is what follows from one
    without a cast to 64 bits.
    """

    def __init__(self, kernel):
        self.found = []
        names = [a.arg for a in kernel.args.args if a.annotation is None]  # no tl.constexpr
        self.narrow = {n for n in names if n not in ("scale", "eps") and not n.endswith("_ptr")}
        self.wide = set()
        for statement in kernel.body:
            self.visit(statement)

    def is_wide(self, node):
        parts = list(ast.walk(node))
        names = {part.id for part in parts if isinstance(part, ast.Name)}
        return bool(names & self.wide) or "tl.int64" in map(ast.unparse, parts)

    def is_narrow(self, node):
        if self.is_wide(node):
            return False
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("tl.cdiv", "tl.minimum", "min", "_grouped"):
                return any(map(self.is_narrow, node.args))
            return name in ("tl.program_id", "tl.arange")
        if isinstance(node, ast.BinOp):
            return self.is_narrow(node.left) or self.is_narrow(node.right)
        if isinstance(node, ast.Tuple):
            return any(map(self.is_narrow, node.elts))
        if isinstance(node, ast.Subscript):
            return self.is_narrow(node.value)
        return isinstance(node, ast.Name) and node.id in self.narrow

    def bind(self, target, value):
        wide, narrow = self.is_wide(value), self.is_narrow(value)
        names = {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}
        self.wide = self.wide | names if wide else self.wide - names
        self.narrow = self.narrow | names if narrow else self.narrow - names

    def visit_Assign(self, node):
        self.visit(node.value)
        self.bind(node.targets[0], node.value)

    def visit_For(self, node):
        self.visit(node.iter)
        self.bind(node.target, ast.Tuple(node.iter.args, ast.Load()))
        for statement in node.body:
            self.visit(statement)

    def visit_BinOp(self, node):
        if isinstance(node.op, ast.Mult) and self.is_narrow(node.left):
            self.found += [ast.unparse(node)] * self.is_narrow(node.right)
        self.generic_visit(node)


def wrapping(kernel):
    """The products that may wrap around, as written."""
    return Products(kernel).found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_product_wraps(path):
    found = [p for kernel in kernels(path.read_text()) for p in wrapping(kernel)]
    assert set(found) <= set(SMALL)


def test_every_exception_is_still_there():
    sources = [path.read_text() for path in SOURCES]
    found = {p for source in sources for kernel in kernels(source) for p in wrapping(kernel)}
    assert found == set(SMALL)


PLANTED = """
@triton.jit
def kernel(x_ptr, rows, N, stride_row, scale, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = program.to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    first = program * BLOCK
    tl.make_tensor_descriptor(x_ptr, [rows, N], [rows * N, 1], [BLOCK, BLOCK])
    tl.load(x_ptr + (first + lanes) * stride_row)
    tl.load(x_ptr + lanes[:, None] * stride_row)
    tl.load(x_ptr + program * N)
    for step in range(0, rows):
        tl.load(x_ptr + step * N)
    tl.load(x_ptr + row * stride_row + lanes.to(tl.int64)[:, None] * N)
    tl.load(x_ptr + tl.cast(rows, tl.int64) * N)
    tl.load(x_ptr + row * rows * N)
    wide = (row * rows + lanes) * N
    result = acc * scale * N
    tl.load(x_ptr + N * BLOCK)
"""


def test_planted_products_are_found():
    (kernel,) = kernels(PLANTED)
    assert wrapping(kernel) == [
        "rows * N",
        "(first + lanes) * stride_row",
        "lanes[:, None] * stride_row",
        "program * N",
        "step * N",
    ]


@pytest.mark.gpu
def test_a_gradient_beyond_2_to_the_31(device):
    from visproj.kernels.linear_backward import linear_bwd_weight

    rows, N = 2**16 + 64, 2**15
    grad = torch.zeros(rows, N, dtype=torch.bfloat16, device=device)
    grad[-64:] = 1
    y = torch.zeros(rows, 64, dtype=torch.bfloat16, device=device)
    # Rows that are normalised already, for PyTorch's way normalises them itself.
    y[-64:] = torch.tensor([-1, 1], device=device).repeat(32)
    mean, rstd = torch.zeros(rows, device=device), torch.ones(rows, device=device)
    dweight, dbias = grad.new_empty(N, 64), grad.new_empty(N)
    linear_bwd_weight(grad, y, mean, rstd, y.new_ones(64), None, 1e-12, dweight, dbias)
    assert torch.equal(dweight, (64 * y[-1]).expand(N, -1))
    assert torch.equal(dbias, torch.full_like(dbias, 64))
