"""Write the figures of bench/results/cpu.json into README.md; with --check only say whether they stand there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"


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


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    result = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())
    filled = f"{before}{BEGIN}\n{figures(result)}\n{END}{after}"
    if "--check" in sys.argv[1:]:
        if filled != text:
            print("README.md does not show bench/results/cpu.json: run python scripts/readme_figures.py")
        return int(filled != text)
    readme.write_text(filled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
