"""What ptxas makes of the Triton kernels: registers, and in which order a program asks for memory and waits for it.

    python scripts/triton_machine_code.py [--target sm_90] [--json] [--check]

Compiles the element kernels of some layouts without a GPU and writes their figures into docs/architecture.md; with
--check it only says whether they stand there, with --json it prints them, and all that a test asks about.

Of each kernel one way is read: that of an aligned, full tile from the first instruction to the last, or round the loop
that reads most. The control codes beside the instructions say how many cycles each takes and which loads it waits for.
If every load took `LATENCY` cycles, those of one round would begin while the first of them is under way.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine_code import DOCUMENT, Instruction, blocks_of, dominators_of, loops_of, read_kernels

BEGIN, END = "<!-- triton's machine code:begin -->", "<!-- triton's machine code:end -->"
# Cycles of a load; of other instructions for whose end a scoreboard is waited for, about.
LATENCY, CYCLES = 800, 20
# What a multiprocessor has room for.
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32


def straight_way(code: list[Instruction]) -> list[Instruction]:
    """From the first instruction to an exit, round no loop: the way that moves most in 16-byte accesses, and of such
    the shortest. It calls nothing: that is for numbers out of the ordinary."""
    blocks, follows = blocks_of(code)
    _, order = dominators_of(follows, code[0].address)
    number = {block: at for at, block in enumerate(order)}
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {}
    for at in reversed(order):
        block = blocks[at]
        onward = [best[to] for to in follows[at] if number[to] > number[at] and to in best]
        if any(one.name.startswith("EXIT") for one in block):
            onward.append((0, 0, ()))
        if onward and not any(one.name.startswith("CALL") for one in block):
            moved, length, way = max(onward)
            moved += sum(one.moves(kind) for one in block for kind in ("LDG", "STG") if one.moves(kind) >= 16)
            best[at] = moved, length - len(block), (at, *way)
    return [one for at in best[order[0]][2] for one in blocks[at]]


def rounds_of(way: list[Instruction]) -> list[list[int]]:
    """Bytes of the loads that are under way together, if a warp were alone and each load took `LATENCY` cycles."""
    now, busy, begun = 0, [0] * 6, 0
    rounds: list[list[int]] = []
    for one in way:
        now = max([now, *(busy[board] for board in one.waits)])
        if one.moves("LDG"):
            if not rounds or now >= begun + LATENCY:
                rounds.append([])
                begun = now
            rounds[-1].append(one.moves("LDG"))
        if one.sets is not None:
            busy[one.sets] = max(busy[one.sets], now + (LATENCY if one.moves("LDG") else CYCLES))
        now += max(1, one.stall)
    return rounds


def facts(kernel: Any) -> dict[str, Any]:
    """What the machine code of a compiled kernel says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        architecture = f"sm_{kernel.metadata.target.arch}"
        (found,) = [one for one in read_kernels(Path(file.name), architecture) if one.code]
    threads = kernel.metadata.num_warps * 32
    way = straight_way(found.code)
    if kernel.metadata.name == "reduce_kernel":  # elements are read in a loop
        way = max((loop.way for loop in loops_of(found)), key=lambda way: sum(one.moves("LDG") for one in way))
    rounds = rounds_of(way)
    # Of columns are accesses of 16 bytes, and those of 8 among them: a thread's elements of a column of bytes.
    of_columns = [sum(width for width in widths if width >= 8) if max(widths) >= 16 else 0 for widths in rounds]
    written = [one.moves("STG") for one in way if not one.guarded]  # one thread alone stores a sum
    # Registers are given out 8 a thread at a time.
    programs = min(REGISTERS // (-(-found.registers // 8) * 8 * threads), THREADS // threads, PROGRAMS)
    return {
        "registers": found.registers,
        "spills": found.spills,
        "threads": threads,
        "programs": programs,
        "instructions": len(way),
        "rounds": len(rounds),
        "column_rounds": sum(count > 0 for count in of_columns),
        "bytes_together": max(of_columns, default=0),
        "bytes_read": sum(of_columns),
        "bytes_written": sum(width for width in written if width >= 8),
    }


# The kernels ----------------------------------------------------------------------------------------------------

SHAPE = (129, 64)  # whose states may be codes


def layouts() -> dict[str, tuple[str, Callable[..., Any], str, int, int]]:
    """By name: kernel, optimizer, dtype of the parameters; bytes of an element that it reads and that it writes."""
    from fused_optim import LAMB, LARS, SGD, AdamW, ClipGradByGlobalNorm

    def momentum(params: Any) -> Any:
        return SGD(params, 0.1, momentum=0.9, backend="triton")

    def small_momentum(params: Any) -> Any:
        return SGD(params, 0.1, momentum=0.9, backend="triton", **small)

    def small_lamb(params: Any) -> Any:
        return LAMB(params, max_grad_norm=None, backend="triton", **small)

    def adamw(**options: Any) -> Callable[..., Any]:
        return lambda params: AdamW(params, backend="triton", **options)

    def lamb(params: Any) -> Any:
        return LAMB(params, max_grad_norm=None, backend="triton")

    def lars(params: Any) -> Any:
        return LARS(params, 0.1, momentum=0.9, weight_decay=0.1, backend="triton")

    clipped, wide = adamw(grad_clip=ClipGradByGlobalNorm(1.0)), "float32"
    codes: dict[str, Any] = {"state_dtype": "8bit"}
    small: dict[str, Any] = {"state_dtype": "8bit", "master_weights": "split8"}
    return {
        "AdamW float32": ("apply", adamw(), "float32", 16, 12),
        "AdamW bfloat16": ("apply", adamw(), "bfloat16", 8, 6),
        "AdamW bfloat16, float32 states": ("apply", adamw(state_dtype=_dtype(wide)), "bfloat16", 12, 10),
        "AdamW bfloat16, split master": ("apply", adamw(master_weights="split"), "bfloat16", 14, 12),
        "AdamW bfloat16, float32 master": ("apply", adamw(master_weights=wide), "bfloat16", 16, 14),
        "AdamW float16": ("apply", adamw(), "float16", 8, 6),
        "momentum float32": ("apply", momentum, "float32", 12, 8),
        "momentum bfloat16": ("apply", momentum, "bfloat16", 6, 4),
        "LAMB bfloat16, first pass": ("accumulate", lamb, "bfloat16", 8, 4),
        "LAMB bfloat16, second pass": ("move", lamb, "bfloat16", 6, 2),
        "AdamW float32, 8-bit states": ("apply", adamw(**codes), "float32", 10, 6),
        "AdamW bfloat16, split8 master, 8-bit states": ("apply", adamw(**small), "bfloat16", 7, 5),
        "AdamW bfloat16, stochastic, 8-bit states": ("apply", adamw(**codes, rounding="stochastic"), "bfloat16", 6, 4),
        "AdamW bfloat16, stochastic": ("apply", adamw(rounding="stochastic"), "bfloat16", 8, 6),
        "momentum bfloat16, split8 master, 8-bit state": ("apply", small_momentum, "bfloat16", 6, 4),
        "LAMB bfloat16, split8 master, 8-bit states, first pass": ("accumulate", small_lamb, "bfloat16", 7, 2),
        "LAMB bfloat16, split8 master, 8-bit states, second pass": ("move", small_lamb, "bfloat16", 5, 3),
        "norm float32": ("reduce", clipped, "float32", 4, 0),
        "norm bfloat16": ("reduce", clipped, "bfloat16", 2, 0),
        "LARS' norms float32": ("reduce", lars, "float32", 8, 0),
        "LARS' norms bfloat16": ("reduce", lars, "bfloat16", 4, 0),
    }


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def compile_layouts(target: str) -> dict[str, dict[str, Any]]:
    """The facts of every layout. In a process that has compiled no kernel yet."""
    from fused_optim.bench.offline import compiled, pretend

    pretend(target)
    import torch
    from fused_optim.kernels import apply, reduce

    kernels = {name: getattr(apply, f"{name}_kernel") for name in ("apply", "accumulate", "move")}
    kernels["reduce"] = reduce.reduce_kernel
    elements = apply.TILE.value // 128
    result: dict[str, dict[str, Any]] = {}
    for name, (kernel, make, dtype, read, written) in layouts().items():
        before = len(compiled(kernels[kernel]))
        param = torch.nn.Parameter(torch.ones(SHAPE, dtype=_dtype(dtype)))
        param.grad = torch.ones_like(param)
        make([param]).step()
        # LAMB's both passes come at once.
        one = compiled(kernels[kernel])[-1]
        assert " pass" in name or len(compiled(kernels[kernel])) > before, name
        found = facts(one)
        times = max(1, found["bytes_read"] // (read * elements))  # tiles of a way round a loop
        found |= {"read": read * elements * times, "written": written * elements, "elements": elements * times}
        result[name] = found
    return result


def table(facts_of: dict[str, dict[str, Any]], target: str) -> str:
    import triton

    lines = [
        "| kernel | registers | programs of 128 threads a multiprocessor | rounds of reads | bytes of a thread under "
        "way | KB under way a multiprocessor | instructions an element |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in facts_of.items():
        together = found["bytes_together"]
        lines.append(
            f"| {name} | {found['registers']} | {found['programs']} | {found['rounds']} | {together} | "
            f"{found['programs'] * found['threads'] * together / 1024:.0f} | "
            f"{found['instructions'] / found['elements']:.0f} |"
        )
    return "\n".join([*lines, "", f"triton {triton.__version__}, {target}; written by scripts/triton_machine_code.py."])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--json", action="store_true", help="print all facts and write nothing")
    parser.add_argument("--check", action="store_true", help="fail if docs/architecture.md does not show the figures")
    arguments = parser.parse_args()
    facts_of = compile_layouts(arguments.target)
    if arguments.json:
        print(json.dumps(facts_of | {"table": table(facts_of, arguments.target)}))
        return 0
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    filled = f"{before}{BEGIN}\n{table(facts_of, arguments.target)}\n{END}{after}"
    if not arguments.check:
        DOCUMENT.write_text(filled)
        return 0
    if filled != text:
        print("docs/architecture.md does not show the kernels as they are: run python scripts/triton_machine_code.py")
    return int(filled != text)


if __name__ == "__main__":
    sys.exit(main())
