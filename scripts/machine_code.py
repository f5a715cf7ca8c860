"""What the compiler made of the CUDA kernels' memory loops, read from their machine code.

    python scripts/machine_code.py FILE ... [--arch sm_90] [--write]

A FILE is a cubin, an object file or the built module. One line for each loop that a kernel takes where vectors are
whole; with --write the table of AdamW, momentum and reduce goes into docs/architecture.md.

A thread has loads under way together as long as nothing waits for one of them before the last has been issued. The
compiler writes into each instruction which scoreboards it sets and which it waits for, and cuobjdump prints that
beside it, so that the order of loads and waits can be read off without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- machine code:begin -->", "<!-- machine code:end -->"

THREADS = 256  # of a block: kThreads in csrc/cuda/layout.h
REGISTERS = 65536  # of a multiprocessor, given out 8 a thread at a time
MOST_BLOCKS = 8  # 2,048 threads, on every architecture with as many registers but sm_75 and sm_120


@dataclass
class Instruction:
    address: int
    text: str
    name: str = ""
    guarded: bool = False
    sets: int | None = None  # the scoreboard that is busy until its result is there
    waits: tuple[int, ...] = ()
    stall: int = 0  # cycles until the next instruction may be issued

    def decode(self, control: int) -> None:
        self.stall = control >> 41 & 15
        board = control >> 46 & 7
        self.sets = None if board == 7 else board
        self.waits = tuple(b for b in range(6) if control >> 52 & 1 << b)

    @property
    def target(self) -> int | None:
        found = re.search(r"(0x[0-9a-f]+)\s*$", self.text)
        return int(found[1], 16) if found and self.name.startswith("BRA") else None

    def moves(self, kind: str) -> int:
        """Bytes that it loads (LDG) or stores (STG); 0 for any other instruction."""
        if not self.name.startswith(kind):
            return 0
        width = re.search(r"\.(256|128|64|U16|S16|U8|S8)\b", self.name)
        return {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[width[1]] if width else 4


@dataclass
class Kernel:
    name: str
    registers: int = 0
    spills: bool = False
    code: list[Instruction] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor's registers have room for."""
        return min(MOST_BLOCKS, REGISTERS // (THREADS * ((self.registers + 7) // 8 * 8)))


@dataclass
class Loop:
    """The way round a loop where every vector is whole and no result is out of the ordinary."""

    kernel: Kernel
    way: list[Instruction]

    def widths(self, kind: str) -> Counter[int]:
        return Counter(bytes_ for instruction in self.way if (bytes_ := instruction.moves(kind)))

    @property
    def loads_wait(self) -> bool:
        """Whether a load is issued after something has waited for another."""
        busy: set[int] = set()
        waited = False
        for instruction in self.way:
            waited = waited or bool(busy & set(instruction.waits))
            if instruction.moves("LDG"):
                if waited:
                    return True
                if instruction.sets is not None:
                    busy.add(instruction.sets)
        return False

    @property
    def format(self) -> str:
        """The 16-bit format between which and float32 it converts; "" for none."""
        names = [instruction.name for instruction in self.way]
        if any("F2FP.BF16" in name for name in names):
            return "bfloat16"
        if any(re.match(r"F2FP(\.F16)?(\.F32)?\.PACK_AB|HADD2\.F32", name) for name in names):
            return "float16"
        return ""

    @property
    def bytes_in_flight(self) -> int:
        """Of a multiprocessor, if its warps are all in this loop."""
        return self.kernel.blocks * THREADS * sum(width * count for width, count in self.widths("LDG").items())


def find_cuobjdump() -> str:
    """triton's package brings one where the toolkit has none."""
    spec = importlib.util.find_spec("triton")
    found = shutil.which("cuobjdump")
    if found is None and spec is not None and spec.origin is not None:
        found = str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if found is None or not Path(found).exists():
        sys.exit("no cuobjdump on PATH, and no triton package that holds one")
    return found


def dump(*options: str) -> str:
    command = [find_cuobjdump(), *options]
    return subprocess.run(command, text=True, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout


def read_kernels(file: Path, arch: str = "sm_90") -> list[Kernel]:
    kernels: dict[str, Kernel] = {}
    architecture = ("-arch", arch)
    usage = r"Function ([^\s:]+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    for name, registers, stack, local in re.findall(usage, dump(*architecture, "--dump-resource-usage", str(file))):
        kernels[name] = Kernel(name, int(registers), (stack, local) != ("0", "0"))
    kernel: Kernel | None = None
    last: Instruction | None = None
    for line in dump(*architecture, "-sass", str(file)).splitlines():
        if found := re.search(r"Function : (\S+)", line):
            kernel = kernels.setdefault(found[1], Kernel(found[1]))
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]+ \*/", line):
            last = Instruction(int(found[1], 16), found[2])
            words = found[2].split()
            last.guarded = words[0].startswith("@")
            last.name = words[1] if last.guarded else words[0]
        elif (found := re.match(r"\s+/\* (0x[0-9a-f]+) \*/", line)) and last is not None and kernel is not None:
            last.decode(int(found[1], 16))
            kernel.code.append(last)
            last = None
    return list(kernels.values())


def serial_loads(kernel: Kernel) -> int:
    """The loads before which something has waited for the one before them, in the order of the code."""
    busy: set[int] = set()
    count, waited = 0, False
    for instruction in kernel.code:
        waited = waited or bool(busy & set(instruction.waits))
        busy -= set(instruction.waits)
        if instruction.moves("LDG"):
            count += waited
            waited = False
            if instruction.sets is not None:
                busy.add(instruction.sets)
    return count


Blocks = dict[int, list[Instruction]]
Edges = dict[int, list[int]]


def blocks_of(code: list[Instruction]) -> tuple[Blocks, Edges]:
    """Basic blocks by their first address, and what each may go on to."""
    place = {instruction.address: at for at, instruction in enumerate(code)}
    leaders = {code[0].address}
    for at, instruction in enumerate(code):
        if instruction.name.startswith(("BRA", "EXIT", "RET", "CALL", "BRX", "JMP")):
            if instruction.target in place:
                leaders.add(instruction.target)
            if at + 1 < len(code):
                leaders.add(code[at + 1].address)
    starts = sorted(leaders)
    blocks = {a: code[place[a] : place[b] if b else len(code)] for a, b in zip(starts, [*starts[1:], 0], strict=True)}
    follows: Edges = {}
    for start, after in zip(starts, [*starts[1:], None], strict=True):
        last = blocks[start][-1]
        ways: list[int | None] = [after]
        if last.name.startswith("BRA"):
            # .DIV and .CONV: if the warp has diverged there, or has not.
            goes_on = last.guarded or re.search(r"BRA(\.\w+)* !?U?P\d|BRA\.(DIV|CONV)", last.text) is not None
            ways = [last.target, after if goes_on else None]
        elif last.name.startswith(("EXIT", "RET")):
            ways = [after if last.guarded else None]
        follows[start] = [way for way in ways if way is not None and way in blocks]
    return blocks, follows


def dominators_of(follows: Edges, start: int) -> tuple[dict[int, int], list[int]]:
    """Each block's immediate dominator, and the blocks in reverse postorder (Cooper, Harvey and Kennedy)."""
    order: list[int] = []
    seen = {start}
    stack: list[tuple[int, Iterator[int]]] = [(start, iter(follows[start]))]
    while stack:
        at, ways = stack[-1]
        following = next((way for way in ways if way not in seen), None)
        if following is None:
            order.append(at)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(follows[following])))
    order.reverse()
    number = {block: at for at, block in enumerate(order)}
    before: Edges = {block: [] for block in order}
    for block in order:
        for following in follows[block]:
            before[following].append(block)
    dominator = {start: start}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [other for other in before[block] if other in dominator]
            best = known[0]
            for other in known[1:]:
                while best != other:
                    if number[best] > number[other]:
                        best = dominator[best]
                    else:
                        other = dominator[other]
            if dominator.get(block) != best:
                dominator[block], changed = best, True
    return dominator, order


def is_ordinary(block: list[Instruction]) -> bool:
    """Whether vectors are whole here, and nothing rare is done. Beside vectors of 16 bytes there may be codes and their
    scales."""
    widths = [bytes_ for instruction in block for kind in ("LDG", "STG") if (bytes_ := instruction.moves(kind))]
    narrow = min(widths, default=8) < 8 and max(widths) < 16
    # Under a condition it is how sm_80 leaves a loop.
    calls = any(instruction.name.startswith("CALL") and not instruction.guarded for instruction in block)
    return not narrow and not calls


def loops_of(kernel: Kernel) -> Iterator[Loop]:
    """The loops that load vectors. Of the ways round one, that which moves most, and of those the shortest."""
    if not kernel.code:
        return
    blocks, follows = blocks_of(kernel.code)
    dominator, order = dominators_of(follows, kernel.code[0].address)

    def dominates(block: int, other: int) -> bool:
        while other not in (block, dominator[other]):
            other = dominator[other]
        return other == block

    number = {block: at for at, block in enumerate(order)}
    before: Edges = {block: [] for block in order}
    for block in order:
        for following in follows[block]:
            before[following].append(block)
    ends: Edges = {}
    for block in order:
        for following in follows[block]:
            if dominates(following, block):
                ends.setdefault(following, []).append(block)
    for head, tails in ends.items():
        body = {head}
        todo = list(tails)
        while todo:
            block = todo.pop()
            if block not in body:
                body.add(block)
                todo += before[block]
        # What is moved, and instructions with their sign turned: the larger is the better way.
        best: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for block in sorted(body, key=lambda block: number[block]):
            if block != head and not is_ordinary(blocks[block]):
                continue
            reached = (
                [best[b] for b in before[block] if b in best and number[b] < number[block]] if block != head else []
            )
            moved, length, way = max(reached) if reached else (0, 0, ())
            if block == head or reached:
                moved += sum(i.moves("LDG") + i.moves("STG") for i in blocks[block])
                best[block] = (moved, length - len(blocks[block]), (*way, block))
        round_trips = [best[tail] for tail in tails if tail in best]
        if round_trips and is_ordinary(blocks[head]):
            way = [instruction for block in max(round_trips)[2] for instruction in blocks[block]]
            loop = Loop(kernel, way)
            inner = any(other in body and other != head and set(max(round_trips)[2]) & {other} for other in ends)
            if sum(loop.widths("LDG").values()) > 0 and not inner:
                yield loop


# Layouts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """A combination of storages that has code of its own, by what a vector of each column moves."""

    name: str
    format: str  # of its 16-bit columns; "" where there is none
    elements: int  # of a vector
    loads: tuple[int, ...]  # of the param and what is beside it, and the grad
    stores: tuple[int, ...]
    state: int
    codes: bool = False  # each state has a scale of a byte
    draws: bool = False  # in the kernel of rows that draw random words


LAYOUTS = (
    Layout("float32", "", 4, (16, 16), (16,), 16),
    Layout("bfloat16", "bfloat16", 8, (16, 16), (16,), 16),
    Layout("bfloat16, float32 states", "bfloat16", 4, (8, 8), (8,), 16),
    Layout("bfloat16, split", "", 4, (8, 8, 8), (8, 8), 16),
    Layout("bfloat16, float32 master", "", 4, (8, 16, 8), (8, 16), 16),
    Layout("bfloat16, float32 master and grad", "", 4, (8, 16, 16), (8, 16), 16),
    Layout("float16", "float16", 8, (16, 16), (16,), 16),
    Layout("float16, float32 states", "float16", 4, (8, 8), (8,), 16),
    Layout("float16, float32 master", "float16", 4, (8, 16, 8), (8, 16), 16),
)
LAYOUTS_THAT_DRAW = (
    Layout("float32, 8-bit", "", 4, (16, 16), (16,), 4, codes=True, draws=True),
    Layout("bfloat16, 8-bit", "bfloat16", 8, (16, 16), (16,), 8, codes=True, draws=True),
    Layout("bfloat16, stochastic, 8-bit", "", 8, (16, 16), (16,), 8, codes=True, draws=True),
    Layout("bfloat16, split8, 8-bit", "", 8, (16, 8, 16), (16, 8), 8, codes=True, draws=True),
    Layout("bfloat16, split8", "", 4, (8, 4, 8), (8, 4), 16, draws=True),
    Layout("bfloat16, stochastic", "", 8, (16, 16), (16,), 16, draws=True),
)


def find_loop(kernel: Kernel, layout: Layout, states: int) -> tuple[Loop, int] | None:
    """The loop of a layout, and how many elements a thread does on one way round it."""
    loads = Counter((*layout.loads, *(states * [layout.state])))
    stores = Counter((*layout.stores, *(states * [layout.state])))
    for loop in loops_of(kernel):
        of_loop, of_stores = loop.widths("LDG"), loop.widths("STG")
        # A scale is stored by one lane of a group, and the way past that may be a branch.
        scales, scales_stored = of_loop.pop(1, 0), of_stores.pop(1, 0)
        count = sum(of_loop.values()) // sum(loads.values())
        times = {width: count * n for width, n in loads.items()}, {width: count * n for width, n in stores.items()}
        if scales != (count * states if layout.codes else 0) or (scales_stored > 0) != layout.codes:
            continue
        if count and (dict(of_loop), dict(of_stores)) == times and loop.format == layout.format:
            return loop, count * layout.elements
    return None


def kernel_of(kernels: list[Kernel], rule: str, *, draws: bool = False) -> Kernel:
    (found,) = [k for k in kernels if re.search(rf"apply_kernel.*4PassE0E.*{rule}EfLb{draws:d}E", k.name)]
    return found


def loops_of_layouts(kernels: list[Kernel]) -> Iterator[tuple[str, Layout, tuple[Loop, int] | None]]:
    """Of each element update in `RULES` the layouts that have code of their own."""
    for rule, (pattern, states) in RULES.items():
        for layout in (*LAYOUTS, *LAYOUTS_THAT_DRAW):
            yield rule, layout, find_loop(kernel_of(kernels, pattern, draws=layout.draws), layout, states)


RULES = {"AdamW": ("AdamILb0EE", 2), "momentum": ("8Momentum", 1)}


def reduce_loops(kernels: list[Kernel]) -> Iterator[tuple[str, Loop, int]]:
    """Of the sums over a column in float: format, loop, elements a way round. An addition is made for each of them."""
    (kernel,) = [k for k in kernels if "reduce_kernel" in k.name]
    for loop in loops_of(kernel):
        names = Counter(instruction.name.split(".")[0] for instruction in loop.way)
        vectors, elements = loop.widths("LDG")[16], names["FADD"]
        if set(loop.widths("LDG")) == {16} and not names["DADD"] and elements in (4 * vectors, 8 * vectors):
            split = elements == 4 * vectors and vectors in (2, 8)  # two vectors for the elements of one
            narrow = "float16" if names["HADD2"] else "bfloat16"
            yield "split" if split else "float32" if elements == 4 * vectors else narrow, loop, elements


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--write", action="store_true", help="put the table into docs/architecture.md")
    arguments = parser.parse_args()
    kernels = [kernel for file in arguments.files for kernel in read_kernels(file, arguments.arch)]
    if arguments.write:
        text = DOCUMENT.read_text()
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table(kernels)}\n{END}{after}")
        return 0
    for kernel in kernels:
        for loop in loops_of(kernel):
            loads, stores = (
                " + ".join(f"{n} x {w}" for w, n in sorted(loop.widths(kind).items())) or "none"
                for kind in ("LDG", "STG")
            )
            print(
                f"{kernel.name}\n  {loop.way[0].address:05x}: {len(loop.way)} instructions, loads {loads}, "
                f"stores {stores}, {loop.format or 'no conversion'}, {'WAITS' if loop.loads_wait else 'together'}, "
                f"{loop.bytes_in_flight / 1024:.0f} KB"
            )
    return 0


def table(kernels: list[Kernel]) -> str:
    lines = [
        "| loop | registers | blocks | loads of a thread under way | KB under way | instructions an element |",
        "|---|---|---|---|---|---|",
    ]

    def row(name: str, loop: Loop, elements: int) -> str:
        loads = " + ".join(f"{n} × {w} B" for w, n in sorted(loop.widths("LDG").items(), reverse=True))
        return (
            f"| {name} | {loop.kernel.registers} | {loop.kernel.blocks} | {loads} | "
            f"{loop.bytes_in_flight / 1024:.0f} | {math.ceil(10 * len(loop.way) / elements) / 10:.1f} |"
        )

    for rule, layout, found in loops_of_layouts(kernels):
        if found is not None:
            lines.append(row(f"{rule}, {layout.name}", *found))
    widest: dict[str, tuple[Loop, int]] = {}
    for format_, loop, elements in reduce_loops(kernels):
        if format_ not in widest or len(loop.way) / elements > len(widest[format_][0].way) / widest[format_][1]:
            widest[format_] = loop, elements
    lines += [row(f"reduce, {format_}", *found) for format_, found in sorted(widest.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
