import pytest
import torch
import torch.nn.functional as F
from helpers import rms_error
from torch import nn

from visproj.ops import linear_layer_norm


def arguments(rows=(5,), width=12, out=20, dtype=torch.float64, device="cpu"):
    shapes = (*rows, width), (out, width), (out,), (out,), (out,)
    return [torch.randn(*shape, dtype=torch.float64).to(device, dtype) for shape in shapes]


def formula(x, weight, bias, gain, shift, eps):
    y = torch.einsum("...c,dc->...d", x, weight) + bias
    y = y - y.sum(-1, keepdim=True) / y.shape[-1]
    return y / ((y**2).sum(-1, keepdim=True) / y.shape[-1] + eps) ** 0.5 * gain + shift


@pytest.mark.parametrize("rows", [(1,), (17,), (2, 257), (2, 3, 4), ()], ids=str)
@pytest.mark.parametrize("out", [1, 20, 199, 1000])
def test_formula(rows, out, device):
    args = arguments(rows, out=out, device=device)
    torch.testing.assert_close(
        linear_layer_norm(*args, eps=1e-5), formula(*args, eps=1e-5), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounding(dtype, device):
    args = arguments((64,), 96, 130, dtype, device)
    truth = formula(*(a.double() for a in args), eps=1e-12)
    # Two roundings of relative size eps / 2 and an accumulation: a few eps.
    bound = 0.005 if dtype == torch.bfloat16 else 4 * torch.finfo(dtype).eps
    assert rms_error(linear_layer_norm(*args), truth) < bound


def test_gradients():
    args = [a.requires_grad_() for a in arguments()]
    assert torch.autograd.gradcheck(lambda *a: linear_layer_norm(*a, eps=1e-3), args)


def test_without_bias_and_shift():
    x, weight, _, gain, _ = arguments()
    zero = torch.zeros(20, dtype=torch.float64)
    torch.testing.assert_close(
        linear_layer_norm(x, weight, None, gain, None),
        linear_layer_norm(x, weight, zero, gain, zero),
    )


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.expand(3, 8, 12),
        lambda x: x.repeat(1, 2)[:, ::2],
        lambda x: x.t().contiguous().t(),
        lambda x: F.pad(x, (1, 0))[:, 1:],
        lambda x: x[:0],
    ],
    ids=["expanded", "strided", "transposed", "offset", "empty"],
)
def test_any_strides(view):
    x, *rest = arguments((8,))
    x = view(x)
    torch.testing.assert_close(
        linear_layer_norm(x, *rest), formula(x, *rest, eps=1e-12), rtol=1e-12, atol=1e-12
    )


def test_nan_stays_in_its_row():
    x, *rest = arguments((4,))
    x[1, 3] = float("nan")
    assert linear_layer_norm(x, *rest).isnan().all(1).tolist() == [False, True, False, False]


def test_autocast_is_that_of_the_modules(device):
    linear, norm = nn.Linear(12, 20).to(device), nn.LayerNorm(20).to(device)
    x = torch.randn(5, 12, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        wanted = norm(linear(x))
        got = linear_layer_norm(x, linear.weight, linear.bias, norm.weight, norm.bias, norm.eps)
    assert got.dtype == wanted.dtype
    # The product is rounded to bf16 once: a GPU's kernel may add it up in another order. A row has
    # deviation 1, its largest entry is below 4.4 (the root of 19).
    one_rounding = 4.4 * torch.finfo(torch.bfloat16).eps if device.type == "cuda" else 0
    torch.testing.assert_close(got, wanted, rtol=0, atol=one_rounding)


BAD = {
    "integer x": (TypeError, "x must be floating point", lambda a: [a[0].long(), *a[1:]]),
    "width": (
        ValueError,
        r"x must be \[..., 12\], got shape \[5, 11\]",
        lambda a: [a[0][:, 1:], *a[1:]],
    ),
    "weight rank": (ValueError, r"weight must be \[D, C\]", lambda a: [a[0], a[1][0], *a[2:]]),
    "bias": (
        ValueError,
        r"bias must have shape \[20\], got \[19\]",
        lambda a: [*a[:2], a[2][1:], *a[3:]],
    ),
    "gain": (ValueError, r"gain must have shape \[20\]", lambda a: [*a[:3], a[3][:, None], a[4]]),
    "shift dtype": (TypeError, "shift and x must have one dtype", lambda a: [*a[:4], a[4].float()]),
    "weight dtype": (
        TypeError,
        "weight and x must have one dtype",
        lambda a: [a[0], a[1].half(), *a[2:]],
    ),
    "device": (
        ValueError,
        "weight and x must be on one device",
        lambda a: [a[0], a[1].to("meta"), *a[2:]],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, message, spoil = BAD[case]
    with pytest.raises(error, match=message):
        linear_layer_norm(*spoil(arguments()))
