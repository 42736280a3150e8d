"""PyTorch's own way, where timing found it to be the fastest: the same values as the kernels'."""

import pytest
import torch
from kernels_support import (
    DTYPES,
    LAYOUTS,
    attention_operands,
    check_attention,
    check_errors,
    check_op,
    linear_norm_linear_oracle,
    random,
    without_cls,
)

from visproj import ops

pytest.importorskip("triton", reason="kernels need triton")

pytestmark = pytest.mark.parametrize("dtype", [pytest.param(t, id=n) for n, t in DTYPES.items()])


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    """Every launcher that offers PyTorch's way takes it; gives the names of the others' kernels."""
    from visproj.kernels import launch, plans, tuning

    def take(names, choices, prepare, device):
        return tuning.LIBRARY if tuning.LIBRARY in choices else choices[0]

    started = []
    start = launch.Launch.start

    def record(self, tensors):
        started.append(self.kernel.__name__)
        start(self, tensors)

    monkeypatch.setattr(tuning, "_read_or_timed", take)
    monkeypatch.setattr(tuning, "_remembered", {})
    monkeypatch.setattr(plans, "_plans", {})
    monkeypatch.setattr(launch.Launch, "start", record)
    return started


ROW_KERNELS = {"_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel"}


@pytest.mark.parametrize("positioned", [None, 0, 20, 56])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_norm_linear(bias, positioned, dtype, chosen, device):
    """Of features without their CLS row, with positions for a part of the outputs."""
    shapes = [(2, 9, 24), (40, 24), (40,), (40,), (40,), (56, 40), (56,), (9, 40)]
    tensors = [random(*shape, dtype=dtype, device=device) for shape in shapes]
    tensors[0] = without_cls(tensors[0])
    if not bias:
        tensors[2] = tensors[4] = tensors[6] = None
    if positioned is None:
        del tensors[7]
    positions = {} if positioned is None else {"positioned": positioned}

    def op(x, weight, b, gain, shift, out_weight, out_bias, table=None, *, backend):
        options = positions | {"positions": table, "backend": backend}
        others = weight, b, gain, shift, 1e-5, out_weight, out_bias
        return ops.linear_norm_linear(x, *others, **options)

    def oracle(*tensors):
        return linear_norm_linear_oracle(*tensors, **positions, eps=1e-5)

    check_op(op, oracle, tensors)
    assert set(chosen) == ROW_KERNELS


@pytest.mark.parametrize("columns", [None, 0, 20, 40])
@pytest.mark.parametrize("shifted", [True, False])
@torch.no_grad()
def test_folded_linear(shifted, columns, dtype, chosen, device):
    shapes = [(2, 9, 24), (40, 24), (40,), (24, 24), (24,), (40,), (9, columns or 0)]
    x, weight, bias, factor, factor_bias, shift, table = (
        random(*shape, dtype=dtype, device=device) for shape in shapes
    )
    x, shift = without_cls(x), shift if shifted else None
    table = None if columns is None else table
    operands = x, weight, bias, factor.triu(), factor_bias, shift, table

    def run(operands, backend):
        return ops.folded_linear(*operands, eps=1e-5, backend=backend)

    exact = [t if t is None else t.double() for t in operands]
    wanted = run(operands, "torch")
    check_errors([run(operands, "triton")], [wanted], lambda: [run(exact, "torch")])
    # Before it is scaled the product may be larger than what fp16 holds.
    assert chosen == (["_linear_fwd_kernel"] * 2 if dtype == torch.float16 else [])


@torch.no_grad()
def test_a_product_that_fp16_holds_only_when_it_is_scaled(dtype, device):
    x = torch.full((1, 4, 16), 100.0, dtype=dtype, device=device)
    weight, bias = torch.full_like(x[0, :, :16], 100.0), torch.zeros_like(x[0, :, 0])
    factor = 100 * torch.eye(16, dtype=dtype, device=device)
    out = ops.folded_linear(x, weight, bias, factor, factor[0] * 0, eps=1e-5, backend="triton")
    # 16 * 100 * 100 = 160,000 times 1 / sqrt(16 * 10,000 ** 2).
    torch.testing.assert_close(out, torch.full_like(out, 4.0))


@pytest.mark.parametrize("operand", range(3), ids="qkv")
@pytest.mark.parametrize("layout", ["offset", "odd_rows"])
def test_attention_on_rows_that_are_not_aligned(layout, operand, dtype, chosen, device):
    """FlashAttention would read 16 bytes at a time where it must not."""
    tensors = attention_operands(2, 9, 21, 3, 16, dtype, device, packed=False)
    tensors[operand] = LAYOUTS[layout](tensors[operand])
    check_attention(tensors)
    assert "_cross_attention_fwd_kernel" in chosen


@pytest.mark.parametrize("shared", [True, False], ids=["shared q", "batched q"])
@pytest.mark.parametrize("masks", ["none", "additive", "padding", "image without keys"])
@torch.no_grad()
def test_attention_forward(masks, shared, dtype, chosen, device):
    tensors = attention_operands(2, 9, 21, 3, 16, dtype, device, shared=shared)
    given = {}
    if masks == "additive":
        given["attn_mask"] = torch.randn(9, 21, device=device)
        given["attn_mask"][4] = -torch.inf
    elif masks != "none":
        padding = torch.zeros(2, 21, dtype=torch.bool, device=device)
        padding[0, 15:] = True
        padding[1] = masks == "image without keys"
        given["key_padding_mask"] = padding
    q, kv = tensors
    got = ops.cross_attention(q, kv, **given, backend="triton")
    exact = ops.cross_attention(q.double(), kv.double(), **given, backend="torch")
    wanted = ops.cross_attention(q, kv, **given, backend="torch")
    check_errors([got], [wanted], lambda: [exact])
    assert got.is_contiguous()
    assert chosen == []


@pytest.mark.parametrize("shared", [True, False], ids=["shared q", "batched q"])
@pytest.mark.parametrize("width", [16, 12])
def test_attention_training(width, shared, dtype, chosen, device):
    """The backward's kernels take the statistics of PyTorch's FlashAttention, where it has them."""
    check_attention(attention_operands(2, 9, 21, 3, width, dtype, device, shared=shared))
    has = dtype != torch.float32 and width % 8 == 0
    assert ("_cross_attention_fwd_kernel" in chosen) == (not has)
