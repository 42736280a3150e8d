"""The shipped configurations compile for every architecture, without spills, onto tensor cores.

Compiling needs a process in which Triton does not interpret, so ``benchmarks.codegen`` is one.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import kernels_edges
import pytest

from benchmarks import codegen
from visproj.kernels import configs, registry
from visproj.ops.autograd import MAX_NORM_WIDTH

ROOT = Path(__file__).parents[2]


def run(*arguments, script=("-m", "benchmarks.codegen")):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *script, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def test_dimensions_of_one_compile():
    done = run(script=[kernels_edges.__file__])
    *failures, count = done.stdout.splitlines() or [done.stderr[-2000:]]
    assert failures == []
    assert count == f"{len(kernels_edges.launches())} launches tried"


def every_choice(arch, dtype):
    done = run("--arch", str(arch), "--dtype", dtype)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


class Choices:
    """Every choice of one architecture; each subclass is a unit of work for xdist."""

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", codegen.DTYPES)
    def test_every_choice(self, dtype):
        every_choice(self.arch, dtype)


class TestSM80(Choices):
    arch = 80


class TestSM86(Choices):
    arch = 86


class TestSM89(Choices):
    arch = 89


class TestSM90(Choices):
    arch = 90


class TestSM100(Choices):
    arch = 100


class TestSM120(Choices):
    arch = 120


def test_every_architecture_is_compiled():
    assert {found.arch for found in Choices.__subclasses__()} == set(codegen.LIMITS)


@pytest.mark.slow
class TestAMD:
    def test_gfx942_compiles(self):
        done = run("--amd")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("kernel", ["layer_norm_fwd", "layer_norm_bwd"])
def test_rows_of_every_width_class_are_compiled(kernel):
    """Each power of two; 128 columns, too few for wide loads, only with unaligned rows."""
    others = [sizes["outputs"] for sizes in codegen.REFERENCE[kernel].others]
    widths = [registry.Sizes().outputs, *others]
    aligned = {1 << (width - 1).bit_length() for width in widths if width % 16 == 0}
    unaligned = {1 << (width - 1).bit_length() for width in widths if width % 16}
    assert aligned == {256 << n for n in range((MAX_NORM_WIDTH // 256).bit_length())}
    assert {128, MAX_NORM_WIDTH} <= unaligned


SOUND = codegen.Row(
    kernel="linear",
    arch=90,
    dtype="bf16",
    precision="ieee",
    config="128x128x64/8w3s descriptors",
    first=True,
    width=0,
    registers=94,
    stack=0,
    shared=98304,
    tensor_memory=0,
    blocks=2,
    seconds=1.0,
    instructions={"UTMALDG": 6, "HGMMA": 4, "LDG": 16},
)
POINTERS = {
    "arch": 80,
    "config": "128x128x64/8w3s pointers",
    "instructions": {"LDGSTS": 24, "HMMA": 64},
}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"instructions": {**SOUND.instructions, "STL": 1}}, "spills"),
        ({"shared": 240_000}, "240000 bytes of shared memory above 232448"),
        ({"blocks": 0}, "no block fits an SM"),
        ({"tensor_memory": 768}, "768 columns of tensor memory above 512"),
        ({"instructions": {"UTMALDG": 6, "HMMA": 64}}, "64 HMMA instead of wgmma or tcgen05"),
        ({"instructions": {"UTMALDG": 6, "HGMMA": 8}}, "8 HGMMA instead of 4"),
        ({"instructions": {"UTMALDG": 1, "HGMMA": 4}}, "1 UTMALDG for 2 descriptors"),
        ({"instructions": {"UTMALDG": 6}}, "no matrix instruction"),
        ({"kernel": "linear_bwd_weight", "blocks": 1}, "1 block per SM instead of 2"),
        ({"arch": 100, "instructions": {"UTMALDG": 6, "UTCHMMA": 2}}, "2 UTCHMMA, fewer than 4"),
        ({**POINTERS, "instructions": {"HMMA": 64}}, "no LDGSTS"),
        ({**POINTERS, "instructions": {"LDGSTS": 24, "HMMA": 32}}, "32 HMMA, fewer than 64"),
        ({"dtype": "fp32"}, "tensor cores in an ieee product"),
        ({"kernel": "layer_norm_fwd", "config": ""}, "no 128-bit loads"),
    ],
)
def test_bars_can_fail(change, complaint):
    assert codegen.complaints(SOUND) == []
    assert codegen.complaints(dataclasses.replace(SOUND, **POINTERS)) == []
    assert complaint in codegen.complaints(dataclasses.replace(SOUND, **change))


@pytest.mark.parametrize(
    ("kernel", "config", "hgmma"),
    [
        ("cross_attention_fwd", "128x128/8w2s descriptors", 8 + 128 // 16),
        ("cross_attention_bwd_dkv", "64x128/8w2s descriptors", 24),
        ("cross_attention_bwd_dq", "128x64/8w2s descriptors", 20),
    ],
)
def test_exact_counts_of_attention(kernel, config, hgmma):
    row = dataclasses.replace(SOUND, kernel=kernel, config=config, width=128)
    exact = dataclasses.replace(row, instructions={"UTMALDG": 6, "HGMMA": hgmma})
    assert codegen.complaints(exact) == []
    fewer = dataclasses.replace(row, instructions={"UTMALDG": 6, "HGMMA": hgmma - 1})
    assert codegen.complaints(fewer) == [f"{hgmma - 1} HGMMA instead of {hgmma}"]


@pytest.mark.parametrize("kernel", configs.KERNELS)
@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_every_kernel_has_pointers_and_tiles_that_fit_masks(kernel, arch):
    """A mask is padded to a multiple of 128 keys, which every tile of keys has to divide."""
    for dtype in codegen.DTYPES.values():
        choices = configs.shipped(kernel, dtype, arch, "ieee")
        assert not all(config.descriptors for config in choices)
        assert arch >= 90 or not any(config.descriptors for config in choices)
        assert len(set(choices)) == len(choices)
        if "attention" in kernel:
            assert all(128 % config.blocks[1] == 0 for config in choices)
