"""Whatever happens to a worker, the test hears of it in seconds and no process stays."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from distributed.launch import WORLD, WorkerError

pytestmark = pytest.mark.distributed
HERE = "distributed.test_launch:"


def add_up(value):
    total = torch.tensor(float(value + dist.get_rank()))
    dist.all_reduce(total)
    return total.item()


def leave_word(directory):
    """Note this process and a child that would sleep on."""
    child = subprocess.Popen(["sleep", "600"])
    rank = dist.get_rank()
    (directory / str(rank)).write_text(f"{os.getpid()} {child.pid}")
    dist.barrier()
    return rank


def raise_in_one(directory):
    if leave_word(directory):
        raise ValueError("a worker's own words")
    dist.barrier()


def end_in_one(directory):
    if leave_word(directory):
        os._exit(3)
    dist.barrier()


def wait_for_nobody(directory):
    if leave_word(directory):
        time.sleep(600)
    dist.barrier()


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids):
    """A killed orphan is gone once init has been told, which is not at once."""
    deadline = time.monotonic() + 5
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def test_every_rank_answers(workers):
    assert workers.run(f"{HERE}add_up", 3) == [7.0, 7.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raise_in_one", "rank 1 raised:(.|\n)*ValueError: a worker's own words"),
        ("end_in_one", "rank 1 ended with exit code 3"),
        ("wait_for_nobody", "no answer from ranks .* in 3 s"),
    ],
)
def test_a_failure_is_told_and_leaves_nothing(function, message, workers, tmp_path):
    workers.run(f"{HERE}add_up", 0)
    start = time.monotonic()
    with pytest.raises(WorkerError, match=message):
        workers.run(f"{HERE}{function}", tmp_path, seconds=3)
    # Three seconds at most until the answer is missed, the rest for two busy cores.
    assert time.monotonic() - start < 10
    pids = [pid for rank in range(WORLD) for pid in noted(tmp_path, rank)]
    assert not wait_until_gone(pids)
    assert workers.run(f"{HERE}add_up", 0) == [1.0, 1.0], "new workers take their place"


def test_workers_end_with_the_process_that_started_them(tmp_path):
    script = """
import os, pathlib, sys
from distributed.launch import Workers

if __name__ == "__main__":
    directory = pathlib.Path(sys.argv[1])
    Workers(directory).run("distributed.test_launch:leave_word", directory)
    os._exit(0)
"""
    (tmp_path / "script.py").write_text(script)
    subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        timeout=60,
    )
    workers, children = zip(*(noted(tmp_path, rank) for rank in range(WORLD)), strict=True)
    for child in children:  # nobody is left to kill what workers started
        os.kill(child, signal.SIGKILL)
    assert not wait_until_gone(workers)


def noted(directory, rank):
    """Process ids of a worker and of its child."""
    return tuple(map(int, (directory / str(rank)).read_text().split()))
