"""What the kernel tests share: small tiles, layouts, fp64 oracles and the bounds on errors."""

import math
from functools import cache, partial

import pytest
import torch
from rounding import largest, rms, roundings, within

from visproj.ops import cross_attention
from visproj.ops.cross_attention import cast_mask

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STYLES = ("pointers", "descriptors")

# The dimension sizes around a block of 32: one, block - 1, block, block + 1, a prime, several.
EDGES = (1, 31, 32, 33, 37, 97)

RMS = 0.005  # DESIGN's contract for 16 bits, bf16 rounding alone giving 0.0017


def cases(plain, slow=()):
    """Parameters with readable ids; the later ones marked slow."""
    return [
        pytest.param(*_tuple(case), id=_name(case), marks=[pytest.mark.slow] * (i >= len(plain)))
        for i, case in enumerate([*plain, *slow])
    ]


def _tuple(case):
    return case if isinstance(case, tuple) else (case,)


def _name(case):
    """(37, 64, 33, "bf16") is 37x64x33-bf16."""
    parts = _tuple(case)
    numbers = "x".join(str(part) for part in parts if isinstance(part, int))
    return "-".join(filter(None, [numbers, *(str(p) for p in parts if not isinstance(p, int))]))


def small_tiles(monkeypatch, style="pointers", gemm=(32, 32, 32), attention=(32, 32)):
    """Have every launcher take small tiles; returns the set of styles that were launched.

    Nothing is timed: on a GPU PyTorch's own way would be a candidate beside them.
    """
    from visproj.kernels import configs
    from visproj.kernels.launch import Config
    from visproj.kernels.layout import describable

    styles = set()

    def candidates(kernel, operands, precision):
        described = style == "descriptors" and describable(*operands)
        styles.add(STYLES[described])
        blocks = attention if "attention" in kernel else gemm
        return (Config(blocks, warps=4, stages=1, descriptors=described),)

    monkeypatch.setattr(configs, "candidates", candidates)
    monkeypatch.setenv("VISPROJ_AUTOTUNE", "0")
    return styles


def random(*shape, dtype, device, scale=1.0):
    """Normal numbers, the same ones for every dtype and device."""
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(device, dtype)


def nothing_written(monkeypatch):
    """Have new tensors start as NaN, so that no kernel can rely on what it has not written."""

    def filled(make):
        def wrapper(*args, **kwargs):
            new = make(*args, **kwargs)
            return new.fill_(math.nan) if new.is_floating_point() else new

        return wrapper

    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, filled(getattr(owner, name)))


def offset(x):
    """The values of ``x`` one element off a 16-byte boundary."""
    flat = x.new_zeros(x.numel() + 1)
    view = flat[1:].view(x.shape)
    return view.copy_(x)


def strided(x):
    """The values of ``x`` in every second column of another tensor."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def transposed(x):
    """The values of ``x``, its first dimension the fastest in memory."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def padded_rows(x):
    """The values of ``x`` in rows that are longer than they are, by a multiple of 16 bytes."""
    return torch.nn.functional.pad(x, (0, 16))[..., : x.shape[-1]]


def odd_rows(x):
    """The values of ``x`` in rows an odd number of elements apart."""
    return torch.nn.functional.pad(x, (0, 1 + x.shape[-1] % 2))[..., : x.shape[-1]]


def expanded(x):
    """The first entry of ``x``, repeated without a copy."""
    return x[:1].expand(x.shape)


def reversed_batch(x):
    """The values of ``x``, its first two dimensions exchanged in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def without_cls(x):
    """The values of ``x`` after a first row of NaN in every image."""
    return torch.nn.functional.pad(x, (0, 0, 1, 0), value=math.nan)[:, 1:]


LAYOUTS = {
    f.__name__: f
    for f in (
        offset, strided, transposed, padded_rows, odd_rows, expanded, reversed_batch, without_cls
    )
}  # fmt: skip


def layer_norm_oracle(y, gain, shift, eps):
    centred = y - y.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return normal * gain + (0 if shift is None else shift)


def linear_layer_norm_oracle(x, weight, bias, gain, shift, eps=1e-12):
    return layer_norm_oracle(_linear(x, weight, bias), gain, shift, eps)


def linear_norm_linear_oracle(
    x, weight, bias, gain, shift, out_weight, out_bias, positions=None, positioned=0, eps=1e-12
):
    normal = linear_layer_norm_oracle(x, weight, bias, gain, shift, eps)
    out = _linear(normal, out_weight, out_bias)
    if positions is not None:
        added = positions @ out_weight[:positioned].T
        out = out + torch.nn.functional.pad(added, (0, out.shape[-1] - positioned))
    return out


def attention_oracle(q, k, v, mask=None):
    """Explicit softmax, for PyTorch's SDPA gives wrong gradients where all keys are at finfo.min.

    ``mask``: additive, broadcasting to ``[B, H, Q, L]``, or None.
    """
    q = q.expand(k.shape[0], -1, -1, -1)
    scores = torch.einsum("bqhd,blhd->bhql", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + mask
    empty = scores.isneginf().all(-1, keepdim=True)
    probabilities = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return torch.einsum("bhql,blhd->bqhd", probabilities, v)


def _linear(x, weight, bias):
    out = x @ weight.T
    return out if bias is None else out + bias


def evaluate(function, tensors, upstream):
    """The output of ``function`` and the gradients of all its tensors, 0 where it needs none."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    given = [leaf for leaf in leaves if leaf is not None]
    return [out.detach(), *torch.autograd.grad(out, given, upstream, materialize_grads=True)]


def check_op(op, oracle, tensors, *, eager=None, upstream=None):
    """The operation through the kernels, forward and with random upstream gradients backward.

    Args:
        op: Takes the tensors and ``backend``.
        oracle: Takes the same tensors, in fp64.
        tensors: Its inputs, ``None`` among them; all must come out unchanged.
        eager: What the error is compared with; ``op`` on the torch backend if None.
        upstream: The gradient to start from.
    """
    given = [t for t in tensors if t is not None]
    dtype, before = given[0].dtype, [t.clone() for t in given]
    exact = [None if t is None else t.double() for t in tensors]
    if upstream is None:
        shape = oracle(*exact).shape
        upstream = random(*shape, dtype=dtype, device=given[0].device)
    wanted = evaluate(eager or partial(op, backend="torch"), tensors, upstream)
    got = evaluate(partial(op, backend="triton"), tensors, upstream)
    names = ["output", *(f"gradient {i}" for i, t in enumerate(tensors) if t is not None)]
    check_errors(got, wanted, lambda: evaluate(oracle, exact, upstream.double()), names)
    assert all(map(torch.equal, given, before)), "an input was modified"
    return got


def check_errors(got, eager, formula, names=("output",)):
    """Two bounds on each result: PyTorch's error in the same dtype, and in 16 bits RMS.

    PyTorch's may happen to be 0: so the largest result may be rounded to its other neighbour, eps.
    Where sums are smaller than their terms, neither measures what rounding does: see ``within``.

    Args:
        got: What the kernels gave.
        eager: What PyTorch gives in the same dtype.
        formula: Computes the same in fp64.
        names: Of the results; "output" may have twice PyTorch's error, gradients three times.
    """
    truth, moved = formula(), cache(lambda: roundings(formula, got[0].dtype))
    for i, name in enumerate(names):
        assert got[i].shape == truth[i].shape
        assert got[i].dtype == eager[i].dtype
        if not truth[i].numel():
            continue

        def scale(i=i):
            return moved()[i]

        error, accepted = (t.double() - truth[i] for t in (got[i], eager[i]))
        allowed = (2 if name == "output" else 3) * largest(accepted)
        allowed += torch.finfo(got[i].dtype).eps * largest(truth[i])
        within(largest, error, allowed, scale, f"{name}, PyTorch {largest(accepted):.3g} off")
        if got[i].dtype != torch.float32:
            within(rms, error, RMS * rms(truth[i]), scale, f"rms of {name}")


def attention_operands(B, Q, L, H, d, dtype, device, *, shared=True, packed=True):
    q = random(*([] if shared else [B]), Q, H, d, dtype=dtype, device=device)
    if packed:
        return [q, random(B, L, 2, H, d, dtype=dtype, device=device)]
    return [q, *(random(B, L, H, d, dtype=dtype, device=device) for _ in range(2))]


def check_attention(
    tensors, attn_mask=None, key_padding_mask=None, *, explicit=False, upstream=None
):
    """Against fp64; ``explicit``: judged by the formula in the same dtype instead of SDPA."""
    q, k = tensors[:2]
    mask = dense_mask(attn_mask, key_padding_mask, k.shape[0], q.shape[-2], q.dtype)

    def op(q, k, v=None, *, backend):
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        return cross_attention(q, k, v, **masks, backend=backend)

    def oracle(q, k, v=None):
        keys, values = k.unbind(2) if v is None else (k, v)
        return attention_oracle(q, keys, values, None if mask is None else mask.to(q.dtype))

    eager = oracle if explicit else None
    return check_op(op, oracle, tensors, eager=eager, upstream=upstream)


def dense_mask(attn_mask, key_padding_mask, batch, heads, dtype):
    """Both masks as one to add, as rounded by an operation in ``dtype``, in fp64."""
    mask = None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            mask = torch.zeros_like(attn_mask, dtype=dtype).masked_fill(attn_mask, -math.inf)
        else:
            mask = cast_mask(attn_mask, dtype)
        mask = mask.unflatten(0, (batch, heads)) if mask.ndim == 3 else mask[None, None]
        mask = mask.double()
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None]
        zero = torch.zeros(1, dtype=torch.float64, device=padding.device)
        mask = (zero if mask is None else mask).masked_fill(padding, -math.inf)
    return mask
