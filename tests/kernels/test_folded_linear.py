"""The folded Linear through the kernels: its row scale, its layouts, its edges."""

import pytest
import torch
from kernels_support import DTYPES, LAYOUTS, STYLES, cases, check_errors, random

from visproj import ops

pytest.importorskip("triton", reason="kernels need triton")

pytestmark = pytest.mark.usefixtures("unwritten")

NAMES = ("x", "weight", "bias", "stats_weight", "stats_bias", "shift", "table")


def operands(B, L, C, N, dtype, device, rank=None, columns=16):
    rank = C if rank is None else rank
    shapes = ((B, L, C), (N, C), (N,), (rank, C), (rank,), (N,), (L, columns))
    tensors = [random(*shape, dtype=dtype, device=device) for shape in shapes]
    tensors[1] *= C**-0.5
    tensors[3] = tensors[3].triu()
    return tensors


def oracle(x, weight, bias, stats_weight, stats_bias, shift, table, eps):
    squares = (x @ stats_weight.T + stats_bias).square().sum(-1, keepdim=True)
    out = (x @ weight.T + bias) / (squares + eps).sqrt()
    out = out if shift is None else out + shift
    return out if table is None else out + torch.nn.functional.pad(table, (0, out.shape[-1] - 16))


def check(tensors, eps=1e-5):
    exact = [None if t is None else t.double() for t in tensors]
    before = [None if t is None else t.clone() for t in tensors]
    found = [
        [ops.folded_linear(*tensors, eps=eps, backend=backend)] for backend in ("triton", "torch")
    ]
    check_errors(*found, lambda: [oracle(*exact, eps)])
    assert all(t is None or torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    return found[0][0]


SHAPES = [
    *((rows, 40, 72, "bf16") for rows in (1, 31, 32, 33, 97)),
    *((33, C, 72, "bf16") for C in (1, 31, 33, 97, 760)),
    *((33, 40, N, "bf16") for N in (16, 31, 33, 1000)),
]
MORE_SHAPES = [(*shape[:3], dtype) for shape in SHAPES for dtype in ("fp32", "fp16")]


@pytest.mark.parametrize(("L", "C", "N", "dtype"), cases(SHAPES, MORE_SHAPES))
def test_shapes(L, C, N, dtype, tiles, device):
    tiles()
    check(operands(2, L, C, N, DTYPES[dtype], device))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("rank", [1, 16, 39])
def test_factors_of_lower_rank(rank, style, tiles, device):
    """As a projector with more features than outputs has them."""
    ran = tiles(style)
    check(operands(2, 37, 40, 72, torch.bfloat16, device, rank=rank))
    assert ran == {style}


@pytest.mark.parametrize("absent", [("shift",), ("table",), ("shift", "table")], ids="-".join)
@pytest.mark.parametrize("dtype", cases(["bf16", "fp32"], ["fp16"]))
def test_without_optional_tensors(absent, dtype, tiles, device):
    tiles()
    tensors = operands(2, 37, 40, 72, DTYPES[dtype], device)
    check([None if n in absent else t for n, t in zip(NAMES, tensors, strict=True)])


OF_IMAGES = ("without_cls", "reversed_batch")
LAID_OUT = [
    (name, layout)
    for name in ("x", "weight", "stats_weight", "table")
    for layout in LAYOUTS
    if name == "x" or layout not in OF_IMAGES
]


@pytest.mark.parametrize(("name", "layout"), LAID_OUT)
@pytest.mark.parametrize("dtype", cases(["bf16"], ["fp32"]))
def test_layouts(name, layout, dtype, tiles, device):
    tiles("descriptors")
    tensors = operands(3, 37, 40, 72, DTYPES[dtype], device)
    index = NAMES.index(name)
    tensors[index] = LAYOUTS[layout](tensors[index])
    if name == "stats_weight" and layout == "expanded":
        tensors[index] = tensors[index].clone().triu()
    check(tensors)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0,), (2, 0)], ids=str)
def test_leading_dimensions(lead, tiles, device):
    tiles()
    x, *others = operands(1, 37, 40, 72, torch.bfloat16, device)
    x = random(*lead, 37, 40, dtype=x.dtype, device=device)
    assert check([x, *others]).shape == (*lead, 37, 72)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_empty_rows_and_large_ones(dtype, tiles, device):
    """1 / sqrt(eps) = 1e6 is more than fp16 holds, and so is the square of 300."""
    tiles()
    x, *others = operands(2, 37, 40, 72, DTYPES[dtype], device)
    x[0, 3] = 0
    x[1, 5] *= 100
    others[1].zero_()
    others[3].zero_()
    out = check([x, *others], eps=1e-12)
    assert out.isfinite().all()


BAD = {
    "x": (lambda t: t[..., :-1], "x must be"),
    "bias": (lambda t: t[:-1], "bias must have shape"),
    "stats_weight": (lambda t: t[:, :-1], "stats_weight must be"),
    "stats_bias": (lambda t: t[:-1], "stats_bias must have shape"),
    "shift": (lambda t: t[:-1], "shift must have shape"),
    "table": (lambda t: t[:-1], "table must have shape"),
    "weight": (lambda t: t[0], "x must be"),
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, backend, device):
    change, message = BAD[name]
    tensors = operands(2, 37, 40, 72, torch.float32, device)
    index = NAMES.index(name)
    tensors[index] = change(tensors[index])
    with pytest.raises(ValueError, match=message):
        ops.folded_linear(*tensors, eps=1e-5, backend=backend)
    tensors = operands(2, 37, 40, 72, torch.float32, device)
    tensors[2] = tensors[2].half()
    with pytest.raises(TypeError, match="bias and x must have one dtype"):
        ops.folded_linear(*tensors, eps=1e-5, backend=backend)
