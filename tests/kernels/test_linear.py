"""The matrix product with its epilogue, launched as it is."""

import pytest
import torch
from kernels_support import (
    DTYPES,
    EDGES,
    LAYOUTS,
    STYLES,
    cases,
    check_errors,
    random,
)

linear = pytest.importorskip("visproj.kernels.linear", reason="kernels need triton")

pytestmark = pytest.mark.usefixtures("unwritten")


EPS = 0.25


def formula(x, weight, **terms):
    """What the kernel computes; the product in the dtype of ``x``, everything else wider."""
    out = (x @ weight.T).to(torch.promote_types(x.dtype, torch.float32))
    bias, squares, shift, table = (
        None if terms.get(name) is None else terms[name].to(out.dtype)
        for name in ("bias", "squares", "shift", "table")
    )
    out = out if bias is None else out + bias
    if squares is not None:
        out = out * (squares.sum(0) + EPS).rsqrt().view(*out.shape[:2], 1)
    out = out if shift is None else out + shift
    if table is not None:
        out = out + torch.nn.functional.pad(table, (0, out.shape[-1] - table.shape[-1]))
    return out.to(x.dtype)


def check(x, weight, **terms):
    got = linear.linear_fwd(x, weight, linear.Epilogue(**terms, eps=EPS))
    exact = {name: None if t is None else t.double() for name, t in terms.items()}
    wanted = formula(x, weight, **terms)
    check_errors([got], [wanted], lambda: [formula(x.double(), weight.double(), **exact)])


def operands(images, length, K, N, dtype, device):
    x = random(images, length, K, dtype=dtype, device=device)
    return x, random(N, K, dtype=dtype, device=device, scale=K**-0.5)


def around_blocks(aligned):
    """(M, K, N): each at every edge of a block of 32, the others at one and a bit."""
    inner = (8, 24, 32, 40, 96) if aligned else EDGES
    return [
        *((M, 40, 40) for M in EDGES),
        *((40 if aligned else 33, K, 40) for K in inner),
        *((40 if aligned else 33, 40, N) for N in inner),
    ]


SHAPES = [
    *((*shape, "pointers", "fp32") for shape in around_blocks(False)),
    *((*shape, "descriptors", "bf16") for shape in around_blocks(True)),
]
MORE_SHAPES = [
    *((*shape, "pointers", dtype) for shape in around_blocks(False) for dtype in ("bf16", "fp16")),
    *(
        (*shape, "descriptors", dtype)
        for shape in around_blocks(True)
        for dtype in ("fp32", "fp16")
    ),
]


@pytest.mark.parametrize(("M", "K", "N", "style", "dtype"), cases(SHAPES, MORE_SHAPES))
def test_shapes(M, K, N, style, dtype, tiles, device):
    ran = tiles(style)
    check(*operands(1, M, K, N, DTYPES[dtype], device))
    assert ran == {style}


# Rows and output widths as users have them, in tiles of the size that a GPU gets.
WIDE = [(1, 4096), (17, 3000), (37, 1664), (199, 760), (257, 1000), (1, 1), (257, 1)]
WIDER = [
    (rows, width)
    for rows in (1, 17, 37, 199, 257)
    for width in (1, 760, 1000, 1024, 1664, 3000, 4096)
    if (rows, width) not in WIDE
]


@pytest.mark.parametrize(
    ("M", "N", "dtype"),
    cases([(*shape, "bf16") for shape in WIDE], [(*shape, "fp32") for shape in WIDER]),
)
def test_widths(M, N, dtype, tiles, device):
    tiles(gemm=(128, 128, 64))
    x, weight = operands(1, M, 72, N, DTYPES[dtype], device)
    check(x, weight, bias=random(N, dtype=DTYPES[dtype], device=device))


@pytest.mark.parametrize("K", cases([760, 1664], [1000, 1024, 3000, 4096]))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_depths(K, dtype, tiles, device):
    tiles(gemm=(128, 128, 64))
    check(*operands(1, 37, K, 40, DTYPES[dtype], device))


TERMS = {
    "nothing": "",
    "bias": "bias",
    "row scale": "squares",
    "shift": "shift",
    "table": "table",
    "folded": "squares bias shift",
    "everything": "bias squares shift table",
}


def terms(names, images, length, N, columns, dtype, device):
    def make(*shape, dtype=dtype):
        return random(*shape, dtype=dtype, device=device)

    every = {
        "bias": make(N),
        "squares": make(3, images * length, dtype=torch.float32).square(),
        "shift": make(N, dtype=torch.float32),
        "table": make(length, columns),
    }
    return {name: every[name] for name in names.split()}


@pytest.mark.parametrize("case", TERMS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", cases(["fp32", "bf16"], ["fp16"]))
def test_epilogue(case, style, dtype, tiles, device):
    ran = tiles(style)
    images, length, K, N = 2, 37, 40, 72
    given = terms(TERMS[case], images, length, N, 40, DTYPES[dtype], device)
    check(*operands(images, length, K, N, DTYPES[dtype], device), **given)
    assert ran == {style}


@pytest.mark.parametrize(
    ("length", "columns", "style"),
    cases(
        [
            *((37, 1, "pointers"), (1, 72, "pointers"), (33, 31, "pointers"), (32, 33, "pointers")),
            *((37, 8, "descriptors"), (1, 72, "descriptors"), (65, 64, "descriptors")),
        ]
    ),
)
def test_table_columns(length, columns, style, tiles, device):
    """The table starts anew with every image and covers only its own columns."""
    ran = tiles(style)
    given = terms("table", 3, length, 72, columns, torch.bfloat16, device)
    check(*operands(3, length, 40, 72, torch.bfloat16, device), **given)
    assert ran == {style}


OPERAND_LAYOUTS = [("x", layout) for layout in LAYOUTS] + [
    (operand, layout)
    for operand in ("weight", "table")
    for layout in LAYOUTS
    if layout not in ("without_cls", "reversed_batch")  # as images have them
]


@pytest.mark.parametrize(("operand", "layout"), cases(OPERAND_LAYOUTS))
@pytest.mark.parametrize("style", STYLES)
def test_layouts(operand, layout, style, tiles, device):
    tiles(style)
    x, weight = operands(2, 37, 40, 48, torch.bfloat16, device)
    table = random(37, 48, dtype=torch.bfloat16, device=device)
    change = LAYOUTS[layout]
    x = change(x) if operand == "x" else x
    weight = change(weight) if operand == "weight" else weight
    check(x, weight, table=change(table) if operand == "table" else table)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("style", STYLES)
def test_layouts_without_images(layout, style, tiles, device):
    """Without a table the images are one run of rows where their strides allow it."""
    tiles(style)
    x, weight = operands(3, 11, 40, 48, torch.float32, device)
    check(LAYOUTS[layout](x), weight)


@pytest.mark.parametrize("vector", ["bias", "shift", "squares"])
@pytest.mark.parametrize("layout", ["strided", "offset"])
def test_layouts_of_vectors(vector, layout, tiles, device):
    tiles()
    given = terms("bias squares shift", 2, 9, 48, 0, torch.float32, device)
    given[vector] = LAYOUTS[layout](given[vector])
    check(*operands(2, 9, 40, 48, torch.float32, device), **given)


# Shapes whose descriptors would need a stride that no 16 bytes divide, in a dimension of size 1.
SINGLE = {
    "one row": ((1, 1, 16), (17, 17, 1)),
    "a row an image": ((4, 1, 16), (32, 17, 1)),
    "one image": ((1, 5, 16), (83, 16, 1)),
    "expanded image": ((1, 5, 16), (0, 16, 1)),
}


@pytest.mark.parametrize("case", SINGLE)
def test_strides_of_single_entries(case, tiles, device):
    tiles("descriptors")
    shape, strides = SINGLE[case]
    x = random(256, dtype=torch.bfloat16, device=device).as_strided(shape, strides)
    check(x, random(32, 16, dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("M", "N", "K"), cases([(37, 40, 40), (33, 97, 97), (17, 33, 104), (5, 96, 32)])
)
def test_folded_statistics(M, N, K, dtype, style, tiles, device):
    """The row scale of a folded projector: |R x + r|, R triangular, nothing stored."""
    tiles(style)
    x, weight = operands(1, M, K, N, DTYPES[dtype], device)
    triangle, bias = weight.triu(), random(N, dtype=DTYPES[dtype], device=device)
    squares = linear.row_squares_fwd(x, triangle, bias)
    assert squares.shape == (-(-N // 32), M)
    truth = formula(x.double(), triangle.double(), bias=bias.double())
    # Nothing is rounded to 16 bits on the way; fp32 sums of up to 104 terms.
    wanted = truth.square().sum(-1).flatten()
    torch.testing.assert_close(squares.sum(0).double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("columns", [0, 40, 72])
@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("dtype", cases(["bf16"], ["fp32", "fp16"]))
def test_row_scale_from_squares(dtype, parts, columns, style, tiles, device):
    """As many parts as tiles of the product that left them; images do not share a tile."""
    ran = tiles(style)
    images, length, K, N = 3, 37, 40, 72
    dtype = DTYPES[dtype]
    x, weight = operands(images, length, K, N, dtype, device)
    squares = random(parts, images * length, dtype=torch.float32, device=device).square()
    given = {name: random(N, dtype=dtype, device=device) for name in ("bias", "shift")}
    if columns:
        given["table"] = random(length, columns, dtype=dtype, device=device)
    check(x, weight, **given, squares=squares)
    assert ran == {style}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("N", "K"), cases([(40, 40), (96, 64), (64, 104), (97, 97), (1, 33)]))
def test_triangular(N, K, style, tiles, device):
    """Tiles below the diagonal are skipped: what lies there makes no difference."""
    tiles(style)
    x, weight = operands(1, 33, K, N, torch.float32, device)
    spoiled = weight.triu()
    for row in range(0, N, 32):
        spoiled[row:, :row] = torch.nan
    squares = linear.row_squares_fwd(x, weight.triu(), None)
    assert torch.equal(linear.row_squares_fwd(x, spoiled, None), squares)


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, of inf * 0
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_not_finite_stays_in_its_row(value, style, dtype, tiles, device):
    tiles(style)
    x, weight = operands(2, 37, 40, 48, DTYPES[dtype], device)
    clean = linear.linear_fwd(x, weight)
    spoiled = x.clone()
    spoiled[1, 3, 7] = value
    out = linear.linear_fwd(spoiled, weight)
    expected = spoiled @ weight.T
    assert torch.equal(out[1, 3].isnan(), expected[1, 3].isnan())
    assert torch.equal(out[1, 3].isinf(), expected[1, 3].isinf())
    assert not out[1, 3].isfinite().any()
    out[1, 3] = clean[1, 3]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("style", STYLES)
def test_repeats_are_bit_equal(style, tiles, device):
    tiles(style)
    x, weight = operands(2, 37, 104, 72, torch.bfloat16, device)
    squares = [linear.row_squares_fwd(x, weight.triu(), None) for _ in range(2)]
    outs = [linear.linear_fwd(x, weight, linear.Epilogue(squares=s, eps=EPS)) for s in squares]
    assert torch.equal(*squares)
    assert torch.equal(*outs)


def test_outlier_channels(tiles, device):
    """Vision features have channels 40 times the rest."""
    tiles()
    x, weight = operands(1, 37, 104, 40, torch.bfloat16, device)
    x[..., ::26] *= 40
    check(x, weight)
