"""Write the figures of bench/results into README.md, docs/memory.md and docs/speed.svg; with --check only compare."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import memory_figures
from memory_figures import filled

ROOT = Path(__file__).resolve().parent.parent


def figures(result: dict) -> str:
    machine = result["machine"]
    lines = ["| case | beside | ours [µs] | peer [µs] | times as fast (quartiles) |", "|---|---|---|---|---|"]
    shares = []
    for case in result["cases"]:
        low, high = case["ratio_quartiles"]
        lines.append(
            f"| {case['case']} | {case['peer']} | {case['ours_us']:,.0f} | {case['peer_us']:,.0f} | "
            f"{case['ratio']:.2f} ({low:.2f}–{high:.2f}) |"
        )
        if "share_of_copy" in case:
            shares.append(f"{case['case'].split(',')[0]} {100 * case['share_of_copy']:.0f} %")
    lines += [
        "",
        f"Medians of {result['cases'][0]['rounds']} interleaved pairs, half of them of optimizers made in the other "
        "order; small tensors have 16 elements. The bytes that a step must move, at the pace of a copy between the "
        f"same steps: {', '.join(shares)}. "
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, Python {machine['python']}, "
        f"{machine['date']}, commit {machine['commit']}.",
    ]
    return "\n".join(lines)


CHART = ROOT / "docs" / "speed.svg"
SHOWN = (
    "150 tensors, 1 group",
    "465 groups of 1 tensor",
    "1000 tensors, 50 groups",
    "8 x 8M float32",
    "8 x 8M bfloat16",
    "LAMB, 200 x 64K float32",
)


def chart(result: dict) -> str:
    """A bar for each of some cases, as long as its ratio; legible on white and on black."""
    cases = [case for case in result["cases"] if case["case"] in SHOWN]
    longest = max(case["ratio"] for case in cases)
    bars = []
    for index, case in enumerate(cases):
        top, width = 30 * index + 10, 360 * case["ratio"] / longest
        bars += [
            f'<text x="210" y="{top + 15}" text-anchor="end">{case["case"]}</text>',
            f'<rect x="220" y="{top}" width="{max(width, 1):.0f}" height="20" fill="#3d7ea6"/>',
            f'<text x="{228 + width:.0f}" y="{top + 15}">{case["ratio"]:.1f} ×</text>',
        ]
    style = 'font-family="sans-serif" font-size="13" fill="#808080"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {30 * len(cases) + 10}" {style}>',
            *bars,
            "</svg>",
            "",
        ]
    )


def texts() -> dict[Path, str]:
    """What each file that shows figures should hold."""
    result = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())
    readme, memory = ROOT / "README.md", ROOT / "docs" / "memory.md"
    costs, losses = memory_figures.costs(), memory_figures.losses()
    return {
        readme: filled(
            filled(filled(readme.read_text(), "figures", figures(result)), "low memory", costs), "losses", losses
        ),
        memory: filled(
            filled(filled(memory.read_text(), "low memory", costs), "updates", memory_figures.updates()),
            "losses",
            losses,
        ),
        CHART: chart(result),
    }


def main() -> int:
    wanted = texts()
    if "--check" in sys.argv[1:]:
        stale = [path.name for path, text in wanted.items() if path.read_text() != text]
        if stale:
            print(f"{stale} do not show what stands in bench/results: run python scripts/readme_figures.py")
        return int(bool(stale))
    for path, text in wanted.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
