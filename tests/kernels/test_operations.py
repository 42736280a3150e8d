"""The public operations through the kernels, forward and backward."""

import pytest
import torch
from helpers import rms_error
from kernels_support import (
    DTYPES,
    LAYOUTS,
    STYLES,
    cases,
    check_op,
    evaluate,
    linear_layer_norm_oracle,
    linear_norm_linear_oracle,
    random,
)

from visproj import ops

pytest.importorskip("triton", reason="kernels need triton")

pytestmark = pytest.mark.usefixtures("unwritten")

LINEAR_NORM = ("x", "weight", "bias", "gain", "shift")
LINEAR_NORM_LINEAR = (*LINEAR_NORM, "out_weight", "out_bias", "positions")


def linear_norm(rows, C, D, dtype, device):
    shapes = (*rows, C), (D, C), (D,), (D,), (D,)
    tensors = [random(*shape, dtype=dtype, device=device) for shape in shapes]
    tensors[1] *= C**-0.5
    return tensors


def linear_norm_linear(B, L, C, D, N, dtype, device, positions=True):
    tensors = linear_norm((B, L), C, D, dtype, device)
    tensors.append(random(N, D, dtype=dtype, device=device, scale=D**-0.5))
    tensors.append(random(N, dtype=dtype, device=device))
    return [*tensors, random(L, D, dtype=dtype, device=device) if positions else None]


def check_norm(tensors, eps=1e-12, **options):
    def op(*tensors, backend):
        return ops.linear_layer_norm(*tensors, eps, backend=backend)

    return check_op(op, lambda *t: linear_layer_norm_oracle(*t, eps=eps), tensors, **options)


def chain(tensors, positioned, eps=1e-12, backend="triton", **others):
    *first, out_weight, out_bias, positions = tensors
    return ops.linear_norm_linear(
        *first,
        eps,
        out_weight,
        out_bias,
        positions=positions,
        positioned=positioned,
        backend=backend,
        **others,
    )


def check_chain(tensors, positioned=16, **options):
    return check_op(
        lambda *tensors, backend: chain(tensors, positioned, backend=backend),
        lambda *tensors: linear_norm_linear_oracle(*tensors, positioned),
        tensors,
        **options,
    )


NORM_SHAPES = [
    *((rows, 40, 72, "bf16") for rows in (1, 17, 31, 32, 33, 37, 199)),
    *((17, 40, D, "fp32") for D in (1, 31, 33, 199, 760, 1000, 1024)),
    *((5, C, 72, "fp16") for C in (1, 31, 33, 97)),
    (257, 24, 40, "fp32"),
    (3, 24, 5120, "bf16"),
    (3, 24, 8192, "fp32"),
]
MORE_NORM_SHAPES = [
    *((37, 72, D, "bf16") for D in (1664, 3000, 4096, 5120, 8192)),
    *((rows, 40, 1000, dtype) for rows in (199, 257) for dtype in ("bf16", "fp32")),
    (2, 8, 16384, "bf16"),
]


@pytest.mark.parametrize(("rows", "C", "D", "dtype"), cases(NORM_SHAPES, MORE_NORM_SHAPES))
def test_linear_layer_norm(rows, C, D, dtype, tiles, device):
    tiles(gemm=(32, 32, 32) if D < 300 else (128, 64, 64))
    check_norm(linear_norm((rows,), C, D, DTYPES[dtype], device))


@pytest.mark.parametrize("rows", [(), (1,), (2, 3, 4), (0,), (2, 0)], ids=str)
def test_leading_dimensions(rows, tiles, device):
    tiles()
    check_norm(linear_norm(rows, 40, 72, torch.bfloat16, device))


# (B, L, C, D, N, positioned): more rows than outputs first, then more outputs than rows.
CHAIN_SHAPES = [
    *((2, L, 40, 40, 33, 0, "pointers", "fp32") for L in (17, 31, 32, 33, 97)),
    *((1, 41, 40, D, 40, 16, "pointers", "bf16") for D in (1, 31, 33, 97, 199)),
    *((1, 97, 24, 40, N, 1, "pointers", "fp32") for N in (1, 31, 33)),
    *((2, 33, 24, 40, N, N, "descriptors", "bf16") for N in (8, 40, 64)),
    (2, 37, 24, 1000, 40, 40, "descriptors", "bf16"),
    *((1, L, 40, 40, 72, 0, "pointers", "fp32") for L in (1, 33, 37)),
    *((2, 9, 40, D, 97, 96, "pointers", "bf16") for D in (1, 33, 199)),
    *((3, L, 24, 40, 144, 72, "descriptors", "bf16") for L in (1, 31, 33)),
    (1, 9, 24, 40, 1664, 0, "descriptors", "bf16"),
    (0, 9, 24, 40, 48, 8, "pointers", "fp32"),
    (2, 0, 24, 40, 48, 8, "pointers", "fp32"),
]
MORE_CHAIN_SHAPES = [
    *((2, L, 24, 72, 144, 72, style, "fp16") for L in (17, 37, 199, 257) for style in STYLES),
    *((1, 41, 24, D, 40, 0, "descriptors", "bf16") for D in (760, 1024, 1664, 3000, 4096)),
    (1, 3, 8, 8192, 8, 0, "pointers", "bf16"),
]


@pytest.mark.parametrize(
    ("B", "L", "C", "D", "N", "positioned", "style", "dtype"),
    cases(CHAIN_SHAPES, MORE_CHAIN_SHAPES),
)
def test_linear_norm_linear(B, L, C, D, N, positioned, style, dtype, tiles, device):
    tiles(style, gemm=(32, 32, 32) if max(D, N) < 300 else (64, 128, 64))
    dtype = DTYPES[dtype]
    tensors = linear_norm_linear(B, L, C, D, N, dtype, device, positions=positioned > 0)
    check_chain(tensors, positioned)


@pytest.mark.parametrize("absent", ["bias", "shift", "out_bias", "positions", "all of them"])
@pytest.mark.parametrize(("L", "style"), cases([(13, "pointers"), (9, "descriptors")]))
def test_optional_tensors(L, absent, style, tiles, device):
    tiles(style)
    tensors = linear_norm_linear(2, L, 24, 40, 24, torch.bfloat16, device)
    for i, name in enumerate(LINEAR_NORM_LINEAR):
        optional = name in ("bias", "shift", "out_bias", "positions")
        if name == absent or (optional and absent == "all of them"):
            tensors[i] = None
    check_chain(tensors)
    check_norm(tensors[:5])


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize(
    ("L", "rows", "K", "style", "dtype"),
    [
        (37, 11, 2, "pointers", "fp32"),
        (33, 1, 3, "descriptors", "bf16"),
        (5, 9, 1, "pointers", "fp16"),
    ],
)
def test_placed_positions(B, L, rows, K, style, dtype, tiles, device):
    """Each token gets the sum of some positions, those that it shares with other tokens."""
    tiles(style)
    tensors = linear_norm_linear(B, L, 24, 40, 24, DTYPES[dtype], device)
    tensors[-1] = random(rows, 40, dtype=DTYPES[dtype], device=device)
    places = torch.randint(rows, (K, L), device=device)

    def op(*tensors, backend):
        return chain(tensors, 16, backend=backend, places=places)

    def oracle(*tensors):
        *others, positions = tensors
        return linear_norm_linear_oracle(*others, positions[places].sum(0), 16)

    check_op(op, oracle, tensors)


@pytest.mark.parametrize("used", ["both", "rows", "queries"])
@pytest.mark.parametrize("queried", [8, 5, 0, 24])
@pytest.mark.parametrize(("style", "dtype"), cases([("pointers", "fp32"), ("descriptors", "bf16")]))
def test_a_joint_weight(queried, used, style, dtype, tiles, device):
    """Its first outputs are those of queries, whatever of the two results is used."""
    tiles(style)
    dtype = DTYPES[dtype]
    tensors = linear_norm_linear(2, 9, 24, 40, 24, dtype, device)
    tensors.append(random(7, 40, dtype=dtype, device=device))
    positioned = (24 - queried) // 2
    numbers = {"positioned": positioned, "queried": queried}

    def result(rows, projected):
        both = {"rows": rows, "queries": projected}
        chosen = both.values() if used == "both" else [both[used]]
        return torch.cat([part.flatten() for part in chosen])

    def op(*tensors, backend):
        *first, out_weight, out_bias, positions, queries = tensors
        given = {"positions": positions, "queries": queries, **numbers, "backend": backend}
        return result(*ops.linear_norm_linear(*first, 1e-12, out_weight, out_bias, **given))

    def oracle(*tensors):
        *first, weight, bias, positions, queries = tensors
        others = weight[queried:], bias[queried:], positions, positioned
        projected = queries @ weight[:queried].T + bias[:queried]
        return result(linear_norm_linear_oracle(*first, *others), projected)

    check_op(op, oracle, tensors)


def suits(tensor, layout):
    """Whether a layout is for tensors of this many dimensions."""
    return tensor.ndim == 3 or layout in {
        1: ("offset", "strided", "expanded"),
        2: ("offset", "strided", "transposed", "padded_rows", "odd_rows", "expanded"),
    }.get(tensor.ndim, ())


LAYOUT_CASES = [
    (name, layout)
    for name, tensor in zip(
        LINEAR_NORM_LINEAR,
        linear_norm_linear(2, 9, 24, 40, 24, torch.float32, "cpu"),
        strict=True,
    )
    for layout in LAYOUTS
    # With one row of weights for all outputs, a LayerNorm has nothing but rounding errors to scale.
    if suits(tensor, layout) and not ("weight" in name and layout == "expanded")
]


@pytest.mark.parametrize(("operand", "layout"), cases(LAYOUT_CASES))
@pytest.mark.parametrize(
    ("L", "style"), cases([(13, "descriptors")], [(13, "pointers"), (9, "descriptors")])
)
def test_layouts_of_linear_norm_linear(L, operand, layout, style, tiles, device):
    tiles(style)
    tensors = linear_norm_linear(2, L, 24, 40, 24, torch.bfloat16, device)
    index = LINEAR_NORM_LINEAR.index(operand)
    tensors[index] = LAYOUTS[layout](tensors[index])
    check_chain(tensors)


@pytest.mark.parametrize(
    ("operand", "layout"), cases([case for case in LAYOUT_CASES if case[0] in LINEAR_NORM])
)
def test_layouts_of_linear_layer_norm(operand, layout, tiles, device):
    tiles("descriptors")
    tensors = linear_norm((2, 9), 24, 40, torch.bfloat16, device)
    index = LINEAR_NORM.index(operand)
    tensors[index] = LAYOUTS[layout](tensors[index])
    check_norm(tensors)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "without_cls"])
@pytest.mark.parametrize("check", [check_norm, check_chain], ids=["norm", "chain"])
def test_layouts_of_the_upstream_gradient(layout, check, tiles, device):
    tiles("descriptors")
    tensors = linear_norm_linear(2, 21, 24, 40, 40, torch.bfloat16, device)
    upstream = LAYOUTS[layout](random(2, 21, 40, dtype=torch.bfloat16, device=device))
    check(tensors if check is check_chain else tensors[:5], upstream=upstream)


@pytest.mark.parametrize("bias", [1000.0, -1000.0])
@pytest.mark.parametrize("D", [40, 199])
def test_far_from_zero(bias, D, tiles, device):
    """Rows of mean 1e3 and deviation 1e-2 behind the first Linear, fp32."""
    tiles()
    tensors = linear_norm((9,), 24, D, torch.float32, device)
    tensors[1] *= 1e-2
    tensors[2] = bias + 1e-2 * tensors[2]
    check_norm(tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_from_zero_between_two_linears(dtype, tiles, device):
    """The same with a shared direction in the weight as well: as far off as PyTorch."""
    tiles()
    tensors = linear_norm_linear(2, 13, 24, 40, 24, torch.float32, device, positions=False)
    tensors[1] = 1e-2 * tensors[1] + 100 * torch.randn(24, device=device)
    tensors = [None if t is None else t.to(DTYPES[dtype]) for t in tensors]
    truth = chain([None if t is None else t.double() for t in tensors], 0, backend="torch")
    torch_error = rms_error(chain(tensors, 0, backend="torch"), truth)
    assert rms_error(chain(tensors, 0), truth) <= 2 * torch_error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", [check_norm, check_chain], ids=["norm", "chain"])
def test_outlier_channels(check, dtype, tiles, device):
    """Vision features have channels 40 times the rest."""
    tiles()
    tensors = linear_norm_linear(2, 13, 104, 40, 24, DTYPES[dtype], device)
    tensors[0][..., ::26] *= 40
    check(tensors if check is check_chain else tensors[:5])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_not_finite_stays_in_its_row(style, tiles, device):
    tiles(style)
    tensors = linear_norm_linear(2, 13, 24, 40, 24, torch.bfloat16, device)
    upstream = random(2, 13, 24, dtype=torch.bfloat16, device=device)

    def op(x):
        return chain([x, *tensors[1:]], 16)

    clean = evaluate(op, tensors[:1], upstream)
    tensors[0][1, 5, 3] = torch.nan
    for mine, before in zip(evaluate(op, tensors[:1], upstream), clean, strict=True):
        assert mine[1, 5].isnan().all()
        mine[1, 5] = before[1, 5]
        assert torch.equal(mine, before)


@pytest.mark.parametrize("check", [check_norm, check_chain], ids=["norm", "chain"])
def test_repeats_are_bit_equal(check, tiles, device):
    tiles("descriptors")
    tensors = linear_norm_linear(2, 13, 24, 40, 24, torch.bfloat16, device)
    tensors = tensors if check is check_chain else tensors[:5]
    upstream = random(2, 13, len(tensors[-2]), dtype=torch.bfloat16, device=device)
    first, second = (check(tensors, upstream=upstream) for _ in range(2))
    assert all(map(torch.equal, first, second))
