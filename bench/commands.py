"""What the commands do: `__main__` reads the command line, and the work is in the modules."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fused_optim.backends import choice

from . import results, tables
from .cases import CASES
from .grid import DTYPES, Grid, models_named, pick
from .machine import load_average, machine
from .models import MODELS
from .optimizers import RECIPES
from .peers import PEERS, Missing
from .shapes import dump, read_shapes
from .step import time_case

INTERRUPTED = 130  # the exit status of what Ctrl-C has ended


def new_console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 170)  # a pipe has no width of its own


@contextmanager
def progress_of(console: Console, total: int) -> Iterator[tuple[Progress, Any]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress, progress.add_task("", total=total)


def device_of(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is no device: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch finds no CUDA device here; try --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: the harness measures on cpu and cuda")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # events and graphs are the current device's
    return device


def grid_of(arguments: argparse.Namespace) -> Grid | None:
    """What the options of the grid ask for; None where none is given."""
    names = ("optimizer", "model", "shapes", "dtype", "backend", "peer", "memory", "device")
    if not any(getattr(arguments, name) for name in names):
        return None
    models = models_named(arguments.model or [])
    models += [read_shapes(path) for path in arguments.shapes or ()]
    wanted = arguments.optimizer or ["AdamW"]
    everything = [name.lower() for name in wanted] == ["all"]
    peers = arguments.peer or []
    none = [name.lower() for name in peers] == ["none"]
    return Grid(
        optimizers=list(RECIPES) if everything else pick("--optimizer", wanted, list(RECIPES)),
        models=models or models_named(["resnet-50"]),
        dtypes=pick("--dtype", arguments.dtype or ["float32"], list(DTYPES)),
        device=device_of(arguments.device),
        backends=pick("--backend", arguments.backend or [], choice.BACKENDS),
        peers=None if none else pick("--peer", peers, list(PEERS)),
        memory=arguments.memory,
    )


def protocol_of(rounds: int | None) -> dict[str, Any]:
    return {"rounds": rounds, "load_average": load_average(), "command": " ".join(sys.argv[1:])}


def step(arguments: argparse.Namespace) -> int:
    if arguments.report is not None:
        from .report import check_output

        check_output(arguments.report)
    grid = grid_of(arguments)
    names = pick("--case", arguments.case or [], list(CASES))
    if grid is None and not names:
        names = list(CASES)
    device = None if grid is None else grid.device
    protocol = {**protocol_of(arguments.rounds), "rotate": arguments.rotate}
    result = results.new_result(machine(device), protocol)
    console = new_console()
    if (load := protocol["load_average"]) is not None and load > 0.5:
        console.print(f"{load} processes wanted a core in the last minute: other work beside makes figures noisy")

    def keep() -> None:
        if arguments.json is not None:
            results.save(arguments.json, result)

    try:
        keep()  # a place that cannot be written is found out now
    except OSError as error:
        raise ValueError(f"--json {arguments.json} cannot be written: {error.strerror}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' own
        try:
            run_cases(names, arguments.rounds or 41, result, console, keep)
            if grid is not None:
                run_grid(grid, arguments.rounds or 11, arguments.rotate, result, console, keep)
        except KeyboardInterrupt:
            result["interrupted"] = True
            console.print("interrupted: what was measured until now is kept")
    keep()
    if noise := results.is_noisy(result):
        console.print(noise)
    if arguments.report is not None:
        from .report import write_report

        write_report(result, arguments.report)
        console.print(f"report: {arguments.report}")
    return INTERRUPTED if result["interrupted"] else 0


def run_cases(names: list[str], rounds: int, result: results.Result, console: Console, keep: Any) -> None:
    if not names:
        return
    try:
        with progress_of(console, len(names)) as (progress, task):
            for name in names:
                progress.update(task, description=name)
                try:
                    result["cases"].append(time_case(CASES[name], rounds))
                except Missing as reason:
                    console.print(f"{name}: left out: {reason}")
                keep()
                progress.advance(task)
    finally:
        if result["cases"]:
            console.print(tables.case_table(result["cases"], result["machine"]["threads"]))


def run_grid(grid: Grid, rounds: int, rotate: bool, result: results.Result, console: Console, keep: Any) -> None:
    settings = grid.settings()
    with progress_of(console, len(settings)) as (progress, task):
        for setting in settings:
            rows = []
            progress.update(task, description=setting.title)

            def tick(text: str, title: str = setting.title) -> None:
                progress.update(task, description=f"{title}: {text}")

            for row in grid.run(setting, rounds, rotate, tick):
                rows.append(row)
            result["grid"] += rows
            keep()
            console.print(tables.grid_table(setting.title, rows))
            progress.advance(task)


def profile(arguments: argparse.Namespace) -> int:
    from .profile import profile_model

    model = models_named([arguments.model])[0] if arguments.shapes is None else read_shapes(arguments.shapes)
    (optimizer,) = pick("--optimizer", [arguments.optimizer], list(RECIPES))
    (dtype,) = pick("--dtype", [arguments.dtype], list(DTYPES))
    peers = [] if arguments.peer is None else pick("--peer", [arguments.peer], list(PEERS))
    device = device_of(arguments.device)
    found = profile_model(
        model, RECIPES[optimizer], DTYPES[dtype], device, arguments.backend, peers, arguments.tokens, arguments.trace
    )
    print(found.text())
    return 0


def sharded(arguments: argparse.Namespace) -> int:
    from .sharded import time_sharded

    result = results.new_result(machine(), protocol_of(arguments.rounds))
    result["cases"] = time_sharded(arguments.processes, arguments.rounds)
    new_console().print(tables.case_table(result["cases"], 1))
    if arguments.json is not None:
        results.save(arguments.json, result)
    return 0


def launcher(arguments: argparse.Namespace) -> int:
    from .launcher import time_launcher

    result = results.new_result(machine(), protocol_of(arguments.rounds))
    result["cases"] = time_launcher(arguments.rounds)
    new_console().print(tables.case_table(result["cases"], torch.get_num_threads()))
    if arguments.json is not None:
        results.save(arguments.json, result)
    return 0


def report(arguments: argparse.Namespace) -> int:
    from .report import write_report

    write_report(results.load(arguments.result), arguments.output)
    new_console().print(f"report: {arguments.output}")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    from .compare import compare_results

    compared = compare_results(results.load(arguments.before), results.load(arguments.after), arguments.threshold)
    new_console().print(compared.table())
    for line in compared.remarks:
        print(line)
    return int(bool(compared.regressions))


def shapes(arguments: argparse.Namespace) -> int:
    if arguments.model is None:
        new_console().print(tables.model_table([make() for make in MODELS.values()]))
        return 0
    if Path(arguments.model).is_file():
        print(dump(read_shapes(arguments.model)), end="")
    else:
        print(dump(models_named([arguments.model])[0]), end="")
    return 0


def accuracy(arguments: argparse.Namespace) -> int:
    try:
        import sklearn  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("the digits come with scikit-learn: pip install scikit-learn") from None
    from . import states, training

    protocol = {**protocol_of(None), "steps": arguments.steps, "seeds": arguments.seeds}
    result = results.new_result(machine(), protocol)

    def keep() -> None:
        if arguments.json is not None:
            results.save(arguments.json, result)

    print(f"{arguments.steps} steps, {arguments.seeds} seeds, AdamW, torch {torch.__version__}")
    if arguments.stress in (None, "states"):
        print("| states | error of updates | largest update | under the spike | roots after the fall, 5 / 50 / 95 % |")
        print("|---|---|---|---|---|")
        for row in states.rows(arguments.steps):
            result["states"].append(row)
            ratios = " / ".join(f"{ratio:.2f}" for ratio in row["root_ratios_after_fall"])
            largest = f"{row['largest_update']:.2f} | {row['largest_update_after_spike']:.2f}"
            print(f"| {row['setting']} | {row['update_error']:.3f} | {largest} | {ratios} |", flush=True)
        keep()
    if arguments.stress == "states":
        return 0
    print("| model | stress | setting | bytes a parameter | final loss | beside float32 states |")
    print("|---|---|---|---|---|---|")
    for found in training.rows(arguments.seeds, arguments.steps, arguments.model, arguments.stress):
        result["trainings"] += found
        keep()
        for row in found:
            print(
                f"| {row['model']} | {row['stress']} | {row['setting']} | {row['bytes_a_parameter']:.2f} | "
                f"{row['loss']:.4f} | {row['beside_float32']:+.4f} ± {row['deviation']:.4f} |",
                flush=True,
            )
    return 0
