"""Two result files: what has become slower."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from .results import Result, measured, title_of

# Where one of these differs, times are of different things, and only ratios to peers say something.
SAME_MACHINE = ("cpu", "gpu", "threads", "torch")


class Figure(NamedTuple):
    """A time in microseconds, or how many times as fast ours is, with its quartiles where they are known."""

    value: float
    low: float
    high: float


class Change(NamedTuple):
    """One figure of ours in both files; ``slower`` is the factor by which it has become slower."""

    what: str
    before: Figure
    after: Figure
    slower: float
    regressed: bool


@dataclass
class Comparison:
    changes: list[Change]
    by_ratio: bool
    threshold: float
    remarks: list[str] = field(default_factory=list)

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.regressed]

    def table(self) -> Table:
        unit = "times as fast as the peer" if self.by_ratio else "µs a step"
        table = Table(title=f"B against A: {unit}")
        for heading in ("case", "A", "B", "B takes", ""):
            table.add_column(heading, justify="left" if heading in ("case", "") else "right")
        form = ",.2f" if self.by_ratio else ",.1f"
        for change in self.changes:
            word = "regression" if change.regressed else ""
            cells = (escape(change.what), format(change.before.value, form), format(change.after.value, form))
            table.add_row(*cells, f"{change.slower:.2f} x", word, style="red" if change.regressed else None)
        return table


def times(result: Result) -> Iterator[tuple[str, Figure]]:
    """Our step times."""
    for case in result["cases"]:
        us = case["ours_us"]
        low, high = case.get("ours_quartiles_us", (us, us))
        yield case["case"], Figure(us, low, high)
    for row in measured(result):
        if row["ours"]:
            low, high = row.get("device_quartiles_us", row["wall_quartiles_us"])
            yield f"{title_of(row)}: {row['contender']}", Figure(row["step_us"], low, high)


def peer_ratios(result: Result) -> Iterator[tuple[str, Figure]]:
    """How many times as fast ours is, beside each peer."""
    for case in result["cases"]:
        yield f"{case['case']}, beside {case['peer']}", Figure(case["ratio"], *case["ratio_quartiles"])
    for row in measured(result):
        if not row["ours"] and "ours_times_as_fast" in row:
            figure = Figure(row["ours_times_as_fast"], *row["ours_times_as_fast_quartiles"])
            yield f"{title_of(row)}, beside {row['contender']}", figure


def compare_results(before: Result, after: Result, threshold: float) -> Comparison:
    """What has changed from one run to another.

    On one machine our times are compared; runs of different machines, or with other peers beside, by our ratios. A
    regression is slower by more than ``threshold``, and the quartiles of both runs do not overlap.

    Raises:
        ValueError: a threshold below 0, or no case that both have.
    """
    if not threshold >= 0:
        raise ValueError(f"--threshold {threshold} is not a number of 0 or more")
    differ = [key for key in SAME_MACHINE if before["machine"].get(key) != after["machine"].get(key)]
    by_ratio = bool(differ)
    figures: Any = peer_ratios if by_ratio else times
    old, new = dict(figures(before)), dict(figures(after))
    changes = []
    for what in (name for name in old if name in new):
        a, b = old[what], new[what]
        slower = a.value / b.value if by_ratio else b.value / a.value
        apart = b.high < a.low if by_ratio else b.low > a.high
        changes.append(Change(what, a, b, slower, apart and slower > 1 + threshold))
    if not changes:
        raise ValueError("the files have no case in common that is measured in both")
    compared = Comparison(changes, by_ratio, threshold)
    if differ:
        described = ", ".join(f"{key}: {before['machine'].get(key)} and {after['machine'].get(key)}" for key in differ)
        compared.remarks.append(f"The machines differ ({described}): compared are the ratios to the peers.")
    for name, result in (("A", before), ("B", after)):
        if result["interrupted"]:
            compared.remarks.append(f"{name} was interrupted.")
    alone = len(old) + len(new) - 2 * len(changes)
    if alone:
        compared.remarks.append(f"{alone} figures are in one file only.")
    slow = len(compared.regressions)
    compared.remarks.append(f"{slow} of {len(changes)} figures are slower by more than {100 * threshold:g} %.")
    return compared
