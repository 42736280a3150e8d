"""What only a GPU can show: graphs, streams, other devices, many repeats, tensors of many GB."""

import copy
import gc
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import make, rms_error
from kernels_support import DTYPES, evaluate, random

import visproj
from visproj import ops

pytest.importorskip("triton", reason="kernels need triton")

pytestmark = [
    pytest.mark.gpu,
    # Where a product is the first thing that autograd's thread does on the device.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
]

WIDTH = 256


@pytest.fixture(autouse=True)
def one_configuration(monkeypatch):
    """Bit-equality is promised for a given configuration."""
    monkeypatch.setenv("VISPROJ_AUTOTUNE", "0")


def perceiver(dtype, device):
    return make("perceiver", WIDTH, dtype, device, num_heads=2, query_grid=(8, 8))


def images(batch, dtype, device):
    return random(batch, 197, 32, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_device_runs_the_kernels_by_itself(dtype, device):
    assert ops.runs_triton(images(1, DTYPES[dtype], device))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("autotune", ["0", "1"])
def test_graph_capture(dtype, autotune, device, monkeypatch, tmp_path):
    """With and without autotuning, which must leave a captured stream alone."""
    monkeypatch.setenv("VISPROJ_AUTOTUNE", autotune)
    monkeypatch.setenv("VISPROJ_CACHE_DIR", str(tmp_path))
    projector, x = perceiver(DTYPES[dtype], device), images(3, DTYPES[dtype], device)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles the kernels and loads the libraries
            projector(x, grid=(14, 14))
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = projector(x, grid=(14, 14))
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            out.zero_()
            graph.replay()
            assert torch.equal(out, projector(x, grid=(14, 14)))


@pytest.mark.parametrize("kind", ["baseline", "vit", "perceiver"])
def test_folded_and_graphed(kind, device):
    """A recorded folded projector gives what it gives launched kernel by kernel."""
    if kind == "perceiver":
        projector, call = perceiver(torch.bfloat16, device), {"grid": (14, 14)}
    else:
        projector, call = make(kind, WIDTH, torch.bfloat16, device), {}
    folded = visproj.fold(projector, **call)
    # Nothing but the graph knows this copy, and what takes its place in memory is not read.
    replay = visproj.graphed(copy.deepcopy(folded), images(3, torch.bfloat16, device), **call)
    gc.collect()
    filler = [torch.full_like(t, torch.nan) for t in folded.state_dict().values()]
    for _ in range(3):
        x = torch.randn_like(images(3, torch.bfloat16, device))
        with torch.no_grad():
            assert torch.equal(replay(x), folded(x, **call))
    assert all(t.isnan().all() for t in filler)
    with pytest.raises(ValueError, match="the graph was recorded for"):
        replay(x[:2])


def test_two_streams(device):
    """Each stream has its own work; neither waits for the default one by itself."""
    projector = perceiver(torch.bfloat16, device)
    inputs = [images(4, torch.bfloat16, device) for _ in range(2)]
    with torch.no_grad():
        wanted = [projector(x, grid=(14, 14)) for x in inputs]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(2)]
        got = [[], []]
        for _ in range(50):
            for stream, x, results in zip(streams, inputs, got, strict=True):
                with torch.cuda.stream(stream):
                    results.append(projector(x, grid=(14, 14)))
        torch.cuda.synchronize()
    for results, one in zip(got, wanted, strict=True):
        assert all(torch.equal(result, one) for result in results)


def test_a_thousand_repeats_are_bit_equal(device):
    """Forward and backward: a race between programs shows now and then only."""
    projector, x = perceiver(torch.bfloat16, device), images(5, torch.bfloat16, device)
    x.requires_grad_()
    leaves = [x, *(p for p in projector.parameters() if p.requires_grad)]
    upstream = random(5, 64, WIDTH, dtype=torch.bfloat16, device=device)

    def run():
        out = projector(x, grid=(14, 14))
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    first = run()
    differing = torch.zeros((), dtype=torch.long, device=device)
    for _ in range(1000):
        for a, b in zip(first, run(), strict=True):
            differing += (a != b).sum()
    assert all(t.isfinite().all() for t in first)
    assert differing.item() == 0


def test_no_synchronisation(device):
    """Neither direction waits for the device."""
    projector, x = perceiver(torch.bfloat16, device), images(2, torch.bfloat16, device)
    for _ in range(2):
        out = projector(x, grid=(14, 14))
        out.sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            projector(x, grid=(14, 14)).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_another_device(device):
    """Tensors decide where the kernels run, not the current device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    projector, x = perceiver(torch.bfloat16, device), images(2, torch.bfloat16, device)
    upstream = random(2, 64, WIDTH, dtype=torch.bfloat16, device=device)
    wanted = evaluate(lambda x: projector(x, grid=(14, 14)), [x], upstream)
    there = torch.device("cuda:1")
    projector.to(there)
    got = evaluate(lambda x: projector(x, grid=(14, 14)), [x.to(there)], upstream.to(there))
    assert torch.cuda.current_device() == 0
    for one, other in zip(wanted, got, strict=True):
        assert other.device == there
        assert rms_error(other.cpu(), one.cpu()) < 0.01  # devices may differ in kind


def test_nothing_allocated_like_the_probabilities(device):
    """Queries times keys times heads would take 268 MB here."""
    q = random(1024, 8, 64, dtype=torch.bfloat16, device=device)
    kv = random(1, 16384, 2, 8, 64, dtype=torch.bfloat16, device=device)
    tensors = [q.requires_grad_(), kv.requires_grad_()]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.cross_attention(*tensors).square().sum().backward()
    # Output, its square and their gradients, statistics and the gradients of the inputs: 75 MB.
    assert torch.cuda.max_memory_allocated() - before < 2**27


def _needs(gigabytes):
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of memory, {free / 2**30:.0f} are free")


def test_linear_beyond_int32(device):
    """Rows and results beyond 2**31 elements, the last of them looked at."""
    _needs(20)
    from visproj.kernels.linear import linear_fwd

    rows, width = 2**31 // 512 + 4099, 512
    x = torch.zeros(1, rows, 64, dtype=torch.bfloat16, device=device)
    x[:, -300:] = random(300, 64, dtype=torch.bfloat16, device=device)
    weight = random(width, 64, dtype=torch.bfloat16, device=device)
    out = linear_fwd(x, weight)
    assert out.numel() > 2**31
    assert rms_error(out[0, -300:], x[0, -300:].double() @ weight.double().T) < 0.005
    assert not out[0, : rows - 300 : 1009].any()


def test_layer_norm_beyond_int32(device):
    _needs(30)
    from visproj.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd

    rows, width = 2**31 // 1024 + 4099, 1024
    x = torch.randn(rows, width, dtype=torch.bfloat16, device=device)
    gain = random(width, dtype=torch.bfloat16, device=device)
    tail = slice(rows - 50, rows)
    options = {"out_dtype": x.dtype, "in_place": False, "statistics": True}
    wanted = layer_norm_fwd(x[tail].clone(), gain, None, 1e-5, **options)
    out, mean, rstd = layer_norm_fwd(x, gain, None, 1e-5, **options)
    assert torch.equal(out[tail], wanted[0])
    wanted = layer_norm_bwd(out[tail].clone(), x[tail].clone(), mean[tail], rstd[tail], gain)[0]
    assert torch.equal(layer_norm_bwd(out, x, mean, rstd, gain)[0][tail], wanted)


def test_attention_beyond_int32(device):
    """Keys and values beyond 2**31 elements, forward and backward: the last image is its own."""
    _needs(60)
    batch, keys, heads, width = 65, 32768, 8, 64
    kv = torch.randn(batch, keys, 2, heads, width, dtype=torch.bfloat16, device=device)
    assert kv.numel() > 2**31
    q = random(16, heads, width, dtype=torch.bfloat16, device=device)
    upstream = random(batch, 16, heads, width, dtype=torch.bfloat16, device=device)
    out, _, dkv = evaluate(ops.cross_attention, [q, kv], upstream)
    alone, _, alone_dkv = evaluate(ops.cross_attention, [q, kv[-1:].clone()], upstream[-1:])
    assert torch.equal(out[-1:], alone)
    assert torch.equal(dkv[-1:], alone_dkv)


def test_choices_are_timed_once_and_kept(device, monkeypatch, tmp_path):
    """A second process finds the choices of the first and times nothing."""
    import triton

    from visproj.kernels import tuning

    def forget():
        monkeypatch.setattr(tuning, "_remembered", {})
        monkeypatch.setattr(tuning, "_chosen", {})
        monkeypatch.setattr(tuning, "_files_read", set())

    monkeypatch.setenv("VISPROJ_AUTOTUNE", "1")
    monkeypatch.setenv("VISPROJ_CACHE_DIR", str(tmp_path))
    forget()
    timed = []
    bench = triton.testing.do_bench
    monkeypatch.setattr(
        triton.testing, "do_bench", lambda *args, **kw: timed.append(1) or bench(*args, **kw)
    )
    projector, x = perceiver(torch.bfloat16, device), images(2, torch.bfloat16, device)
    out = projector(x, grid=(14, 14))
    assert timed, "more than one candidate must be there to choose from"
    assert json.loads(tuning.cache_file().read_text())
    timed.clear()
    assert torch.equal(projector(x, grid=(14, 14)), out)
    forget()
    assert torch.equal(projector(x, grid=(14, 14)), out)
    assert not timed


def test_fp32_on_the_device_is_not_tf32(device):
    """As shipped, with whatever instruction the compiler takes for it."""
    shapes = (64, 2, 64), (2, 99, 2, 2, 64)
    q, kv = (random(*shape, dtype=torch.float32, device=device) for shape in shapes)
    with visproj.use_backend("torch"):
        wanted = ops.cross_attention(q.double(), kv.double())
    assert rms_error(ops.cross_attention(q, kv), wanted) < 2e-6


def test_memory_checker_finds_nothing(device):
    """compute-sanitizer, where CUDA's toolkit is installed, over one forward and backward."""
    from shutil import which

    if which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed (it comes with CUDA's toolkit)")
    source = (
        "import torch, visproj\n"
        "p = visproj.PerceiverProjector(32, 128, query_grid=(5, 5)).cuda().bfloat16()\n"
        "x = torch.randn(2, 31, 32, device='cuda', dtype=torch.bfloat16)\n"
        "p(x, grid=(5, 6)).square().sum().backward()\n"
        "torch.cuda.synchronize()\n"
    )
    program = (sys.executable, "-c", source)
    for tool in ("memcheck", "racecheck"):
        done = subprocess.run(
            [*f"compute-sanitizer --tool {tool} --error-exitcode 9".split(), *program],
            env=os.environ | {"VISPROJ_AUTOTUNE": "0", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            capture_output=True,
            text=True,
            timeout=1800,
        )
        if tool == "racecheck":  # which sees hazards in what TMA copies, where there are none
            print(done.stdout[-3000:])
            continue
        assert done.returncode == 0, f"{tool}: {done.stdout[-3000:]}"
