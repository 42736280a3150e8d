"""Two processes joined by gloo that run functions side by side, and that never stay behind."""

import multiprocessing
import os
import pickle
import pkgutil
import signal
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

WORLD = 2
SECONDS = 120  # for one call; two processes that import torch share two busy cores
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "TRITON_INTERPRET": "1",
    "WORLD_SIZE": str(WORLD),
}


class WorkerError(AssertionError):
    """A worker raised, ended or did not answer."""


class Workers:
    """Processes that are started by the first call and killed by the first failure.

    Every worker leads a process group of its own, so that what it starts ends with it. They meet
    in a file, not at a port.

    Args:
        directory: Where the file and DeepSpeed's extension go.
    """

    def __init__(self, directory):
        self._directory = directory
        self._processes, self._pipes = [], []

    def run(self, name, *args, seconds=SECONDS):
        """What the function ``name``, as ``"module:function"``, returned in each rank.

        Raises:
            WorkerError: With the worker's traceback. No worker is left then.
        """
        try:
            if not self._processes:
                self._start()
                self._answers(SECONDS)
            for pipe in self._pipes:
                pipe.send_bytes(pickle.dumps((name, args)))
            return self._answers(seconds)
        except BaseException:
            self.kill()
            raise

    def kill(self):
        """End the workers and what they started."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # one that does not lead its group yet
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        for lock in self._directory.glob("extensions/**/lock"):  # of a build that was cut short
            lock.unlink()

    def _start(self):
        context = multiprocessing.get_context("spawn")
        meeting_point = self._directory / f"meeting-{time.monotonic_ns()}"
        for rank in range(WORLD):
            mine, theirs = context.Pipe()
            environment = {
                **ENVIRONMENT,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "TORCH_EXTENSIONS_DIR": str(self._directory / "extensions"),
            }
            arguments = (rank, theirs, meeting_point, environment)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that the end of the worker is the end of the pipe
            self._processes.append(process)
            self._pipes.append(mine)

    def _answers(self, seconds):
        """What every rank answers, or all that they say within a second of the first error."""
        deadline = time.monotonic() + seconds
        answers, errors = {}, []
        while waiting := [rank for rank in range(WORLD) if rank not in answers]:
            left = max(0.0, deadline - time.monotonic())
            ready = wait([self._pipes[rank] for rank in waiting], left)
            if not ready:
                break
            for rank in map(self._pipes.index, ready):
                answers[rank], error = self._receive(rank)
                if error is not None:
                    errors.append(f"rank {rank} {error}")
                    deadline = min(deadline, time.monotonic() + 1)
        if waiting and not errors:
            errors.append(f"no answer from ranks {waiting} in {seconds} s")
        if errors:
            raise WorkerError("\n".join(errors))
        return [answers[rank] for rank in range(WORLD)]

    def _receive(self, rank):
        try:
            return pickle.loads(self._pipes[rank].recv_bytes())
        except EOFError:
            self._processes[rank].join(5)
            return None, f"ended with exit code {self._processes[rank].exitcode}"


def _serve(rank, pipe, meeting_point, environment):
    """Join the other ranks, then run what comes through the pipe until it ends or one raises."""
    os.setsid()
    os.environ.update(environment)
    torch.set_num_threads(1)
    answer = None
    with suppress(BrokenPipeError):
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{meeting_point}",
                rank=rank,
                world_size=WORLD,
                timeout=timedelta(seconds=SECONDS),
            )
            while True:
                pipe.send_bytes(pickle.dumps((answer, None)))
                name, args = pickle.loads(pipe.recv_bytes())
                answer = pkgutil.resolve_name(name)(*args)
        except BaseException:
            pipe.send_bytes(pickle.dumps((None, f"raised:\n{traceback.format_exc()}")))
