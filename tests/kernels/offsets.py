"""Launches on views that reach beyond 2**31 elements; prints the relative error of each.

A process of its own, for the interpreter crashes where an offset wraps around. The memory between
the rows is never touched and so never there. ``python tests/kernels/offsets.py [CASE]``
"""

import json
import os
import sys

import torch

ROW = 2**30 + 8  # fits into 32 bits; twice this does not

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from helpers import rms_error  # noqa: E402
from kernels_support import attention_oracle  # noqa: E402

from visproj.kernels import configs  # noqa: E402
from visproj.kernels.cross_attention import cross_attention_fwd  # noqa: E402
from visproj.kernels.cross_attention_backward import cross_attention_bwd  # noqa: E402
from visproj.kernels.launch import Config, Launch  # noqa: E402
from visproj.kernels.layout import describable  # noqa: E402
from visproj.kernels.linear import Epilogue, linear_fwd  # noqa: E402
from visproj.kernels.linear_backward import _linear_bwd_weight_kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STYLE = {"descriptors": False}


def candidates(kernel, operands, precision):
    blocks = (16, 16) if "attention" in kernel else (16, 16, 16)
    return (Config(blocks, 4, 1, STYLE["descriptors"] and describable(*operands)),)


def random(*shape):
    return torch.randn(*shape, device=DEVICE).bfloat16()


def far_apart(x, dimension, apart=ROW):
    """The values of ``x`` with the entries along one dimension ``apart`` elements apart."""
    strides = list(x.stride())
    strides[dimension] = apart
    elements = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    storage = torch.empty(2 * elements, dtype=torch.int8, device=DEVICE).view(torch.bfloat16)
    return storage.as_strided(x.shape, strides).copy_(x)


def linear(dimension):
    x, weight = random(3, 3, 16), random(3, 16)
    wanted = x.double() @ weight.double().T
    if dimension == "weight":
        return linear_fwd(x, far_apart(weight, 0)), wanted
    return linear_fwd(far_apart(x, dimension), weight), wanted


def linear_table():
    x, weight, table = random(2, 3, 16), random(16, 16), random(3, 16)
    wanted = x.double() @ weight.double().T + table.double()
    return linear_fwd(x, weight, Epilogue(table=far_apart(table, 0))), wanted


def weight_gradient():
    """One tile of columns of a gradient of more than 2**31 elements, of zeros but for its end."""
    rows, N, K, tail = 2**16 + 64, 2**15, 16, 64
    grad = torch.zeros(rows, N, dtype=torch.bfloat16, device=DEVICE)
    y = torch.zeros(rows, K, dtype=torch.bfloat16, device=DEVICE)
    grad[-tail:, :16], y[-tail:] = random(tail, 16), random(tail, K)
    mean, rstd = (torch.full((rows,), value, device=DEVICE) for value in (0.0, 1.0))
    dweight, dbias = grad.new_empty(N, K), grad.new_empty(N)
    block_m = 64 if DEVICE == "cuda" else 2**13  # the interpreter minds the number of steps
    sizes = {"M": rows, "N": N, "K": K, "BLOCK_N": 16, "BLOCK_K": 16, "BLOCK_M": block_m}
    config = Config((16, 16, block_m), 4, 1, STYLE["descriptors"])
    options = {"PRECISION": "ieee", "DESCRIPTORS": config.descriptors}
    Launch(_linear_bwd_weight_kernel, 1, config, grad.device, **sizes, **options)(
        grad_ptr=grad,
        y_ptr=y,
        mean_ptr=mean,
        rstd_ptr=rstd,
        gain_ptr=y.new_ones(K),
        shift_ptr=None,
        dweight_ptr=dweight,
        dbias_ptr=dbias,
    )
    got = torch.cat([dweight[:16], dbias[:16, None]], 1)
    end = grad[-tail:, :16].double()
    return got, torch.cat([end.T @ y[-tail:].double(), end.sum(0)[:, None]], 1)


def attention(operand, dimension):
    tensors = dict(zip("qkv", (random(3, 3, 3, 16) for _ in range(3)), strict=True))
    wanted = attention_oracle(*(t.double() for t in tensors.values()))
    tensors[operand] = far_apart(tensors[operand], dimension)
    return cross_attention_fwd(*tensors.values(), None, statistics=False)[0], wanted


def attention_mask(dimension):
    q, k, v = (random(3, 3, 3, 16) for _ in range(3))
    mask = random(3, 3, 3, 128)
    mask[..., 3:] = -torch.inf
    wanted = attention_oracle(q.double(), k.double(), v.double(), mask[..., :3].double())
    return cross_attention_fwd(q, k, v, far_apart(mask, dimension), statistics=False)[0], wanted


def attention_gradients(dimension):
    leaves = [random(3, 3, 3, 16).double().requires_grad_() for _ in range(3)]
    wanted, dout = attention_oracle(*leaves), random(3, 3, 3, 16)
    wanted = torch.autograd.grad(wanted, leaves, dout.double())
    q, k, v = (far_apart(leaf.detach().bfloat16(), dimension) for leaf in leaves)
    out, statistics = cross_attention_fwd(q, k, v, None, statistics=True)
    # Heads of a gradient are contiguous; its batch and its rows may lie anywhere.
    apart = dimension if dimension < 2 else 0
    dk, dv = (far_apart(torch.empty_like(dout), apart) for _ in range(2))
    dq = cross_attention_bwd(dout, q, k, v, None, out, statistics, dk, dv)
    return torch.stack([dq, dk, dv]), torch.stack(wanted)


def packed_attention():
    """Three images of three keys, each row of theirs far from the next: the last beyond 2**31."""
    apart = ROW // 4 + 8
    q, k, v = (
        random(*shape).double().requires_grad_() for shape in ((3, 3, 16), *[(9, 3, 16)] * 2)
    )
    images = [t.unflatten(0, (3, 3)) for t in (k, v)]
    wanted, dout = attention_oracle(q.expand(3, -1, -1, -1), *images), random(3, 3, 3, 16)
    gradients = torch.autograd.grad(wanted, (k, v), dout.double())
    starts = torch.tensor([0, 3, 6, 9], dtype=torch.int32, device=DEVICE)
    tensors = [t.detach().bfloat16() for t in (q, k, v)]
    tensors[1:] = [far_apart(t[None], 1, apart) for t in tensors[1:]]
    out, statistics = cross_attention_fwd(*tensors, None, starts, statistics=True)
    dk, dv = (far_apart(torch.empty_like(dout).view(1, 9, 3, 16), 1, apart) for _ in range(2))
    cross_attention_bwd(dout, *tensors, None, out, statistics, dk, dv, starts, 3)
    got = torch.cat([out.view(9, 3, 16), dk[0], dv[0]])
    return got, torch.cat([wanted.detach().reshape(9, 3, 16), *gradients])


CASES = {
    **{f"linear {d}": lambda d=d: linear(d) for d in (0, 1, "weight")},
    "linear table": linear_table,
    "weight gradient": weight_gradient,
    "packed attention": packed_attention,
    **{f"attention {t} {d}": lambda t=t, d=d: attention(t, d) for t in "qkv" for d in (0, 1, 2)},
    **{f"attention mask {d}": lambda d=d: attention_mask(d) for d in (0, 1, 2)},
    **{f"attention gradients {d}": lambda d=d: attention_gradients(d) for d in (0, 1, 2)},
}


def main(names):
    configs.candidates = candidates
    torch.manual_seed(0)
    for style in ("pointers", "descriptors"):
        STYLE["descriptors"] = style == "descriptors"
        for name in names:
            got, wanted = CASES[name]()
            print(json.dumps([name, style, rms_error(got, wanted)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or CASES)
