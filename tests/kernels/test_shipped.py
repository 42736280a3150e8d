"""The shipped configurations, each at shapes that fill more than one of its tiles."""

import pytest
import torch
from kernels_support import (
    DTYPES,
    attention_operands,
    cases,
    check_attention,
    check_op,
    linear_norm_linear_oracle,
    random,
)

from visproj import ops

configs = pytest.importorskip("visproj.kernels.configs", reason="kernels need triton")
kernels = pytest.importorskip("visproj.kernels.device", reason="kernels need triton")
layout = pytest.importorskip("visproj.kernels.layout", reason="kernels need triton")

pytestmark = pytest.mark.usefixtures("unwritten")


def chain(dtype, device):
    shapes = (2, 130, 72), (136, 72), (136,), (136,), (136,), (264, 136), (264,), (130, 136)
    tensors = [random(*shape, dtype=dtype, device=device) for shape in shapes]
    tensors[1] *= 72**-0.5
    tensors[5] *= 136**-0.5

    def op(*tensors, backend):
        *first, out_weight, out_bias, positions = tensors
        return ops.linear_norm_linear(
            *first,
            1e-12,
            out_weight,
            out_bias,
            positions=positions,
            positioned=132,
            backend=backend,
        )

    check_op(op, lambda *t: linear_norm_linear_oracle(*t, 132), tensors)


def attention(width, masked):
    def check(dtype, device):
        mask = torch.randn(130, 140).masked_fill(torch.rand(130, 140) < 0.3, -torch.inf)
        tensors = attention_operands(2, 130, 140, 1, width, dtype, device)
        check_attention(tensors, mask.to(device) if masked else None)

    return check


CHECKS = {
    "chain": chain,
    "attention": attention(104, False),
    "attention-masked": attention(128, True),
    "attention-wide": attention(144, False),
    "attention-masked-wide": attention(144, True),
}

# What each check launches.
KERNELS = {
    "chain": ["linear", "linear_table", "linear_bwd_weight"],
    **{
        name: [
            f"cross_attention_{part}{name.removeprefix('attention').replace('-', '_')}"
            for part in ("fwd", "bwd_dkv", "bwd_dq")
        ]
        for name in CHECKS
        if name != "chain"
    },
}


def turns(name, dtype, arch):
    return max(len(configs.shipped(k, DTYPES[dtype], arch, "ieee")) for k in KERNELS[name])


# On a GPU only what is shipped for it: others may ask for memory that it does not have.
GPU = torch.device("cuda", 0)
HERE = (configs.nearest(kernels.architecture(GPU)),) if torch.cuda.is_available() else None
FIRST = [(name, arch, 0, "bf16") for name in CHECKS for arch in HERE or (80, 90)]
REST = [
    (name, arch, turn, dtype)
    for name in CHECKS
    for dtype, architectures in (("bf16", (80, 86, 90, 100, 120)), ("fp16", (90,)), ("fp32", (80,)))
    for arch in HERE or architectures
    for turn in range(turns(name, dtype, arch))
    if (name, arch, turn, dtype) not in FIRST
]


@pytest.mark.parametrize(("check", "arch", "turn", "dtype"), cases(FIRST, REST))
def test_every_candidate(check, arch, turn, dtype, monkeypatch, device):
    """A kernel with fewer candidates than others takes its last one again."""
    styles = set()

    def one(kernel, operands, precision):
        descriptors = layout.describable(*operands)
        found = configs.shipped(kernel, operands[0].dtype, arch, precision)
        found = [c for c in found if descriptors >= c.descriptors]
        chosen = found[min(turn, len(found) - 1)]
        styles.add(chosen.descriptors)
        return (chosen,)

    monkeypatch.setattr(configs, "candidates", one)
    CHECKS[check](DTYPES[dtype], device)
    assert styles


@pytest.mark.parametrize("kernel", configs.KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_operands_and_the_variable_leave_pointers(kernel, dtype, monkeypatch):
    monkeypatch.setattr(configs, "architecture", lambda device: 90)
    aligned = torch.empty(16, 16, dtype=DTYPES[dtype])
    every = configs.candidates(kernel, [aligned, None], "ieee")
    unaligned = configs.candidates(kernel, [aligned, aligned[:, 1:]], "ieee")
    assert unaligned
    assert not any(config.descriptors for config in unaligned)
    assert {config.descriptors for config in every} == {dtype != "fp32", False}
    monkeypatch.setenv("VISPROJ_DESCRIPTORS", "0")
    assert configs.candidates(kernel, [aligned], "ieee") == unaligned


@pytest.mark.parametrize(
    ("arch", "taken"),
    [(75, 80), (80, 80), (87, 86), (90, 90), (103, 100), (121, 120), (130, 120), ("gfx942", 86)],
)
def test_an_unknown_architecture_takes_the_nearest_older_one(arch, taken):
    assert configs.nearest(arch) == taken
