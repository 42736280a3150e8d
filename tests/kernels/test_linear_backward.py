"""Weight and bias gradients of a Linear, launched as they are."""

import pytest
import torch
from kernels_support import DTYPES, LAYOUTS, STYLES, cases, check_errors, odd_rows, random

kernels = pytest.importorskip("visproj.kernels.linear_backward", reason="kernels need triton")

pytestmark = pytest.mark.usefixtures("unwritten")


def formula(grad, x, mean=None, rstd=None, gain=None, shift=None):
    """In the dtype of ``x``, the normalised rows too."""
    if mean is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        normal = (x.to(wide) - mean.to(wide)[..., None]) * rstd.to(wide)[..., None]
        normal = normal if gain is None else normal * gain.to(wide)
        x = (normal if shift is None else normal + shift.to(wide)).to(x.dtype)
    rows = grad.flatten(0, 1)
    return rows.T @ x.flatten(0, 1), rows.sum(0)


def check(grad, x, *, bias=True, **norm):
    got = kernels.linear_bwd_weight(grad, x, bias=bias, **norm)
    exact = {name: t.double() for name, t in norm.items()}
    names = ["dweight", "dbias"] if bias else ["dweight"]
    wanted = formula(grad, x, **norm)
    check_errors(got, wanted, lambda: formula(grad.double(), x.double(), **exact), names)
    assert bias or got[1] is None
    return got


def operands(images, length, N, K, dtype, device):
    grad = random(images, length, N, dtype=dtype, device=device)
    return grad, random(images, length, K, dtype=dtype, device=device)


def norm(images, length, K, dtype, device, names="mean rstd gain shift"):
    shapes = {"mean": (images, length), "rstd": (images, length), "gain": (K,), "shift": (K,)}
    return {
        name: random(*shapes[name], device=device, dtype=dtype if len(shapes[name]) == 1 else
                     torch.float32)
        for name in names.split()
    }  # fmt: skip


# (images, rows, N, K): each at the edges of a block of 32.
POINTERS = [
    *((1, rows, 33, 40) for rows in (1, 31, 32, 33, 37, 97)),
    *((2, 17, N, 40) for N in (1, 31, 32, 33, 37, 97)),
    *((2, 17, 40, K) for K in (1, 31, 32, 33, 37, 97)),
]
DESCRIPTORS = [
    *((3, rows, 40, 48) for rows in (1, 31, 32, 33, 37)),
    *((1, 33, N, 40) for N in (8, 24, 32, 96)),
    *((1, 33, 40, K) for K in (8, 24, 32, 96)),
]


@pytest.mark.parametrize(
    ("images", "rows", "N", "K", "style", "dtype"),
    cases(
        [(*shape, "pointers", "fp32") for shape in POINTERS]
        + [(*shape, "descriptors", "bf16") for shape in DESCRIPTORS],
        [(*shape, "pointers", dtype) for shape in POINTERS for dtype in ("bf16", "fp16")]
        + [(*shape, "descriptors", dtype) for shape in DESCRIPTORS for dtype in ("fp32", "fp16")],
    ),
)
def test_shapes(images, rows, N, K, style, dtype, tiles, device):
    ran = tiles(style)
    check(*operands(images, rows, N, K, DTYPES[dtype], device))
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
    check(*operands(1, rows, N, K, DTYPES[dtype], device))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("names", ["mean rstd", "mean rstd gain", "mean rstd gain shift"])
@pytest.mark.parametrize("dtype", cases(["fp32", "bf16"], ["fp16"]))
def test_normalised_rows(names, style, dtype, tiles, device):
    ran = tiles(style)
    dtype = DTYPES[dtype]
    given = norm(2, 37, 48, dtype, device, names)
    check(*operands(2, 37, 40, 48, dtype, device), **given)
    assert ran == {style}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("operand", ["grad", "x"])
def test_layouts(operand, layout, style, tiles, device):
    tiles(style)
    grad, x = operands(2, 37, 40, 48, torch.bfloat16, device)
    change = LAYOUTS[layout]
    check(*((change(grad), x) if operand == "grad" else (grad, change(x))))


@pytest.mark.parametrize("vector", ["mean", "rstd", "gain", "shift"])
@pytest.mark.parametrize("layout", ["strided", "offset"])
def test_layouts_of_vectors(vector, layout, tiles, device):
    tiles()
    given = norm(2, 9, 48, torch.float32, device)
    given[vector] = LAYOUTS[layout](given[vector])
    check(*operands(2, 9, 40, 48, torch.float32, device), **given)


SINGLE = {
    "one row": ((1, 1, 16), (17, 17, 1)),
    "a row an image": ((4, 1, 16), (32, 17, 1)),
    "one image": ((1, 5, 16), (83, 16, 1)),
    "expanded image": ((1, 5, 16), (0, 16, 1)),
}


@pytest.mark.parametrize("case", SINGLE)
def test_strides_of_single_entries(case, tiles, device):
    """No 16 bytes divide the stride of a dimension of size 1."""
    tiles("descriptors")
    shape, strides = SINGLE[case]
    x = random(256, dtype=torch.bfloat16, device=device).as_strided(shape, strides)
    check(random(*shape[:2], 32, dtype=torch.bfloat16, device=device), x)


@pytest.mark.parametrize("style", STYLES)
def test_without_bias(style, tiles, device):
    tiles(style)
    check(*operands(2, 9, 40, 48, torch.bfloat16, device), bias=False)


@pytest.mark.parametrize("style", STYLES)
def test_images_apart(style, tiles, device):
    """A tile of rows that crosses from one image into the next would read what lies between."""
    tiles(style)
    grad, x = operands(3, 33, 40, 48, torch.bfloat16, device)
    gap = x.new_full((3, 5, 48), torch.nan)
    apart = torch.cat((x, gap), dim=1)[:, :33]
    assert all(map(torch.equal, check(grad, apart), check(grad, x)))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("operand", ["grad", "x"])
def test_not_finite_stays_in_its_column(operand, style, tiles, device):
    tiles(style)
    given = dict(zip(("grad", "x"), operands(2, 37, 40, 48, torch.float32, device), strict=True))
    clean, clean_bias = kernels.linear_bwd_weight(**given, bias=True)
    given[operand] = given[operand].clone()
    given[operand][1, 3, 7] = torch.nan
    got, bias = kernels.linear_bwd_weight(**given, bias=True)
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
    grad, x = operands(2, 97, 40, 48, torch.bfloat16, device)
    given = norm(2, 97, 48, torch.bfloat16, device)
    runs = [kernels.linear_bwd_weight(grad, x, bias=True, **given) for _ in range(2)]
    assert all(map(torch.equal, *runs))


def test_outlier_channels(tiles, device):
    tiles()
    grad, x = operands(1, 37, 40, 104, torch.bfloat16, device)
    x[..., ::26] *= 40
    check(grad, x)


def test_rows_an_odd_number_apart_take_pointers(tiles, device):
    ran = tiles("descriptors")
    grad, x = operands(1, 33, 40, 48, torch.bfloat16, device)
    check(grad, odd_rows(x))
    assert ran == {"pointers"}
