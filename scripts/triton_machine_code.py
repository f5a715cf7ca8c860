"""What ptxas makes of the Triton kernels: registers, and in which order a program asks for memory and waits for it.

    python scripts/triton_machine_code.py [--target sm_90] [--json] [--check]

Compiles the element kernels of some layouts without a GPU and writes their figures into docs/architecture.md; with
--check it only says whether they stand there, with --json it prints them, and all that a test asks about.

Of each kernel one way is read: that of an aligned, full tile, from the first instruction to the last, or round the loop
that reads the most. The control codes beside each instruction say how many cycles it takes and which loads it waits
for. If every load took `LATENCY` cycles, those of one round would begin while the first of them is under way.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- triton:begin -->", "<!-- triton:end -->"
LATENCY = 800
# Cycles of other instructions whose end is waited for by a scoreboard.
CYCLES = {"MUFU": 23, "STG": 12, "S2R": 25, "LDC": 30, "ULDC": 15, "FCHK": 23, "F2F": 25, "SHFL": 25, "D": 16}
# Of a multiprocessor.
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32


@dataclass
class Instruction:
    address: int
    text: str
    name: str
    conditional: bool
    cycles: int = 0
    sets: tuple[int, ...] = ()  # scoreboards that are busy until it is done
    waits: tuple[int, ...] = ()

    def decode(self, control: int) -> None:
        self.cycles = control >> 41 & 15
        self.sets = tuple(board for board in (control >> 46 & 7, control >> 49 & 7) if board != 7)
        self.waits = tuple(board for board in range(6) if control >> 52 & 1 << board)

    @property
    def target(self) -> int | None:
        match = re.search(r"(0x[0-9a-f]+)\s*$", self.text)
        return int(match[1], 16) if match and self.name.startswith("BRA") else None

    @property
    def bytes(self) -> int:
        """Of a global access."""
        match = re.search(r"\.(256|128|64|[US]16|[US]8)\b", self.name)
        return int(match[1].lstrip("US")) // 8 if match else 4

    def reads(self) -> bool:
        return self.name.startswith("LDG")

    def writes(self) -> bool:
        return self.name.startswith("STG")


def instructions_of(text: str) -> list[Instruction]:
    """From what cuobjdump prints: an instruction, and below it the word that holds its control code."""
    code: list[Instruction] = []
    last: Instruction | None = None
    for line in text.splitlines():
        if match := re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+ +)?(.*?)\s*;\s*/\* 0x[0-9a-f]+ \*/", line):
            body = match[3]
            conditional = match[2] is not None or re.match(r"BRA(\.\w+)* !?U?P\d", body) is not None
            last = Instruction(int(match[1], 16), body, body.split()[0], conditional)
        elif (match := re.match(r"\s+/\* (0x[0-9a-f]+) \*/", line)) and last is not None:
            last.decode(int(match[1], 16))
            code.append(last)
            last = None
    return code


@dataclass
class Blocks:
    """Basic blocks by their first address, and where each may go on."""

    of: dict[int, list[Instruction]] = field(default_factory=dict)
    follow: dict[int, list[int]] = field(default_factory=dict)
    back: set[tuple[int, int]] = field(default_factory=set)  # the arrows that close a loop

    def __init__(self, code: list[Instruction]) -> None:
        starts = {code[0].address, *(one.target for one in code if one.target is not None)}
        for one, after in zip(code, code[1:]):
            if one.name.startswith(("BRA", "EXIT", "RET")):
                starts.add(after.address)
        self.of, self.follow, self.back = {}, {}, set()
        for one in code:
            if one.address in starts:
                self.of[one.address] = block = []
            block.append(one)
        order = list(self.of)
        for begin, after in zip(order, [*order[1:], None]):
            last = self.of[begin][-1]
            ways = [last.target] if last.target is not None else []
            if after is not None and (last.conditional or not last.name.startswith(("BRA", "EXIT", "RET"))):
                ways.append(after)
            self.follow[begin] = [way for way in ways if way in self.of]
        self._mark_loops(order[0])

    def _mark_loops(self, first: int) -> None:
        done: set[int] = set()
        way: list[tuple[int, Iterator[int]]] = [(first, iter(self.follow[first]))]
        while way:
            at, follow = way[-1]
            for to in follow:
                if any(to == above for above, _ in way):
                    self.back.add((at, to))
                elif to not in done:
                    way.append((to, iter(self.follow[to])))
                    break
            else:
                done.add(at)
                way.pop()

    def best(self, begin: int, end: int | None) -> list[Instruction]:
        """The way from one block to another, or to the program's end, with the most wide accesses; the shortest of
        such. It meets no call: those are for rare numbers."""
        found: dict[int, tuple[int, int, tuple[int, ...]] | None] = {}

        def search(at: int) -> tuple[int, int, tuple[int, ...]] | None:
            if at not in found:
                block = self.of[at]
                found[at] = None
                ways = [search(to) for to in self.follow[at] if (at, to) not in self.back]
                onward = [way for way in ways if way is not None]
                if at == end or (end is None and any(one.name.startswith("EXIT") for one in block)):
                    onward.append((0, 0, ()))
                if onward and not any(one.name.startswith("CALL") for one in block):
                    wide, length, rest = max(onward)
                    wide += sum(one.bytes >= 16 for one in block if one.reads() or one.writes())
                    found[at] = (wide, length - len(block), (at, *rest))
            return found[at]

        best = search(begin)
        return [one for at in best[2] for one in self.of[at]] if best else []


@dataclass
class Access:
    cycle: int
    bytes: int
    reads: bool


def accesses_of(way: list[Instruction]) -> list[Access]:
    """When one warp alone would begin each global access, if every load took `LATENCY` cycles."""
    now, busy, found = 0, [0] * 6, []
    for one in way:
        now = max([now, *(busy[board] for board in one.waits)])
        if one.reads() or one.writes():
            found.append(Access(now, one.bytes, one.reads()))
        takes = LATENCY if one.reads() else next((c for name, c in CYCLES.items() if one.name.startswith(name)), 20)
        for board in one.sets:
            busy[board] = max(busy[board], now + takes)
        now += max(1, one.cycles, 10 if one.name.startswith(("BRA", "BSYNC")) else 0)
    return found


def rounds_of(accesses: list[Access]) -> list[list[Access]]:
    """The loads that are under way together."""
    rounds: list[list[Access]] = []
    for one in accesses:
        if one.reads:
            if not rounds or one.cycle >= rounds[-1][0].cycle + LATENCY:
                rounds.append([])
            rounds[-1].append(one)
    return rounds


def dump(kernel: Any, *options: str) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
        return subprocess.run([command, *options, file.name], text=True, check=True, capture_output=True).stdout


def facts(kernel: Any) -> dict[str, Any]:
    """What the machine code of a compiled kernel says."""
    usage = dump(kernel, "--dump-resource-usage")
    ((registers, stack, local),) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    threads = kernel.metadata.num_warps * 32
    code = instructions_of(dump(kernel, "-sass"))
    blocks = Blocks(code)
    loops = [blocks.best(to, at) for at, to in blocks.back]
    sums = kernel.metadata.name == "reduce_kernel"
    # The sums of a chunk are taken in a loop; what stands before it is read on the way to it.
    way = max(loops, key=lambda loop: sum(one.bytes for one in loop if one.reads())) if sums else []
    way = way or blocks.best(code[0].address, None)
    accesses = accesses_of(way)
    rounds = rounds_of(accesses)
    of_columns = [sum(one.bytes for one in of_round if one.bytes >= 16) for of_round in rounds]
    # A register more than a multiple of 8 takes the whole 8.
    programs = min(REGISTERS // (-(-int(registers) // 8) * 8 * threads), THREADS // threads, PROGRAMS)
    return {
        "registers": int(registers),
        "spilled": int(stack) + int(local),
        "threads": threads,
        "programs": programs,
        "instructions": len(way),
        "rounds": [len(of_round) for of_round in rounds],
        "column_rounds": sum(count > 0 for count in of_columns),
        "bytes_together": max(of_columns, default=0),
        "bytes_read": sum(of_columns),
        "bytes_written": sum(one.bytes for one in accesses if not one.reads and one.bytes >= 16),
        "narrow_reads": sum(one.reads and one.bytes < 4 for one in accesses),
        "narrow_writes": sum(not one.reads and one.bytes < 16 for one in accesses),
    }


# The kernels ----------------------------------------------------------------------------------------------------

SHAPES = (5, 1025, 33 * 1024 + 5)


def layouts() -> dict[str, tuple[str, Callable[..., Any], str, int, int]]:
    """By name: kernel, optimizer, dtype of the parameters; bytes of an element that it reads and that it writes."""
    from fused_optim import LAMB, LARS, SGD, AdamW, ClipGradByGlobalNorm

    def momentum(params: Any) -> Any:
        return SGD(params, 0.1, momentum=0.9, backend="triton")

    def adamw(**options: Any) -> Callable[..., Any]:
        return lambda params: AdamW(params, backend="triton", **options)

    def lars(params: Any) -> Any:
        return LARS(params, 0.1, momentum=0.9, weight_decay=0.1, backend="triton")

    clipped, wide = adamw(grad_clip=ClipGradByGlobalNorm(1.0)), "float32"
    return {
        "AdamW float32": ("apply", adamw(), "float32", 16, 12),
        "AdamW bfloat16": ("apply", adamw(), "bfloat16", 8, 6),
        "AdamW bfloat16, float32 states": ("apply", adamw(state_dtype=_dtype(wide)), "bfloat16", 12, 10),
        "AdamW bfloat16, split master": ("apply", adamw(master_weights="split"), "bfloat16", 14, 12),
        "AdamW bfloat16, float32 master": ("apply", adamw(master_weights=wide), "bfloat16", 16, 14),
        "AdamW float16": ("apply", adamw(), "float16", 8, 6),
        "momentum float32": ("apply", momentum, "float32", 12, 8),
        "momentum bfloat16": ("apply", momentum, "bfloat16", 6, 4),
        "LAMB bfloat16, first pass": ("accumulate", lambda p: LAMB(p, backend="triton"), "bfloat16", 8, 4),
        "LAMB bfloat16, second pass": ("move", lambda p: LAMB(p, backend="triton"), "bfloat16", 6, 2),
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
        params = [torch.nn.Parameter(torch.ones(n, dtype=_dtype(dtype))) for n in SHAPES]
        optimizer = make(params)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        # LAMB's second pass has been compiled with its first.
        (one,) = compiled(kernels[kernel])[before:] or compiled(kernels[kernel])[-1:]
        found = facts(one)
        times = max(1, found["bytes_read"] // (read * elements))  # tiles of a way round a loop
        found |= {"read": read * elements * times, "written": written * elements, "elements": elements * times}
        result[name] = found
    return result


def table(facts_of: dict[str, dict[str, Any]], target: str) -> str:
    import triton

    lines = [
        "| kernel | registers | programs a multiprocessor | rounds of reads | 16-byte reads together, a thread | KB "
        "under way a multiprocessor | instructions an element |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in facts_of.items():
        together = found["bytes_together"]
        lines.append(
            f"| {name} | {found['registers']} | {found['programs']} × {found['threads']} threads | "
            f"{len(found['rounds'])} | {together // 16} | "
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
    page = ROOT / "docs" / "architecture.md"
    text = page.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    filled = f"{before}{BEGIN}\n{table(facts_of, arguments.target)}\n{END}{after}"
    if not arguments.check:
        page.write_text(filled)
        return 0
    if filled != text:
        print("docs/architecture.md does not show the kernels as they are: run python scripts/triton_machine_code.py")
    return int(filled != text)


if __name__ == "__main__":
    sys.exit(main())
