"""`python -m fused_optim.bench`, or `python -m bench` in a checkout: how fast a step is beside others'."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from .cases import CASES
from .peers import Missing
from .step import machine, time_case


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fused_optim.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="time optimizer steps")
    step.add_argument("--case", action="append", help="a case by name; default: all", metavar="NAME")
    step.add_argument("--rounds", type=int, default=41, help="pairs of measurements a case (default: %(default)s)")
    step.add_argument("--json", type=Path, help="write the result to this file")
    arguments = parser.parse_args()

    for name in arguments.case or ():
        if name not in CASES:
            near = difflib.get_close_matches(name, CASES, cutoff=0.3)
            parser.error(f"no case is named {name!r}; near: {', '.join(near) or ', '.join(CASES)}")

    console = Console(width=None if sys.stdout.isatty() else 140)  # a pipe has no width of its own
    result = {"machine": machine(), "cases": []}
    table = Table(title=f"Optimizer steps side by side, {result['machine']['threads']} threads")
    for heading in ("case", "beside", "ours [µs]", "peer [µs]", "times as fast", "quartiles"):
        table.add_column(heading, justify="left" if heading in ("case", "beside") else "right")
    for name in track(arguments.case or CASES, description="timing", console=console, transient=True):
        try:
            figures = time_case(CASES[name], arguments.rounds)
        except Missing as reason:
            console.print(f"{name}: left out: {reason}")
            continue
        result["cases"].append(figures)
        low, high = figures["ratio_quartiles"]
        microseconds = (figures["ours_us"], figures["peer_us"])
        ratio = f"{figures['ratio']:.2f}"
        table.add_row(name, figures["peer"], *(f"{us:,.0f}" for us in microseconds), ratio, f"{low:.2f}–{high:.2f}")
    console.print(table)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
