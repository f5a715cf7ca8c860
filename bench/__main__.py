"""Time and profile optimizers side by side; `python -m bench` in a checkout is the same program."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fused_optim.backends import choice

try:
    from . import commands
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "rich":
        raise
    sys.exit("fused_optim.bench prints with rich, and draws with matplotlib: pip install rich matplotlib")
from .models import MODELS
from .optimizers import RECIPES
from .peers import PEERS


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="python -m fused_optim.bench", description=__doc__)
    verbs = whole.add_subparsers(dest="command", required=True)

    step = verbs.add_parser(
        "step",
        help="time optimizer steps",
        description="Times optimizer steps, ours and the peers' in turn. Without an option: the named cases, which the "
        "README shows. With --model, --shapes or another option of the grid: optimizers x models x dtypes, each with "
        "all backends and all peers that are installed.",
    )
    step.set_defaults(run=commands.step)
    step.add_argument("--case", action="append", metavar="NAME", help="a named case; may be repeated")
    add_grid(step)
    step.add_argument("--rounds", type=count, help="measurements of each contender (default: 41; 11 in the grid)")
    step.add_argument("--rotate", action="store_true", help="step copies in turn that do not fit into the cache")
    step.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file, after every case")
    step.add_argument("--report", type=Path, metavar="FILE", help="write a report with plots: .html or .md")

    profile = verbs.add_parser(
        "profile",
        help="the timeline of a training step",
        description="Profiles one training step with torch.profiler, says how much of it is the optimizer and what "
        "bounds that, and writes a Chrome trace. Forward and backward are stood in for by the matrix products of each "
        "parameter: 6 operations a parameter and token.",
    )
    profile.set_defaults(run=commands.profile)
    profile.add_argument("--model", default="resnet-50", metavar="NAME", help="default: %(default)s")
    profile.add_argument("--shapes", type=Path, metavar="FILE", help="instead of --model: a file of write_shapes")
    profile.add_argument("--optimizer", default="AdamW", metavar="NAME", help="default: %(default)s")
    profile.add_argument("--peer", metavar="NAME", help="profile this peer instead of ours")
    profile.add_argument("--backend", choices=choice.BACKENDS, help="of ours; default: the best there is")
    profile.add_argument("--dtype", default="float32", metavar="NAME", help="default: %(default)s")
    profile.add_argument("--device", metavar="DEVICE", help="default: cuda where there is one, else cpu")
    profile.add_argument("--tokens", type=count, default=256, help="of the batch (default: %(default)s)")
    profile.add_argument("--trace", type=Path, default=Path("trace.json"), help="default: %(default)s")

    sharded = verbs.add_parser(
        "sharded",
        help="time the steps of DTensor parameters",
        description="Times the steps of 465 small DTensor parameters in processes of this machine, beside torch's "
        "fused AdamW and clip_grad_norm_.",
    )
    sharded.set_defaults(run=commands.sharded)
    sharded.add_argument("--processes", type=count, default=2, help="default: %(default)s")
    sharded.add_argument("--rounds", type=count, default=41, help="default: %(default)s")
    sharded.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")

    launcher = verbs.add_parser(
        "launcher",
        help="time the host's part of Triton's steps",
        description="Times the plan's refresh, in Python and compiled, and the launches of the triton backend, at a "
        "driver that stands for a GPU and runs nothing.",
    )
    launcher.set_defaults(run=commands.launcher)
    launcher.add_argument("--rounds", type=count, default=41, help="default: %(default)s")
    launcher.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")

    accuracy = verbs.add_parser(
        "accuracy",
        help="final losses of small trainings with low-memory states",
        description="Trains a character language model and a small vision transformer with each setting of states and "
        "masters, from the same weights and batches, and prints how far the final losses are from those of float32 "
        "states: mean and deviation over the seeds. Needs scikit-learn for the digits.",
    )
    accuracy.set_defaults(run=commands.accuracy)
    accuracy.add_argument("--seeds", type=count, default=5, help="default: %(default)s")
    accuracy.add_argument("--steps", type=count, default=300, help="of each training (default: %(default)s)")
    accuracy.add_argument("--model", choices=("language", "vision"), help="default: both")
    accuracy.add_argument(
        "--stress",
        choices=("none", "spike", "small", "states"),
        help="states: single updates, and averages after gradients have fallen; no training (default: each)",
    )
    accuracy.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file, after every case")

    report = verbs.add_parser("report", help="a report with plots from a result file")
    report.set_defaults(run=commands.report)
    report.add_argument("result", type=Path, metavar="RESULT.json")
    report.add_argument("output", type=Path, metavar="REPORT", help="an .html or .md file")

    compare = verbs.add_parser(
        "compare",
        help="two result files: ratios and regressions",
        description="Prints how much slower B is than A, case by case. Exit status 1 if something of ours is slower "
        "than --threshold allows and beyond the quartiles of both, 2 if the files cannot be compared.",
    )
    compare.set_defaults(run=commands.compare)
    compare.add_argument("before", type=Path, metavar="A.json")
    compare.add_argument("after", type=Path, metavar="B.json")
    compare.add_argument("--threshold", type=float, default=0.1, help="what is not yet a regression (default: 0.1)")

    shapes = verbs.add_parser("shapes", help="list the models, or print one as a shapes file")
    shapes.set_defaults(run=commands.shapes)
    shapes.add_argument("model", nargs="?", metavar="MODEL or FILE", help="print this one")
    return whole


def add_grid(step: argparse.ArgumentParser) -> None:
    grid = step.add_argument_group("the grid (each may be repeated)")
    grid.add_argument("--optimizer", action="append", metavar="NAME", help=f"{', '.join(RECIPES)}, or all")
    grid.add_argument("--model", action="append", metavar="NAME", help=", ".join(MODELS))
    grid.add_argument("--shapes", action="append", type=Path, metavar="FILE", help="a file of write_shapes")
    grid.add_argument("--dtype", action="append", metavar="NAME", help="float32, bfloat16, float16, float64")
    grid.add_argument("--backend", action="append", metavar="NAME", help=", ".join(choice.BACKENDS))
    grid.add_argument("--peer", action="append", metavar="NAME", help=f"{', '.join(PEERS)}, or none")
    grid.add_argument("--memory", action="store_true", help="ours also with each setting of states and masters")
    grid.add_argument("--device", metavar="DEVICE", help="default: cuda where there is one, else cpu")


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 1 or more")
    return number


def main() -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler tells of its starts otherwise
    whole = parser()
    arguments = whole.parse_args()
    try:
        return arguments.run(arguments)
    except ValueError as error:  # bad input, said in full by whoever found it
        print(f"{whole.prog} {arguments.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
