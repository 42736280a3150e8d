"""Which configuration runs, with stand-ins for the GPU and for the clock."""

import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import triton

from visproj import ops
from visproj.kernels import configs, tuning
from visproj.kernels.launch import Config
from visproj.kernels.makespan import Tiles, product_tiles

SLOW, FAST = Config((64, 64), 4, 2), Config((128, 64), 8, 2, descriptors=True)
SECONDS = {SLOW: 2.0, FAST: 1.0, tuning.LIBRARY: 0.5}
LIKE = torch.empty(1, dtype=torch.bfloat16)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU on which FAST is faster; gives what was run and what was timed."""
    ran, timed = [], []

    def do_bench(run, **options):
        run()
        timed.append(ran.pop())
        return SECONDS[timed[-1]]

    monkeypatch.setenv("VISPROJ_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "INTERPRETING", False)
    monkeypatch.setattr(tuning, "architecture", lambda device: 90)
    forget(monkeypatch)
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU 80/GB")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return ran, timed


OPERAND = torch.empty(64, 64, dtype=torch.bfloat16)


def best(ran, rows=256, choices=(SLOW, FAST)):
    def prepare(config):
        return lambda: ran.append(config)

    config, _ = tuning.choose("kernel", (rows, 4096, True), choices, prepare, LIKE)
    return config


def forget(monkeypatch):
    """As another process would start."""
    monkeypatch.setattr(tuning, "_remembered", {})
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_files_read", set())


def test_the_fastest_is_timed_once_and_remembered(gpu, monkeypatch):
    ran, timed = gpu
    assert best(ran) == FAST
    assert timed == [SLOW, FAST]
    assert best(ran) == FAST
    assert best(ran, rows=200) == FAST  # the same power of two
    assert len(timed) == 2
    best(ran, rows=257)
    assert len(timed) == 4
    forget(monkeypatch)
    assert best(ran) == FAST
    assert len(timed) == 4


def test_the_file_names_triton_and_the_device(gpu, tmp_path):
    ran, _ = gpu
    best(ran)
    (file,) = tmp_path.iterdir()
    assert file.name == f"autotune-Some-GPU-80-GB-triton-{triton.__version__}.json"
    assert json.loads(file.read_text()) == {
        "kernel 90 torch.bfloat16 256 4096 True": "128x64/8w2s descriptors"
    }


KEY = b'"kernel 90 torch.bfloat16 256 4096 True"'


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe\x00{",
        b"[" * 100_000,
        *(b"{%s: %s}" % (KEY, value) for value in (b'"?"', b"1", b"null", b'["?"]', b'{"a": 1}')),
    ],
    ids=lambda stored: repr(stored[:60]),
)
def test_a_file_that_says_nothing_is_replaced(gpu, stored):
    ran, timed = gpu
    tuning.cache_file().write_bytes(stored)
    assert best(ran) == FAST
    assert timed == [SLOW, FAST]
    assert json.loads(tuning.cache_file().read_text()) == {json.loads(KEY): str(FAST)}


def test_what_other_processes_chose_is_kept(gpu):
    ran, _ = gpu
    tuning.cache_file().write_text('{"other": "x", "damaged": []}')
    best(ran, rows=16)
    # Another process writes while this one runs.
    tuning.cache_file().write_text('{"other": "x", "later": "y"}')
    best(ran)
    stored = json.loads(tuning.cache_file().read_text())
    assert stored == {"other": "x", "later": "y", json.loads(KEY): str(FAST)}


def no_folder(monkeypatch, tmp_path):
    pwd = pytest.importorskip("pwd", reason="only POSIX has users without an entry")

    def no_entry(uid):
        raise KeyError(uid)

    for variable in ("HOME", "XDG_CACHE_HOME", "VISPROJ_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    assert tuning.cache_file() is None


def below_a_file(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VISPROJ_CACHE_DIR", str(tmp_path / "file" / "below"))


def folder_is_a_file(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VISPROJ_CACHE_DIR", str(tmp_path / "file"))


def file_is_a_folder(monkeypatch, tmp_path):
    tuning.cache_file().mkdir(parents=True)


def disk_is_full(monkeypatch, tmp_path):
    def write_text(path, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_text)


@pytest.mark.parametrize(
    "trouble", [no_folder, below_a_file, folder_is_a_file, file_is_a_folder, disk_is_full]
)
def test_a_cache_that_cannot_be_had_is_no_error(gpu, monkeypatch, tmp_path, trouble):
    """It is timed once in this process, and nothing is left lying about."""
    ran, timed = gpu
    trouble(monkeypatch, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert best(ran) == FAST
    assert best(ran) == FAST
    assert timed == [SLOW, FAST]
    assert sorted(tmp_path.rglob("*")) == before


def test_threads_time_one_after_the_other(gpu, monkeypatch):
    """And the second finds what the first has chosen."""
    _, timed = gpu
    start, together = threading.Barrier(2), threading.Barrier(2)

    def do_bench(run, **options):
        run()
        try:
            together.wait(0.2)
        except threading.BrokenBarrierError:  # nobody else is timing
            return SECONDS[timed[-1]]
        raise AssertionError("two threads time at once")

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)

    def prepare(config):
        return lambda: timed.append(config)

    def work(_):
        start.wait(60)
        return tuning.choose("kernel", (256,), (SLOW, FAST), prepare, LIKE)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [(FAST, True)] * 2
    assert sorted(map(str, timed)) == sorted(map(str, [SLOW, FAST]))


@pytest.mark.parametrize("value", ["1", ""])
def test_switches_that_are_on(gpu, monkeypatch, value):
    ran, _ = gpu
    for variable in ("VISPROJ_AUTOTUNE", "VISPROJ_DESCRIPTORS"):
        monkeypatch.setenv(variable, value)
    assert best(ran) == FAST
    monkeypatch.setattr(configs, "architecture", lambda device: 90)
    assert configs.candidates("linear", [OPERAND], "ieee")[0].descriptors


@pytest.mark.parametrize("value", ["yes", "false", "2", "on", " 0"])
def test_switches_take_0_and_1_only(gpu, monkeypatch, value):
    """Also where the answer would not matter: a typing error should not wait for another GPU."""
    ran, _ = gpu
    for variable in ("VISPROJ_AUTOTUNE", "VISPROJ_DESCRIPTORS"):
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"VISPROJ_AUTOTUNE must be 0 or 1, got '{value}'"):
        best(ran, choices=(SLOW,))
    with pytest.raises(ValueError, match=f"VISPROJ_DESCRIPTORS must be 0 or 1, got '{value}'"):
        configs.candidates("linear", [OPERAND], "ieee")
    assert ran == []


@pytest.mark.parametrize("why", ["variable", "capturing", "distributed", "interpreter", "one"])
def test_nothing_is_timed(gpu, monkeypatch, why):
    ran, timed = gpu
    choices = (SLOW,) if why == "one" else (SLOW, FAST)
    if why == "variable":
        monkeypatch.setenv("VISPROJ_AUTOTUNE", "0")
    elif why == "capturing":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    elif why == "distributed":
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    elif why == "interpreter":
        monkeypatch.setattr(tuning, "INTERPRETING", True)
    assert best(ran, choices=choices) == SLOW
    assert timed == ran == []


@pytest.mark.parametrize(
    ("programs", "expected"),
    [
        (4, SLOW),  # of SLOW 4, of FAST 2 programs of twice the work: 4 processors
        (8, FAST),  # equally long: the first
        (12, SLOW),
    ],
)
def test_what_is_not_timed_follows_from_the_tiles(gpu, monkeypatch, programs, expected):
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 4)

    def tiles(config):
        return Tiles([config.blocks[0]] * (programs * 64 // config.blocks[0]))

    assert tuning.untimed((FAST, SLOW), tiles, LIKE.device) == expected
    monkeypatch.setenv("VISPROJ_AUTOTUNE", "0")
    assert tuning.choose("kernel", (1,), (FAST, SLOW), failing([]), LIKE, tiles) == (expected, True)


def test_large_tiles_are_preferred_where_there_are_many(monkeypatch):
    """They reach more of the peak, which outweighs a last round that is half empty."""
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 132)
    rules = configs.shipped("linear", torch.bfloat16, 90, "ieee")

    def best(rows):
        sizes = 1, rows, 4096, 4096
        found = tuning.untimed(rules, lambda c: product_tiles(*sizes, c.blocks), LIKE.device)
        return found.blocks[:2]

    assert [best(rows) for rows in (256, 512, 2048, 8192)] == [
        (64, 128),
        (128, 128),
        (128, 256),
        (128, 256),
    ]


@pytest.mark.parametrize("why", ["capturing", "distributed"])
def test_what_is_remembered_runs_where_nothing_is_timed(gpu, monkeypatch, why):
    ran, timed = gpu
    best(ran)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: why == "capturing")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: why == "distributed")
    assert best(ran) == FAST
    assert len(timed) == 2


@pytest.mark.parametrize("choices", [(SLOW, FAST), (SLOW,)], ids=["several", "one"])
def test_pytorch_is_timed_like_a_configuration(gpu, monkeypatch, choices):
    """And where nothing is timed, an earlier process's finding is taken."""
    ran, timed = gpu
    choices = *choices, tuning.LIBRARY
    assert best(ran, choices=choices) is tuning.LIBRARY
    assert timed == list(choices)
    assert list(json.loads(tuning.cache_file().read_text()).values()) == ["PyTorch"]
    forget(monkeypatch)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert best(ran, choices=choices) is tuning.LIBRARY
    assert best(ran) != tuning.LIBRARY  # where a launcher does not offer it
    assert len(timed) == len(choices)


@pytest.mark.parametrize("why", ["variable", "distributed", "memory"])
def test_untimed_it_is_a_kernel(gpu, no_memory_to_time, monkeypatch, why):
    """Also with a single configuration, and in the order in which they are given."""
    if why == "variable":
        monkeypatch.setenv("VISPROJ_AUTOTUNE", "0")
    elif why == "distributed":
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for choices in ((tuning.LIBRARY, SLOW), (SLOW, tuning.LIBRARY)):
        assert tuning.choose("kernel", (256,), choices, failing([]), LIKE).config == SLOW


def failing(bad, error=RuntimeError):
    def prepare(config):
        def run():
            if config in bad:
                raise error(f"failed with the configuration {config}")

        return run

    return prepare


@pytest.fixture
def timing(monkeypatch):
    def do_bench(run, **options):
        run()
        return 1.0

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)


def test_a_choice_that_fails_is_passed_over(gpu, timing, caplog):
    """With one warning, the first time only."""
    for _ in range(2):
        got = tuning.choose("kernel", (256,), (SLOW, FAST), failing([SLOW]), LIKE)
        assert got == (FAST, True)
    message = f"skipped {SLOW} for the kernel kernel: failed with the configuration {SLOW}"
    assert caplog.messages == [message]


def test_if_all_choices_fail_it_is_an_error(gpu, timing):
    with pytest.raises(RuntimeError, match="failed with the configuration 64x64/4w2s pointers"):
        tuning.choose("kernel", (256,), (SLOW, FAST), failing([SLOW, FAST]), LIKE)


def test_a_choice_that_runs_out_of_memory_is_passed_over(gpu, timing, caplog):
    """Once: what needs more than there is would do so in every call."""
    choices = (SLOW, FAST, tuning.LIBRARY)
    prepare = failing([SLOW, tuning.LIBRARY], torch.OutOfMemoryError)
    for _ in range(2):
        assert tuning.choose("kernel", (256,), choices, prepare, LIKE) == (FAST, True)
    assert [message.split(" for ")[0] for message in caplog.messages] == [
        f"skipped {SLOW}",
        "skipped PyTorch",
    ]
    # If none fits, nothing is remembered, and the call itself raises.
    prepare = failing([SLOW, FAST], torch.OutOfMemoryError)
    assert tuning.choose("other", (256,), (SLOW, FAST), prepare, LIKE) == (SLOW, False)


@pytest.fixture
def no_memory_to_time(monkeypatch):
    def do_bench(run, **options):
        raise torch.OutOfMemoryError("256 MB for the cache")

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)


def test_without_memory_to_time_the_first_choice_is_taken(gpu, no_memory_to_time, monkeypatch):
    """And nothing is remembered, so that a later call may time."""
    assert tuning.choose("kernel", (256,), (SLOW, FAST), failing([]), LIKE) == (SLOW, False)
    assert not tuning.cache_file().exists()
    monkeypatch.setattr(triton.testing, "do_bench", lambda run, **options: 1.0)
    assert tuning.choose("kernel", (256,), (SLOW, FAST), failing([]), LIKE).settled


def test_counts_of_tokens_are_rounded_up(monkeypatch, device):
    """Not every new count of keys or queries is timed: 33 to 64 are one."""
    from visproj.kernels import (
        cross_attention,
        cross_attention_backward,
        cross_attention_queries,
    )

    shapes = []

    def spy(kernel, shape, *others):
        shapes.append((kernel, triton.next_power_of_2(shape[0]), *shape[1:]))
        return tuning.choose(kernel, shape, *others)

    for module in (cross_attention, cross_attention_backward, cross_attention_queries):
        monkeypatch.setattr(module, "choose", spy)
    for queries, keys in ((33, 40), (64, 50)):
        q = torch.randn(queries, 2, 16, device=device, requires_grad=True)
        kv = torch.randn(1, keys, 2, 2, 16, device=device, requires_grad=True)
        ops.cross_attention(q, kv, backend="triton").sum().backward()
    assert len(shapes) == 6
    assert shapes[:3] == shapes[3:]
