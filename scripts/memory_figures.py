"""The tables of what low-memory states cost and do, from bench/results, for README and docs/memory.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
ITEM_SIZES = {"float32": 4, "bfloat16": 2}
OURS = "fused_optim/cpu"

Row = dict[str, Any]


def read(name: str) -> Row:
    found: Row = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def spelled(row: Row) -> str:
    if not row["ours"]:
        return f"{row['contender']}, {row['dtype']} ({row['library']})"
    return (
        f"{row['dtype']}{row['contender'].removeprefix(OURS).replace(', ', ', `', 1)}{'`' * (row['contender'] != OURS)}"
    )


def costs() -> str:
    """A row a setting and peer: bytes a parameter as allocated, and the time of a step."""
    results = [read(path.stem) for path in sorted(RESULTS.glob("cpu-memory-*.json"), reverse=True)]
    rows = [row for result in results for row in result["grid"] if row["status"] == "measured"]
    units = {row["dtype"]: row["wall_us"] for row in rows if row["contender"] == OURS}
    lines = [
        "| AdamW | bytes a parameter | step [µs] (quartiles) | of the first of its dtype |",
        "|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["wall_quartiles_us"]
        held = ITEM_SIZES[row["dtype"]] + row["state_bytes_per_parameter"]
        lines.append(
            f"| {spelled(row)} | {held:.2f} | {row['wall_us']:,.0f} ({low:,.0f}–{high:,.0f}) | "
            f"{row['wall_us'] / units[row['dtype']]:.2f} |"
        )
    rounds = " and ".join(str(row["rounds"]) for row in rows if row["contender"] == OURS)
    machine, first = results[0]["machine"], rows[0]
    lines += [
        "",
        f"Parameter, states and master as allocated; {first['parameters'] / 1e6:.1f} M parameters in "
        f"{first['tensors']} matrices. Medians of {rounds} interleaved rounds on one thread. {machine['cpu']}, "
        f"torch {machine['torch']}, {machine['date']}, commit {machine['commit']}.",
    ]
    return "\n".join(lines)


def updates() -> str:
    """What becomes of single updates: their error, the largest one, and averages after gradients have fallen."""
    result = read("accuracy")
    lines = [
        "| states of float32 parameters | error of updates | largest update | largest after the spike | "
        "root after the fall, 5 / 50 / 95 % |",
        "|---|---|---|---|---|",
    ]
    for row in result["states"]:
        ratios = " / ".join(f"{ratio:.2f}" for ratio in row["root_ratios_after_fall"])
        lines.append(
            f"| {row['setting'].removeprefix('float32, ').replace('8bit', '8 bits')} | {row['update_error']:.3f} | "
            f"{row['largest_update']:.2f} | {row['largest_update_after_spike']:.2f} | {ratios} |"
        )
    machine, steps = result["machine"], result["protocol"]["steps"]
    lines += ["", f"{steps} steps; torch {machine['torch']}, {machine['date']}, commit {machine['commit']}."]
    return "\n".join(lines)


def losses() -> str | None:
    """Final losses beside those of float32 states, without stress and under it; None if none have been measured."""
    result = read("accuracy")
    found = {(row["setting"], row["stress"], row["model"]): row for row in result["trainings"]}
    if not found:
        return None
    columns = list(dict.fromkeys((stress, model) for _, stress, model in found))
    names = {"none": "", "spike": ", a step 10⁴ times too large", "small": ", gradients of 1e-4"}
    lines = [
        f"| AdamW | {' | '.join(model + names[stress] for stress, model in columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for setting in dict.fromkeys(setting for setting, _, _ in found):
        rows = [found.get((setting, *column)) for column in columns]
        (named, *_) = (row for row in rows if row is not None)
        options = f", `{named['options']}`" if named["options"] else ""
        lines.append(f"| {named['dtype']}{options} | {' | '.join(map(loss_of, rows))} |")
    machine, protocol = result["machine"], result["protocol"]
    lines += [
        "",
        f"The loss of float32 states, and how far the others are from it: mean and deviation over {protocol['seeds']} "
        f"seeds of {protocol['steps']} steps; a dash where there was no training; "
        f"torch {machine['torch']}, {machine['date']}, commit {machine['commit']}.",
    ]
    return "\n".join(lines)


def loss_of(row: Row | None) -> str:
    if row is None:
        return "–"
    if row["setting"] == "float32":
        return f"{row['loss']:.4f}"
    return f"{row['beside_float32']:+.4f} ± {row['deviation']:.4f}"


def filled(text: str, name: str, table: str | None) -> str:
    """The text with what stands between two markers replaced; as it was without a table."""
    if table is None:
        return text
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
