"""Weight and bias gradients of a Linear on normalised rows, launched as they are."""

import pytest
import torch
from kernels_support import DTYPES, LAYOUTS, STYLES, cases, check_errors, random

kernels = pytest.importorskip("visproj.kernels.linear_backward", reason="kernels need triton")

pytestmark = pytest.mark.usefixtures("unwritten")


def formula(grad, y, mean, rstd, gain, shift):
    """In the dtype of ``y``, the normalised rows too."""
    wide = torch.promote_types(y.dtype, torch.float32)
    normal = (y.to(wide) - mean.to(wide)[:, None]) * rstd.to(wide)[:, None] * gain.to(wide)
    normal = normal if shift is None else normal + shift.to(wide)
    return grad.T @ normal.to(y.dtype), grad.sum(0)


def launch(operands, bases=(0, 0)):
    """Both gradients, written so many elements into other tensors."""
    grad, y, *_ = operands.values()
    N, K = grad.shape[1], y.shape[1]
    dweight = y.new_empty(bases[0] + N * K)[bases[0] :].view(N, K)
    dbias = y.new_empty(bases[1] + N)[bases[1] :]
    kernels.linear_bwd_weight(*operands.values(), 1e-12, dweight, dbias)
    return dweight, dbias


def check(operands):
    got = launch(operands)
    exact = {name: t if t is None else t.double() for name, t in operands.items()}
    check_errors(got, formula(**operands), lambda: formula(**exact), ["dweight", "dbias"])
    return got


def made(rows, N, K, dtype, device):
    """Operands whose statistics are not those of the rows."""
    shapes = {"grad": (rows, N), "y": (rows, K), "mean": (rows,), "rstd": (rows,)}
    shapes |= {"gain": (K,), "shift": (K,)}
    return {
        name: random(*shape, device=device, dtype=torch.float32 if shape == (rows,) else dtype)
        for name, shape in shapes.items()
    }


# (rows, N, K): each at the edges of a block of 32.
POINTERS = [
    *((rows, 33, 40) for rows in (1, 31, 32, 33, 37, 97)),
    *((34, N, 40) for N in (1, 31, 32, 33, 37, 97)),
    *((34, 40, K) for K in (1, 31, 32, 33, 37, 97)),
]
DESCRIPTORS = [
    *((rows, 40, 48) for rows in (1, 31, 32, 33, 37)),
    *((33, N, 40) for N in (8, 24, 32, 96)),
    *((33, 40, K) for K in (8, 24, 32, 96)),
]


@pytest.mark.parametrize(
    ("rows", "N", "K", "style", "dtype"),
    cases(
        [(*shape, "pointers", "fp32") for shape in POINTERS]
        + [(*shape, "descriptors", "bf16") for shape in DESCRIPTORS],
        [(*shape, "pointers", dtype) for shape in POINTERS for dtype in ("bf16", "fp16")]
        + [(*shape, "descriptors", dtype) for shape in DESCRIPTORS for dtype in ("fp32", "fp16")],
    ),
)
def test_shapes(rows, N, K, style, dtype, tiles, device):
    ran = tiles(style)
    check(made(rows, N, K, DTYPES[dtype], device))
    assert ran == {style}


@pytest.mark.parametrize(
    ("rows", "N", "K", "dtype"),
    cases(
        [(257, 72, 760, "bf16"), (37, 1000, 72, "bf16"), (1, 3000, 24, "fp32")],
        [(257, 1024, 72, "bf16"), (199, 72, 1664, "bf16"), (17, 4096, 72, "fp32")],
    ),
)
def test_widths(rows, N, K, dtype, tiles, device):
    tiles(gemm=(128, 128, 64))
    check(made(rows, N, K, DTYPES[dtype], device))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", cases(["fp32", "bf16"], ["fp16"]))
def test_without_shift(style, dtype, tiles, device):
    ran = tiles(style)
    check(made(74, 40, 48, DTYPES[dtype], device) | {"shift": None})
    assert ran == {style}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("operand", ["grad", "y"])
def test_layouts(operand, layout, style, tiles, device):
    tiles(style)
    operands = made(74, 40, 48, torch.bfloat16, device)
    if layout == "without_cls":  # of images
        operands[operand] = LAYOUTS[layout](operands[operand].unflatten(0, (2, 37))).flatten(0, 1)
    else:
        operands[operand] = LAYOUTS[layout](operands[operand])
    check(operands)


@pytest.mark.parametrize("vector", ["mean", "rstd", "gain", "shift"])
@pytest.mark.parametrize("layout", ["strided", "offset"])
def test_layouts_of_vectors(vector, layout, tiles, device):
    tiles()
    operands = made(18, 40, 48, torch.float32, device)
    operands[vector] = LAYOUTS[layout](operands[vector])
    check(operands)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("operand", ["grad", "y"])
def test_not_finite_stays_in_its_column(operand, style, tiles, device):
    tiles(style)
    operands = made(74, 40, 48, torch.float32, device)
    clean, clean_bias = launch(operands)
    operands[operand] = operands[operand].clone()
    operands[operand][40, 7] = torch.nan
    got, bias = launch(operands)
    if operand == "grad":
        assert got[7].isnan().all()
        assert bias[7].isnan()
        got[7], bias[7] = clean[7], clean_bias[7]
    else:
        assert got[:, 7].isnan().all()
        got[:, 7] = clean[:, 7]
    assert torch.equal(got, clean)
    assert torch.equal(bias, clean_bias)


@pytest.mark.parametrize("style", STYLES)
def test_repeats_are_bit_equal(style, tiles, device):
    tiles(style)
    operands = made(194, 40, 48, torch.bfloat16, device)
    assert all(map(torch.equal, launch(operands), launch(operands)))


@pytest.mark.parametrize("style", STYLES)
def test_gradients_in_slices_of_others(style, tiles, device):
    """Aligned or not, in turn."""
    tiles(style)
    operands = made(37, 40, 48, torch.bfloat16, device)
    wanted = launch(operands)
    for bases in ((0, 0), (40 * 48, 40), (3, 0), (0, 5), (0, 0)):
        assert all(map(torch.equal, launch(operands, bases), wanted))


def test_outlier_channels(tiles, device):
    tiles()
    operands = made(37, 40, 104, torch.bfloat16, device)
    operands["y"][:, ::26] *= 40
    check(operands)


def test_rows_an_odd_number_of_elements_long_take_pointers(tiles, device):
    ran = tiles("descriptors")
    check(made(33, 40, 47, torch.bfloat16, device))
    assert ran == {"pointers"}
