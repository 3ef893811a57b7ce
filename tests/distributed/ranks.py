"""Processes that run one function together, joined by gloo."""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 120


@functools.cache
def both_ranks() -> Any:
    """The mesh of two ranks, one object for every test: docs/distributed.md, Limits."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2,))


def _serve(rank: int, size: int, store: str, calls: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while (call := calls.recv()) is not None:
        function, args = call
        torch.manual_seed(20240917)
        try:
            calls.send((True, function(*args)))
        except BaseException:
            calls.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """`size` processes that stay for many calls: starting one costs seconds.

    They meet through a file, so that no port can be taken. When one does not answer all are ended, and the
    next call starts new ones.
    """

    def __init__(self, size: int, directory: Path) -> None:
        self.size = size
        self.directory = directory
        self._members: list[tuple[Any, Any]] = []
        self._started = 0

    def _start(self) -> None:
        context = mp.get_context("spawn")
        store = str(self.directory / f"store-{os.getpid()}-{self._started}")
        self._started += 1
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, store, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._members.append((process, ours))

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)`, a function of a module, returns on every rank."""
        if not self._members:
            self._start()
        for _, calls in self._members:
            calls.send((function, args))
        results, failures = [], []
        for rank, (_, calls) in enumerate(self._members):
            # A rank may wait for ever for one that has failed.
            patience = 5 if failures else TIMEOUT_S
            try:
                done, result = calls.recv() if calls.poll(patience) else (None, "no answer")
            except EOFError:
                done, result = None, "the process ended"
            results.append(result)
            if not done:
                failures.append((rank, done, result))
        if any(done is None for _, done, _ in failures):
            self._end()
        if failures:
            raise AssertionError("\n".join(f"rank {rank}: {why}" for rank, _, why in failures))
        return results

    def _end(self) -> None:
        for process, _ in self._members:
            process.kill()
            process.join()
        self._members = []

    def close(self) -> None:
        for _, calls in self._members:
            calls.send(None)
        for process, _ in self._members:
            process.join(10)
        self._end()
