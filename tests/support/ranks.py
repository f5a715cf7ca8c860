"""Processes that take part in collectives: started once, and handed functions to run on every rank.

A function that does not come back in time fails its test, and the processes are started anew for the next one.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

WORLD = 4
TO_START = 200.0  # seconds: importing torch in all of them takes long beside other work
AFTER_A_FAILURE = 5.0  # seconds in which the other ranks may say what they saw of it


def _serve(connection: Connection, rank: int, store: str) -> None:
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    gc.freeze()  # whoever collects finds a test's own objects, and not those of torch
    connection.send(rank)  # here
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
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = 60) -> list[Any]:
        """What a module's function returns on each rank.

        Raises:
            AssertionError: it raised on some rank, or took too long.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, arguments))
        answers: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + seconds
        while len(answers) < WORLD and time.monotonic() < end:
            waiting = [c for rank, c in enumerate(self._connections) if rank not in answers]
            for connection in wait(waiting, timeout=max(0.0, end - time.monotonic())):
                rank = self._connections.index(connection)
                try:
                    answers[rank] = connection.recv()
                except EOFError:
                    answers[rank] = (False, "the process has died")
                if not answers[rank][0]:
                    end = min(end, time.monotonic() + AFTER_A_FAILURE)
        failures = [f"rank {rank}: {text}" for rank, (good, text) in sorted(answers.items()) if not good]
        failures += [f"rank {rank} did not come back" for rank in range(WORLD) if rank not in answers]
        if failures:
            self.stop()  # the others may be anywhere
            raise AssertionError("\n".join(failures))
        return [answers[rank][1] for rank in range(WORLD)]

    def _start(self) -> None:
        # Forked from a process that has imported torch and done nothing else: four imports would take long.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint"])
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        store = str(Path(self._folder.name) / "store")
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, store), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)
        end = time.monotonic() + TO_START
        if not all(connection.poll(max(0.0, end - time.monotonic())) for connection in self._connections):
            self.stop()
            raise AssertionError(f"{WORLD} processes did not start within {TO_START:.0f} seconds")
        for connection in self._connections:
            connection.recv()

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
