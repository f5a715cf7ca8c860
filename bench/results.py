"""The file that a run leaves: JSON, complete after every case."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Result = dict[str, Any]
# Pairs, contenders in turn, final losses, and single updates.
TABLES = ("cases", "grid", "trainings", "states")


def new_result(machine: dict[str, Any], protocol: dict[str, Any]) -> Result:
    return {"machine": machine, "protocol": protocol, "interrupted": False, **{name: [] for name in TABLES}}


def save(path: Path, result: Result) -> None:
    """Replace the file at once: whoever reads it, or kills us, finds a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)


def load(path: Path) -> Result:
    """A result file.

    Raises:
        ValueError: it cannot be read or is none; the text names it.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or "machine" not in content or "cases" not in content:
        raise ValueError(f"{path} is no result of this harness: it has no 'machine' and 'cases'")
    return {"protocol": {}, "interrupted": False, **{name: [] for name in TABLES}, **content}


def title_of(row: dict[str, Any]) -> str:
    """What a row of the grid is about, whoever took the steps."""
    return f"{row['optimizer']}, {row['model']}, {row['dtype']}, {row['device']}"


def by_title(result: Result) -> dict[str, list[dict[str, Any]]]:
    """The rows of the grid, a list for each case in the order of the run."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in result["grid"]:
        found.setdefault(title_of(row), []).append(row)
    return found


def measured(result: Result) -> list[dict[str, Any]]:
    return [row for row in result["grid"] if "wall_us" in row and row["status"] == "measured"]


def is_noisy(result: Result) -> str | None:
    """Why the figures of a run are to be taken with care; None if nothing speaks against them."""
    rows = measured(result)
    noisy = sum(row["noisy"] for row in rows)
    low_high = [case["ratio_quartiles"] + [case["ratio"]] for case in result["cases"]]
    noisy += sum((high - low) / ratio > 0.3 for low, high, ratio in low_high)
    total = len(rows) + len(low_high)
    if total and noisy > total / 4:
        return f"noisy: the quartiles of {noisy} of {total} figures lie far apart; something else may run beside"
    return None
