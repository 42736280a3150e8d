"""Right results get a time, wrong ones do not."""

import pytest
import torch
from benchmarks_support import CPU, FixedCeilings, add, small_group
from torch import nn

from benchmarks import cases, suite
from benchmarks.check import checked_images, row_error
from benchmarks.peers import FairAttention


def measured(group):
    rows = [row for part in suite.measured(group, CPU, FixedCeilings(), seconds=0) for row in part]
    return {(row.implementation, row.mode): row for row in rows}


@pytest.mark.parametrize("task", cases.TASKS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_implementation_is_right(task, dtype):
    prepared = suite.prepare(small_group(task, dtype=dtype), CPU)
    for candidate in prepared.candidates:
        assert candidate.fit or candidate.left_out, (candidate.entry.name, candidate.verdict)
    fit = {candidate.entry.name for candidate in prepared.candidates if candidate.fit}
    assert {"fair", "visproj"} <= fit
    # Of the other two tasks upstream's arithmetic is the fair one.
    has_upstream = dtype == "fp32" and task in ("vit", "perceiver", "cross_attention")
    assert ("upstream" in fit) == has_upstream


class WrongOutput(nn.Sequential):
    """One row of one image is missing."""

    def forward(self, x):
        out = super().forward(x)
        keep = torch.ones(out.shape[:2])
        keep[-1, 7] = 0
        return out * keep[..., None]


class WrongGradient(nn.Sequential):
    """The output is right; the gradient of the Linear's bias is a hundredth too small."""

    def forward(self, x):
        linear, norm = self
        bias = 0.99 * linear.bias + 0.01 * linear.bias.detach()
        return norm(nn.functional.linear(x, linear.weight, bias))


class Raises(nn.Sequential):
    def forward(self, x):
        raise RuntimeError("no kernel for this shape")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (WrongOutput, "output error 1"),
        (WrongGradient, "gradient error of 0.bias 1"),
        (Raises, "RuntimeError: no kernel for this shape"),
    ],
)
def test_a_wrong_result_gets_no_time(monkeypatch, kind, why):
    build = cases.TASKS["linear_layer_norm"].reference
    add(monkeypatch, "linear_layer_norm", "wrong", lambda shape: kind(*build(shape)))
    rows = measured(small_group())
    for mode in cases.MODES:
        wrong, right = rows["wrong", mode], rows["visproj", mode]
        assert wrong.status == "failed"
        assert why in wrong.reason
        assert (wrong.time_us, wrong.vs_fair, wrong.peak_mib) == (None, None, None)
        assert right.status == "ok"
        assert right.time_us > 0
        assert right.samples >= 7


def test_a_call_that_cannot_be_prepared_does_not_stop_the_others(monkeypatch):
    honest = suite.Prepared.call

    def no_memory(self, candidate, mode):
        if candidate.entry.name == "visproj" and mode == "backward":
            raise MemoryError("graphs do not fit")
        return honest(self, candidate, mode)

    monkeypatch.setattr(suite.Prepared, "call", no_memory)
    rows = measured(small_group())
    assert rows["visproj", "backward"].reason == "MemoryError: graphs do not fit"
    assert rows["visproj", "backward"].time_us is None
    timed = {key for key, row in rows.items() if row.time_us}
    assert timed == {(n, m) for n in ("fair", "visproj") for m in cases.MODES} - {
        ("visproj", "backward")
    }


def test_a_new_implementation_is_one_entry(monkeypatch):
    add(monkeypatch, "cross_attention", "new", lambda s: FairAttention(256, s.heads, 128))
    rows = measured(small_group("cross_attention"))
    for mode in cases.MODES:
        assert rows["new", mode].vs_upstream > 0
        assert rows["new", mode].vs_fair_p20 <= rows["new", mode].vs_fair_p80


def test_folded_forms_have_a_forward_only():
    rows = measured(small_group("baseline"))
    assert {mode for name, mode in rows if name == "folded"} == {"forward"}
    folded = rows["folded", "forward"]
    assert folded.gradient_error is None
    # 2 x 65 x 256 x 128 multiply-adds.
    assert folded.model_gflop == pytest.approx(2 * 130 * 256 * 128 / 1e9)
    assert folded.model_launches == 2
    assert folded.share_of_model_floor == pytest.approx(folded.model_floor_us / folded.time_us)
    # The output alone is 2 x 65 x 128 floats of 4 bytes, the product before the norm as much.
    assert folded.peak_mib >= 2 * 2 * 65 * 128 * 4 / 2**20


def test_what_is_left_out_says_why(monkeypatch):
    monkeypatch.setattr(cases.shutil, "which", lambda name: None)
    group = small_group("perceiver", dtype="bf16", modes=("forward",))
    with_compiled = cases.Group(group.task, group.shape, group.modes, compiled=True)
    rows = measured(with_compiled)
    assert rows["upstream", "forward"].status == "left out"
    assert "16 bits on a CPU" in rows["upstream", "forward"].reason
    assert rows["fair compiled", "forward"].reason == "torch.compile needs a C++ compiler"
    rows = measured(small_group())
    assert rows["liger", "forward"].reason == "Liger's kernels need a GPU"


def test_checked_images():
    assert checked_images(8, 0, CPU) == list(range(8))
    # 3e10 multiply-adds in all: two and a half images of 8 at 1.2e10 each; the last is always in.
    assert checked_images(8, 2 * 8 * 12 * 10**9, CPU) == [0, 7]
    assert checked_images(32, 10**15, CPU) == [31]


def test_a_part_of_the_batch_is_enough_for_gradients(monkeypatch):
    """The output's gradient is zero for the images that are not compared."""
    monkeypatch.setitem(suite.checked_images.__globals__["BUDGET"], "cpu", 1)
    prepared = suite.prepare(small_group("perceiver", batch=3), CPU)
    assert prepared.truth.images == [2]
    assert all(candidate.fit for candidate in prepared.candidates)


def test_row_error():
    truth = torch.ones(4, 5)
    got = truth.clone()
    got[2] = 0
    assert row_error(got, truth) == 1.0
    assert row_error(truth + 1e-3, truth) == pytest.approx(1e-3, rel=1e-3)
    # A row of zeros is measured by the rms of the whole, sqrt(3 / 4).
    truth[2] = 0
    assert row_error(got + 1e-3, truth) == pytest.approx(1e-3 / 0.75**0.5, rel=1e-3)
    assert row_error(torch.full_like(truth, float("nan")), truth) == float("inf")
    assert row_error(got[:2], truth) == float("inf")


def test_sets_are_those_of_the_registry():
    smoke, full = cases.groups("smoke"), cases.groups("full")
    assert len({(group.task.name, group.shape) for group in full}) == len(full)
    # 6 encoders x 4 language widths x 3 batches x 3 dtypes x 6 tasks.
    assert len(full) == 6 * 4 * 3 * 3 * 6
    assert {group.task.name for group in smoke} == set(cases.TASKS)
    compiled = [group for group in smoke if group.compiled]
    assert [group.task.name for group in compiled] == ["perceiver"]
    assert {mode for group in smoke for mode in group.modes} == set(cases.MODES)
