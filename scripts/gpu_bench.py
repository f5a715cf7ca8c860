"""A short benchmark of the CUDA backend: each case beside torch's fused optimizer and the copy bandwidth of this GPU.

Ours and torch's steps are interleaved and timed with CUDA events; the second-level cache is flushed before each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from fused_optim import AdamW, ClipGradByGlobalNorm

Shapes = list[tuple[int, ...]]


def vit_b16() -> Shapes:
    block = [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (768,), (768,)]
    block += [(3072, 768), (3072,), (768, 3072), (768,)]
    return [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,), *block * 12, (768,), (768,), (1000, 768), (1000,)]


def large() -> Shapes:
    layer = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008), (4096,), (4096,)]
    return [*layer * 5, (4096,)]


# name: shapes, groups, dtype, our options, bytes an element, clip
CASES: dict[str, tuple[Shapes, int, torch.dtype, dict[str, Any], int, bool]] = {
    "1 G float32": (large(), 1, torch.float32, {}, 28, False),
    "1 G bfloat16, float32 moments": (large(), 1, torch.bfloat16, {"state_dtype": torch.float32}, 22, False),
    "1 G float32, global clip": (large(), 1, torch.float32, {"grad_clip": ClipGradByGlobalNorm(1.0)}, 32, True),
    "ViT-B/16 in 29 groups": (vit_b16(), 29, torch.float32, {}, 28, False),
    "465 groups of one tensor": ([(256, 256)] * 465, 465, torch.float32, {}, 28, False),
}


def make(shapes: Shapes, groups: int, dtype: torch.dtype) -> tuple[list[Parameter], list[dict[str, Any]]]:
    params = [Parameter(torch.randn(shape, device="cuda").to(dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params, [{"params": params[i::groups], "lr": 1e-4 * (i + 1)} for i in range(groups)]


def milliseconds(step: Callable[[], object], flush: torch.Tensor) -> tuple[float, float, float]:
    """On the device, on the host, and until the device is done."""
    flush.zero_()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin = time.perf_counter()
    start.record()
    step()
    end.record()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    return start.elapsed_time(end), host * 1e3, (time.perf_counter() - begin) * 1e3


def copy_bandwidth(flush: torch.Tensor, rounds: int) -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source), flush)[0] for _ in range(rounds)]
    return 2 * source.numel() / statistics.median(times) / 1e6


def measure(name: str, rounds: int, flush: torch.Tensor) -> dict[str, Any]:
    shapes, groups, dtype, options, bytes_per_element, clips = CASES[name]
    params, ours_groups = make(shapes, groups, dtype)
    ours = AdamW(ours_groups, backend="cuda", **options)
    peer_params, peer_groups = make(shapes, groups, dtype)
    peer = torch.optim.AdamW(peer_groups, fused=True)

    def peer_step() -> None:
        if clips:
            torch.nn.utils.clip_grad_norm_(peer_params, 1.0, foreach=True)
        peer.step()

    for _ in range(3):
        ours.step()
        peer_step()
    mine, theirs = [], []
    for _ in range(rounds):
        mine.append(milliseconds(ours.step, flush))
        theirs.append(milliseconds(peer_step, flush))
    ours_ms = [statistics.median(column) for column in zip(*mine, strict=True)]
    peer_ms = [statistics.median(column) for column in zip(*theirs, strict=True)]
    moved = bytes_per_element * sum(param.numel() for param in params)
    return {
        "case": name,
        "ours_ms": dict(zip(("device", "host", "wall"), ours_ms, strict=True)),
        "torch_ms": dict(zip(("device", "host", "wall"), peer_ms, strict=True)),
        "times_as_fast": {
            kind: theirs_ms / mine_ms
            for kind, mine_ms, theirs_ms in zip(("device", "host", "wall"), ours_ms, peer_ms, strict=True)
        },
        "gigabytes_per_second": moved / ours_ms[0] / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    copy = copy_bandwidth(flush, arguments.rounds)
    print(f"{torch.cuda.get_device_name()}: copy moves {copy:,.0f} GB/s")
    results = []
    for name in CASES:
        figures = measure(name, arguments.rounds, flush)
        figures["share_of_copy"] = figures["gigabytes_per_second"] / copy
        results.append(figures)
        ratios = ", ".join(f"{kind} {ratio:.2f} x" for kind, ratio in figures["times_as_fast"].items())
        print(
            f"{name}: {figures['ours_ms']['device']:.3f} ms on the device, "
            f"{100 * figures['share_of_copy']:.0f} % of copy; against torch {ratios}"
        )
        torch.cuda.empty_cache()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"copy_gigabytes_per_second": copy, "cases": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
