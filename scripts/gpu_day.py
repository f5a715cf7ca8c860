"""What scripts/gpu_day.sh leaves to Python: single measurements on the GPU, and what is made of the results.

    python scripts/gpu_day.py merge OUT ... [--write]

takes the folders of both calls and prints a verdict for every target; with --write it also replaces
bench/results/gpu.json and README's rows. The other commands are the script's own.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- gpu figures:begin -->", "<!-- gpu figures:end -->"
METRICS = (
    "dram__throughput.avg.pct_of_peak_sustained_elapsed,"
    "sm__warps_active.avg.pct_of_peak_sustained_active,"
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"
)
REFUSED = re.compile("not supported|unable to|denied|failed to initialize|insufficient|permission", re.IGNORECASE)
CLIPPED_MODELS = ("resnet-50", "bert-large")

Rows = list[dict[str, Any]]


# On the GPU -------------------------------------------------------------------------------------------------------


def best(rows: Rows) -> str:
    """The variant with the greatest share of a copy over the largest tensors of all layouts, name and options; of
    those whose results have the bits of the first one's."""
    bits = {(row["layout"], row["numel"]): row["bits"] for row in reversed(rows) if row["variant"] == "as-it-is"}
    shares: dict[str, list[float]] = {}
    wrong = set()
    largest = max((int(row["numel"]) for row in rows if row["numel"].isdigit()), default=0)
    for row in rows:
        if bits.get((row["layout"], row["numel"]), row["bits"]) != row["bits"]:
            wrong.add(row["variant"])
        if row["numel"] == str(largest):
            shares.setdefault(row["variant"], []).append(row["share_of_copy"])
    complete = max(map(len, shares.values()), default=0)
    means = {
        variant: math.exp(statistics.fmean(map(math.log, found)))
        for variant, found in shares.items()
        if variant not in wrong and len(found) == complete
    }
    return max(means, key=means.__getitem__, default="as-it-is")


def read_lines(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def clip(path: Path) -> None:
    """AdamW with its own clip by the global norm, beside torch's clip_grad_norm_ and fused step."""
    import torch
    from fused_optim.bench.measure import Runner
    from fused_optim.bench.models import MODELS

    import fused_optim

    class Torchs:
        def __init__(self, params: Any) -> None:
            self.params = params
            self.optimizer = torch.optim.AdamW(params, fused=True)

        def step(self) -> None:
            torch.nn.utils.clip_grad_norm_(self.params, 1.0)
            self.optimizer.step()

    def runner(make: Any, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Runner:
        params = [torch.nn.Parameter(torch.randn(shape, device="cuda").to(dtype)) for shape in shapes]
        for param in params:
            param.grad = torch.randn_like(param)
        made = Runner.__new__(Runner)
        made.device, made.turn, made.steppers = torch.device("cuda"), 0, [make(params)]
        made.repeats = 20
        for _ in range(3):
            made.step()
        return made

    rows = []
    for name in CLIPPED_MODELS:
        shapes = [shape for group in MODELS[name]().groups for shape in group.tensors.values()]
        for dtype in (torch.float32, torch.bfloat16):
            norm = fused_optim.ClipGradByGlobalNorm(1.0)
            ours = runner(lambda params, norm=norm: fused_optim.AdamW(params, grad_clip=norm), shapes, dtype)
            theirs = runner(Torchs, shapes, dtype)
            pairs = [(ours.block(20), theirs.block(20)) for _ in range(7)]
            rows.append(
                {
                    "model": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "wall": statistics.median(their.wall / our.wall for our, their in pairs),
                    "device": statistics.median((their.device or 0) / (our.device or 1) for our, their in pairs),
                }
            )
            print(rows[-1])
    path.write_text(json.dumps({"clip": rows}))


def run_tool(command: list[str]) -> tuple[int, str]:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout)
    return result.returncode, result.stdout


def find_tool(name: str) -> str | None:
    import shutil

    return shutil.which(name) or next(map(str, Path("/usr/local").glob(f"cuda*/bin/{name}")), None)


def sanitize(tool: str, options: list[str], command: list[str]) -> int:
    checker = find_tool("compute-sanitizer")
    if checker is None:
        print(f"{tool}: compute-sanitizer is not installed; not run")
        return 0
    import os

    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    status, text = run_tool([checker, "--tool", tool, "--error-exitcode", "99", *options, *command])
    if status == 0:
        print(f"{tool}: nothing found")
    elif status == 99 and tool == "initcheck" and "fused_optim" not in text:
        print(f"{tool}: findings in kernels of others only")
        return 0
    elif status != 99 and REFUSED.search(text):
        print(f"{tool}: refused on this machine; not counted")
        return 0
    return status


def ncu(out: Path, programs: list[Path]) -> int:
    profiler = find_tool("ncu")
    if profiler is None:
        print("ncu is not installed; not run")
        return 0
    for program in dict.fromkeys(path for path in programs if path.is_file()):
        command = [
            profiler,
            "--clock-control",
            "none",
            "--metrics",
            METRICS,
            "--csv",
            "--kernel-name-base",
            "demangled",
        ]
        command += ["--kernel-name", "regex:apply_kernel", "--launch-count", "8", str(program), "67108864", "1"]
        status, text = run_tool(command)
        if status != 0:
            print("ncu: refused on this machine; not counted" if REFUSED.search(text) else f"ncu: status {status}")
            return 0 if REFUSED.search(text) else status
        with out.open("a") as file:
            file.write(f"# {program.name}\n")
            file.writelines(f"{line}\n" for line in text.splitlines() if line.startswith('"'))
    return 0


def gather(out: Path) -> None:
    """One results.json of what the steps of a call have left in OUT/logs, in the harness's format."""
    whole: dict[str, Any] = {"machine": {}, "protocol": {}, "interrupted": False, "cases": [], "grid": [], "clip": []}
    for path in sorted((out / "logs").glob("*.json")):
        try:
            found = json.loads(path.read_text())
        except ValueError:
            continue
        if isinstance(found, dict) and ("grid" in found or "clip" in found):
            whole["machine"] = found.get("machine") or whole["machine"]
            whole["protocol"] = found.get("protocol") or whole["protocol"]
            whole["grid"] += found.get("grid", [])
            whole["clip"] += found.get("clip", [])
    (out / "results.json").write_text(json.dumps(whole, indent=1) + "\n")


# Afterwards -------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """Something that was promised of a GPU, and the figures that say whether it is so."""

    text: str
    least: float
    figures: list[tuple[str, float]]

    @property
    def verdict(self) -> str:
        if not self.figures:
            return "NOT MEASURED"
        return "met" if all(value >= self.least for _, value in self.figures) else "MISSED"

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {value:.2f}" for name, value in self.figures) or "no figure"
        return f"{self.verdict:12}  {self.text}: {shown}"


def merged(folders: list[Path]) -> tuple[dict[str, Any], Rows]:
    """The results of both calls, the later ones in place of earlier ones of the same name; and the variants'."""
    whole: dict[str, Any] = {"machine": {}, "protocol": {}, "interrupted": False, "cases": []}
    grid: dict[tuple[str, ...], dict[str, Any]] = {}
    clipped: dict[tuple[str, str], dict[str, Any]] = {}
    variants: Rows = []
    for folder in folders:
        path = folder / "results.json"
        if path.exists():
            found = json.loads(path.read_text())
            whole["machine"] = found["machine"] or whole["machine"]
            whole["protocol"] = found["protocol"] or whole["protocol"]
            for row in found["grid"]:
                grid[row["optimizer"], row["model"], row["dtype"], row["contender"]] = row
            for row in found["clip"]:
                clipped[row["model"], row["dtype"]] = row
        if (folder / "variants.jsonl").exists():
            variants += read_lines(folder / "variants.jsonl")
    return {**whole, "grid": list(grid.values()), "clip": list(clipped.values())}, variants


def rows_of(result: dict[str, Any], **wanted: Any) -> Iterator[dict[str, Any]]:
    for row in result["grid"]:
        if row["status"] == "measured" and all(row.get(key) == value for key, value in wanted.items()):
            yield row


def beside(result: dict[str, Any], figure: str, peer: str, **wanted: Any) -> list[tuple[str, float]]:
    """How many times as long a peer takes as the cuda backend, by a figure of both."""
    found = []
    for row in rows_of(result, contender="fused_optim/cuda", **wanted):
        same = {key: row[key] for key in ("optimizer", "model", "dtype")}
        found += [
            (f"{row['optimizer']} {row['model']} {row['dtype']}", other[figure] / row[figure])
            for other in rows_of(result, contender=peer, **same)
        ]
    return found


def targets(result: dict[str, Any], variants: Rows) -> list[Target]:
    def share(dtype: str) -> list[tuple[str, float]]:
        found = rows_of(result, contender="fused_optim/cuda", model="dense-1g", dtype=dtype)
        return [(row["model"], row["share_of_copy"]) for row in found if "share_of_copy" in row]

    of_triton = beside(result, "step_us", "fused_optim/triton")
    chosen = best(variants) if variants else ""
    layouts = [
        (row["layout"], row["share_of_copy"])
        for row in variants
        if row["variant"] == chosen and row["numel"] == "67108864"
    ]
    torchs = "torch-fused"
    return [
        Target("share of a copy, 1 G float32, at least 0.92", 0.92, share("float32")),
        Target("share of a copy, 1 G bfloat16, at least 0.90", 0.90, share("bfloat16")),
        Target(
            "ViT-B with layer decay, wall, 3 x torch's fused", 3, beside(result, "wall_us", torchs, model="vit-b-16")
        ),
        Target("ViT-B with layer decay, host, 10 x", 10, beside(result, "host_us", torchs, model="vit-b-16")),
        Target("465 groups, wall, 10 x torch's fused", 10, beside(result, "wall_us", torchs, model="rf-detr-nano")),
        Target(
            "clip by the global norm, 1.15 x torch's",
            1.15,
            [(f"{row['model']} {row['dtype']}", row["wall"]) for row in result["clip"]],
        ),
        Target("NovoGrad, 10 x timm's", 10, beside(result, "wall_us", "timm", optimizer="NovoGrad")),
        Target("LARC, 10 x timm's", 10, beside(result, "wall_us", "timm", optimizer="LARC")),
        Target("Triton, 0.90 of CUDA", 0.90, [(name, 1 / value) for name, value in of_triton]),
        Target("share of a copy, every dtype, at least 0.90", 0.90, layouts),
    ]


def readme_rows(result: dict[str, Any]) -> str:
    lines = [
        "| optimizer, model, dtype | contender | step [µs] | host [µs] | of a copy | ours is |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["grid"]:
        if row["status"] != "measured":
            continue
        share = f"{100 * row['share_of_copy']:.0f} %" if "share_of_copy" in row else ""
        times = f"{row['ours_times_as_fast']:.2f} ×" if "ours_times_as_fast" in row else ""
        lines.append(
            f"| {row['optimizer']}, {row['model']}, {row['dtype']} | {row['contender']} | {row['step_us']:,.0f} | "
            f"{row.get('host_us', 0):,.0f} | {share} | {times} |"
        )
    machine = result["machine"]
    lines += [
        "",
        ", ".join(f"{key} {machine[key]}" for key in ("gpu", "torch", "cuda", "date", "commit") if key in machine),
    ]
    return "\n".join(lines)


def merge(folders: list[Path], write: bool) -> int:
    result, variants = merged(folders)
    verdicts = targets(result, variants)
    if write:
        path = ROOT / "bench" / "results" / "gpu.json"
        path.write_text(json.dumps(result | {"variants": variants}, indent=1) + "\n")
        readme = ROOT / "README.md"
        before, rest = readme.read_text().split(BEGIN)
        _, after = rest.split(END)
        readme.write_text(f"{before}{BEGIN}\n{readme_rows(result)}\n{END}{after}")
    if variants:
        print(f"best variant: {best(variants)}")
    for target in verdicts:
        print(target)
    return int(any(target.verdict == "MISSED" for target in verdicts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("best").add_argument("file", type=Path)
    commands.add_parser("clip").add_argument("file", type=Path)
    one = commands.add_parser("sanitize")
    one.add_argument("tool")
    one.add_argument("rest", nargs=argparse.REMAINDER)
    one = commands.add_parser("ncu")
    one.add_argument("file", type=Path)
    one.add_argument("programs", type=Path, nargs="+")
    commands.add_parser("gather").add_argument("folder", type=Path)
    one = commands.add_parser("merge")
    one.add_argument("folders", type=Path, nargs="+")
    one.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "best":
        print(best(read_lines(arguments.file)))
    elif arguments.command == "clip":
        clip(arguments.file)
    elif arguments.command == "sanitize":
        at = arguments.rest.index("--")
        return sanitize(arguments.tool, arguments.rest[:at], arguments.rest[at + 1 :])
    elif arguments.command == "ncu":
        return ncu(arguments.file, arguments.programs)
    elif arguments.command == "gather":
        gather(arguments.folder)
    else:
        return merge(arguments.folders, arguments.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
