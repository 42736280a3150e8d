"""LayerNorm over rows, launched as it is."""

import pytest
import torch
import torch.nn.functional as F
from kernels_support import (
    DTYPES,
    LAYOUTS,
    cases,
    check_errors,
    evaluate,
    layer_norm_oracle,
    random,
)

kernels = pytest.importorskip("visproj.kernels.layer_norm", reason="kernels need triton")

pytestmark = pytest.mark.usefixtures("unwritten")


def operands(rows, width, dtype, device):
    gain, shift = (random(width, dtype=dtype, device=device) for _ in range(2))
    return random(rows, width, dtype=dtype, device=device), gain, shift


def check(x, gain, shift, eps=1e-12):
    """Forward and backward against fp64, judged by F.layer_norm."""
    upstream = random(*x.shape, dtype=x.dtype, device=x.device)
    tensors = [x, gain, shift]
    exact = [None if t is None else t.double() for t in tensors]

    def oracle(x, gain, shift=None):
        return layer_norm_oracle(x, gain, shift, eps)

    wanted = evaluate(
        lambda x, g, s=None: F.layer_norm(x, g.shape, g, s, eps), _given(tensors), upstream
    )
    before = [t.clone() for t in _given(tensors)]
    out, mean, rstd = kernels.layer_norm_fwd(
        x, gain, shift, eps, out_dtype=x.dtype, in_place=False, statistics=True
    )
    dx, dgain, dshift, dsum = kernels.layer_norm_bwd(upstream, x, mean, rstd, gain)
    assert dgain.dtype == dshift.dtype == dsum.dtype == torch.float32
    check_sum(dsum, dx)
    got = [out, dx, dgain.to(x.dtype), dshift.to(x.dtype)]
    names = ("output", "dx", "dgain", "dshift")[: len(wanted)]
    check_errors(got, wanted, lambda: evaluate(oracle, _given(exact), upstream.double()), names)
    assert all(map(torch.equal, before, _given(tensors)))
    return out, mean, rstd, upstream, dx


def check_sum(dsum, dx):
    """It is summed in fp32, and each row of dx rounded to its own dtype only after that."""
    info = torch.finfo(dx.dtype)
    rounded = info.eps / 2 * (dx.double().abs() + info.smallest_normal).sum(0)
    summed = len(dx) * torch.finfo(torch.float32).eps * dx.double().abs().sum(0)
    assert ((dsum.double() - dx.double().sum(0)).abs() <= rounded + summed).all()


def _given(tensors):
    return [t for t in tensors if t is not None]


SHAPES = [
    *((17, width, "fp32") for width in (1, 2, 127, 128, 129, 255, 256, 257, 760, 1000, 1024)),
    *((17, width, "bf16") for width in (1, 3, 127, 128, 129, 199, 760, 1000, 1024, 1664, 3000)),
    *((rows, 1000, "fp16") for rows in (1, 7, 8, 9, 37)),
    *((rows, 199, "bf16") for rows in (1, 2, 3, 7, 8, 9, 16, 37, 97)),
    *((3, width, dtype) for width in (4096, 5120, 8192) for dtype in ("fp32", "bf16")),
    *((9, width, "bf16") for width in (2049, 4097, 8193, 10000, 12288, 16384)),  # in blocks
]
MORE_SHAPES = [
    *((rows, 1000, dtype) for rows in (199, 257) for dtype in ("fp32", "bf16")),
    *((37, width, "fp32") for width in (1664, 3000, 4096, 5120, 8192)),
    *((37, width, "fp16") for width in (760, 1664, 3000, 4096, 5120, 8192)),
    *((3, width, "fp32") for width in (2049, 8191, 8193, 10000, 12288, 16384)),
]


@pytest.mark.parametrize(("rows", "width", "dtype"), cases(SHAPES, MORE_SHAPES))
def test_shapes(rows, width, dtype, device):
    check(*operands(rows, width, DTYPES[dtype], device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_shift(dtype, device):
    x, gain, _ = operands(9, 200, DTYPES[dtype], device)
    check(x, gain, None)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1.0])
def test_eps(eps, device):
    check(*operands(9, 200, torch.float32, device), eps=eps)


@pytest.mark.parametrize("width", [64, 1000, 1664])
def test_far_from_zero(width, device):
    """Rows of mean 1e3 and deviation 1e-2, which ``E[x²] - E[x]²`` would make NaN in fp32."""
    x, gain, shift = operands(9, width, torch.float32, device)
    check(1000 + 1e-2 * x, gain, shift)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-3, 1e4])
def test_scales(size, dtype, device):
    """Squares of 1e4 overflow fp16, those of 1e-3 are subnormal in it."""
    x, gain, shift = operands(9, 200, DTYPES[dtype], device)
    check(x * size, gain, shift)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outlier_channels(dtype, device):
    x, gain, shift = operands(9, 1000, DTYPES[dtype], device)
    x[:, ::250] *= 40
    check(x, gain, shift)


@pytest.mark.parametrize("eps", [1e-12, 1e-5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_rows(dtype, eps, device):
    """A row of one value has variance 0: its result is the shift."""
    x, gain, shift = operands(4, 200, DTYPES[dtype], device)
    x[1] = 3
    out = kernels.layer_norm_fwd(
        x, gain, shift, eps, out_dtype=x.dtype, in_place=False, statistics=False
    )[0]
    assert torch.equal(out[1], shift)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, of inf - inf
def test_not_finite_stays_in_its_row(value, dtype, device):
    x, gain, shift = operands(17, 200, DTYPES[dtype], device)
    spoiled = x.clone()
    spoiled[5, 3] = value
    upstream = random(*x.shape, dtype=x.dtype, device=device)
    both = []
    for rows in (x, spoiled):
        out, mean, rstd = kernels.layer_norm_fwd(
            rows, gain, shift, 1e-5, out_dtype=x.dtype, in_place=False, statistics=True
        )
        both.append((out, kernels.layer_norm_bwd(upstream, rows, mean, rstd, gain)[0]))
    for clean, hit in zip(*both, strict=True):
        assert hit[5].isnan().all()
        hit[5] = clean[5]
        assert torch.equal(clean, hit)


@pytest.mark.parametrize("vector", ["gain", "shift"])
@pytest.mark.parametrize("layout", ["strided", "offset"])
def test_layouts_of_vectors(vector, layout, device):
    x, gain, shift = operands(5, 200, torch.float32, device)
    given = {"gain": gain, "shift": shift}
    given[vector] = LAYOUTS[layout](given[vector])
    check(x, **given)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_unaligned_rows(dtype, device):
    x, gain, shift = operands(5, 199, DTYPES[dtype], device)
    check(LAYOUTS["offset"](x), gain, shift)


@pytest.mark.parametrize("width", [200, 9000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(dtype, width, device):
    """The same bits, written over the input forward and over the gradient backward."""
    x, gain, shift = operands(9, width, DTYPES[dtype], device)
    _, mean, rstd, upstream, dx = check(x, gain, shift)
    again = kernels.layer_norm_bwd(upstream, x, mean, rstd, gain, in_place=True)[0]
    assert again is upstream
    assert torch.equal(again, dx)
    # With statistics it is another program, whose sums may be contracted in another way.
    given = x, gain, shift, 1e-12
    options = {"out_dtype": x.dtype, "statistics": False}
    alone = kernels.layer_norm_fwd(*given, in_place=False, **options)[0]
    over = kernels.layer_norm_fwd(*given, in_place=True, **options)
    assert over[0] is x
    assert over[1] is over[2] is None
    assert torch.equal(x, alone)


def test_result_of_another_dtype(device):
    """CUDA's autocast has LayerNorm give fp32 from 16 bits: nothing is rounded on the way."""
    x, gain, shift = operands(9, 200, torch.bfloat16, device)
    out = kernels.layer_norm_fwd(
        x,
        gain.float(),
        shift.float(),
        1e-5,
        out_dtype=torch.float32,
        in_place=True,
        statistics=False,
    )[0]
    exact = [t.double() for t in (x, gain, shift)]
    wanted = F.layer_norm(x.float(), (200,), gain.float(), shift.float(), 1e-5)
    check_errors([out], [wanted], lambda: [layer_norm_oracle(*exact, 1e-5)])


@pytest.mark.parametrize(("rows", "width"), [(1, 200), (9, 200), (97, 200), (9, 9000)])
def test_repeats_are_bit_equal(rows, width, device):
    x, gain, _ = operands(rows, width, torch.bfloat16, device)
    upstream = random(*x.shape, dtype=x.dtype, device=device)
    mean, rstd = (random(rows, dtype=torch.float32, device=device) for _ in range(2))
    runs = [kernels.layer_norm_bwd(upstream, x, mean, rstd, gain) for _ in range(2)]
    assert all(map(torch.equal, *runs))
