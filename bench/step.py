"""Times optimizer steps, ours and torch's in turn, so that a machine that drifts drifts for both."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import torch

import fused_optim

from .cases import Case

PEER = "torch.optim.AdamW(fused=True)"


def seconds_of(step: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def time_case(case: Case, rounds: int) -> dict[str, Any]:
    """The medians of both optimizers' step times, and the median and quartiles of the ratio pair by pair."""
    ours = fused_optim.AdamW(case.param_groups())
    peer = torch.optim.AdamW(case.param_groups(), fused=True)
    # Blocks of steps, as timeit makes them: the figure is the step's own cost, not that of the caches between.
    repeats = max(1, 320_000 // (case.groups * case.tensors * case.numel))
    torch.set_default_device(case.default_device)
    try:
        for optimizer in (ours, peer):
            seconds_of(optimizer.step, 3)
        pairs = [(seconds_of(ours.step, repeats), seconds_of(peer.step, repeats)) for _ in range(rounds)]
    finally:
        torch.set_default_device(None)
    ratios = [theirs / mine for mine, theirs in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "case": case.name,
        "backend": ours.backend,
        "ours_us": statistics.median(mine for mine, _ in pairs) * 1e6,
        "peer_us": statistics.median(theirs for _, theirs in pairs) * 1e6,
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "rounds": rounds,
    }


def machine() -> dict[str, Any]:
    """What a reader must know to place the figures."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cpu = "unknown"
    try:
        with open("/proc/cpuinfo") as info:
            cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), cpu)
    except OSError:
        pass
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_optim": fused_optim.__version__,
        "peer": PEER,
    }
