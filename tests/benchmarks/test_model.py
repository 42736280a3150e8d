"""What the model counts against arithmetic done by hand, each multiply-add two FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import launches, peers
from benchmarks.cases import DTYPES, ENCODERS, IMPLEMENTATIONS, TASKS, Shape
from benchmarks.model import CPU_ATTENTION, Cost, Launch, costs, touched_bytes
from visproj import PerceiverProjector, fold, use_backend

B, C, D, L, Q = 3, 64, 256, 16, 256
HEADS = 2


def test_linear_and_layer_norm():
    module = peers.LigerLinearNorm(torch.nn.Linear(C, D), torch.nn.LayerNorm(D))
    module = torch.nn.Sequential(*module)
    found = costs(module, [torch.randn(B, L, C)])
    rows = B * L  # 48
    product = 2 * rows * C * D  # 1,572,864
    assert found["forward"].flops == product == 1_572_864
    # The features want no gradient, so only that of the weight is a product.
    assert found["backward"].flops == product
    assert found["forward+backward"].flops == 2 * product
    # addmm, native_layer_norm; native_layer_norm_backward, mm, sum for the bias.
    assert [len(found[mode].launches) for mode in found] == [2, 3, 5]
    features, weights, out = 4 * rows * C, 4 * (D * C + 3 * D), 4 * rows * D
    assert (features, weights, out) == (12_288, 68_608, 49_152)
    assert found["forward"].min_bytes == features + weights + out == 130_048
    assert found["backward"].min_bytes == features + 2 * weights + out == 198_656
    assert found["forward+backward"].min_bytes == features + 2 * weights + 2 * out == 247_808
    # Every operation reads and writes all of its own: the norm also mean and rstd, a float a row.
    product_bytes, norm_bytes = (launch.bytes for launch in found["forward"].launches)
    assert product_bytes == features + 4 * (D * C + D) + out
    assert norm_bytes == out + 4 * 2 * D + out + 4 * 2 * rows


def test_attention_in_bf16():
    width = D // HEADS
    module = peers.FairAttention(Q, HEADS, width).bfloat16()
    x = [torch.randn(B, L, HEADS, width).bfloat16() for _ in range(2)]
    found = costs(module, x, input_gradients=True)
    scores = 2 * B * Q * L * D  # as many FLOPs as either product of the forward: 6,291,456
    assert found["forward"].flops == 2 * scores == 12_582_912
    # Scores again, and the gradients of probabilities, values, queries and keys.
    assert found["backward"].flops == 5 * scores
    assert len(found["forward"].launches) == 1
    queries, keys, out = 2 * Q * D, 2 * B * L * D, 2 * B * Q * D
    assert found["forward"].min_bytes == queries + 2 * keys + out == 573_440
    assert found["backward"].min_bytes == 2 * queries + 4 * keys + out
    # Queries that the batch shares lie in memory once.
    (launch,) = found["forward"].launches
    logsumexp = 4 * B * Q * HEADS
    assert launch.bytes == queries + 2 * keys + out + logsumexp


def test_folded_and_upstream_perceiver():
    projector = PerceiverProjector(C, D, num_heads=HEADS, has_cls=False)
    upstream = peers.UpstreamPerceiver(C, D, HEADS, has_cls=False)
    x = [torch.randn(B, L, C)]
    folded = costs(fold(projector, grid=(4, 4)), x, trains=False)
    keys, queries = B * L, B * Q  # rows: 48 and 768
    attention = 2 * queries * L * D
    # Statistics C to C, keys and values C to 2 D, then the output projection and the last Linear.
    by_hand = keys * C * C + keys * C * 2 * D + attention + 2 * queries * D * D
    assert by_hand == 108_724_224
    assert folded["forward"].flops == 2 * by_hand
    assert set(folded) == {"forward"}
    # kv_proj, keys and values from it, queries for every image, output projection, last Linear.
    by_hand = keys * C * D + 2 * keys * D * D + attention + 3 * queries * D * D
    assert costs(upstream, x, trains=False)["forward"].flops == 2 * by_hand


EAGER = [entry for entry in IMPLEMENTATIONS if not entry.compiled and entry.name != "liger"]


@pytest.mark.parametrize("entry", EAGER, ids=lambda entry: f"{entry.task}-{entry.name}")
def test_flops_are_those_of_torch(entry):
    shape = Shape(ENCODERS["tiny"], 256, 2, "fp32")
    module = entry.build(shape)
    module = entry.convert(module, shape) if entry.convert else module
    x = [torch.randn(size) for size in TASKS[entry.task].inputs(shape)]
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter, torch.no_grad():
        module(*x)
    assert costs(module, x, trains=False)["forward"].flops == counter.get_total_flops() > 0


def test_module_and_inputs_are_left_alone():
    module = peers.FairPerceiver(32, 128, 1, has_cls=False)
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    x = torch.randn(1, 16, 32, dtype=DTYPES["fp32"])
    costs(module, [x], input_gradients=True)
    assert not x.requires_grad
    assert all(weight.grad is None for weight in module.parameters())
    for name, weight in module.state_dict().items():
        assert type(weight) is torch.Tensor
        assert torch.equal(weight, before[name])
    assert torch.isfinite(module(x)).all()


def test_counting_tunes_nothing(monkeypatch):
    """On a GPU it would time launches that are only written down, and remember the choice."""
    from visproj.kernels import tuning

    def timed(*_):
        raise RuntimeError("a kernel was timed")

    monkeypatch.setattr(tuning, "_read_or_timed", timed)
    folded = fold(PerceiverProjector(32, 128).bfloat16())
    x = torch.randn(1, 257, 32).bfloat16()
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match="a kernel was timed"):
            folded(x)
        assert len(costs(folded, [x], trains=False)["forward"].launches) == 5


def test_no_call_is_faster_than_its_floor():
    product = Launch("aten.mm", 790_000_000_000, 3)
    cost = Cost((product,), 1_000_000)
    assert cost.floor_seconds(1e12, 1e9) == pytest.approx(0.79)
    assert cost.floor_seconds(1e15, 1e9) == pytest.approx(1e-3)


def test_touched_bytes():
    assert touched_bytes(torch.zeros(3, 5)) == 60
    assert touched_bytes(torch.zeros(5).expand(3, 5)) == 20
    assert touched_bytes(torch.zeros(0, 5)) == 0
    assert touched_bytes(torch.zeros(0, 1).expand(0, 5)) == 0


@pytest.mark.parametrize("batch", [8, 40])
def test_launches_of_the_fused_perceiver(batch):
    found = launches.count(batch)
    upstream, fused = found["upstream eager"], found["visproj, Triton"]
    forward = fused["forward"].launches
    assert sum(launch.weights_only for launch in forward) == 4
    assert len(forward) == 11
    names = [launch.name for launch in forward]
    assert names.count("_cross_attention_fwd_kernel") == 1
    # Keys and values are one product: C to D, then D to 2 D.
    products = [launch.flops for launch in forward if launch.name == "_linear_fwd_kernel"]
    rows = batch * launches.TOKENS
    assert products[:2] == [2 * rows * 1024 * 4096, 2 * rows * 4096 * 8192]
    for mode in ("forward", "backward"):
        assert fused[mode].flops < upstream[mode].flops
        moved = [sum(launch.bytes for launch in cost[mode].launches) for cost in (fused, upstream)]
        assert moved[0] < 0.7 * moved[1]
