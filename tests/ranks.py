"""Processes that take part in collectives: started once, and handed functions to run on every rank.

A function that does not come back in time fails its test, and the processes are started anew for the next one.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WORLD = 4


def _serve(connection: Connection, rank: int, store: str) -> None:
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            os._exit(0)  # without the farewells of a process group whose other ranks may be gone
        torch.manual_seed(0)
        try:
            connection.send((True, function(*arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


class Ranks:
    """`WORLD` processes in one gloo group."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = 60) -> list[Any]:
        """What a module's function returns on each rank.

        Raises:
            AssertionError: it raised on some rank, or took too long.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, arguments))
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(seconds):
                self.stop()
                raise AssertionError(f"rank {rank} did not come back within {seconds} s")
            answers.append(connection.recv())
        failures = [f"rank {rank}: {text}" for rank, (good, text) in enumerate(answers) if not good]
        if failures:
            self.stop()  # the others may be anywhere
        assert not failures, "\n".join(failures)
        return [value for _, value in answers]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = str(Path(tempfile.mkdtemp(prefix="ranks-")) / "store")
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, store), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
