"""The result in the terminal."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from .shapes import Model

Row = dict[str, Any]


def model_table(models: list[Model]) -> Table:
    table = Table(title="Models: bench step --model NAME, bench shapes NAME")
    for heading in ("name", "parameters", "tensors", "groups", "what"):
        table.add_column(heading, justify="left" if heading in ("name", "what") else "right")
    for model in models:
        table.add_row(model.name, f"{model.numel:,}", f"{model.tensors:,}", f"{len(model.groups):,}", model.source)
    return table


def number(value: float | None, form: str = ",.0f") -> str:
    return "" if value is None else format(value, form)


def microseconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.{0 if value >= 100 else 1}f}"


def case_table(cases: list[Row], threads: int) -> Table:
    table = Table(title=f"Optimizer steps side by side, {threads} threads")
    for heading in ("case", "beside", "ours [µs]", "peer [µs]", "times as fast", "quartiles"):
        table.add_column(heading, justify="left" if heading in ("case", "beside") else "right")
    for case in cases:
        low, high = case["ratio_quartiles"]
        times = (f"{us:,.0f}" for us in (case["ours_us"], case["peer_us"]))
        table.add_row(case["case"], case["peer"], *times, f"{case['ratio']:.2f}", f"{low:.2f}–{high:.2f}")
    return table


def grid_table(title: str, rows: list[Row]) -> Table:
    """One case of the grid: a line a contender."""
    first = rows[0]
    on_cuda = first["device"] == "cuda"
    what = f"{first['parameters'] / 1e6:,.1f} M parameters in {first['tensors']:,} tensors, {first['groups']:,} groups"
    table = Table(title=f"{title}: {what}", caption_justify="left")
    headings = ["contender", "step [µs]", "quartiles", "ours is"]
    headings += ["device [µs]", "launches"] if on_cuda else []
    headings += ["host [µs]", "a tensor", "GB/s", "of copy", "state B/param", "temp. MB", "max error"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "contender" else "right", no_wrap=heading != "contender")
    told = []
    for row in rows:
        name = f"{row['contender']} *" if row.get("noisy") else row["contender"]
        if row["note"] and row["status"] == "measured":
            told.append(f"{row['contender']}: {row['note']}")
        if row["status"] != "measured" or "wall_us" not in row:
            told.append(f"{row['contender']}: {row['status']}: {row['reason']}")
            table.add_row(name, row["status"], style="dim")
            continue
        if row["reason"]:
            told.append(f"{row['contender']}: {row['reason']}")
        if row.get("writes_gradients"):
            told.append(f"{row['contender']}: writes into the gradients")
        ratio = row.get("ours_times_as_fast")
        cells = [
            name,
            microseconds(row["wall_us"]),
            "–".join(microseconds(value) for value in row["wall_quartiles_us"]),
            "" if ratio is None else f"{ratio:.2f} x",
        ]
        if on_cuda:
            cells += [microseconds(row.get("device_us")), number(row.get("launches"))]
        moved = row.get("bytes_moved")
        cells += [
            microseconds(row.get("host_us")),
            number(row.get("host_us_per_tensor"), ".2f"),
            "" if moved is None else f"{moved / row['step_us'] / 1e3:,.1f}",
            "" if "share_of_copy" not in row else f"{100 * row['share_of_copy']:.0f} %",
            number(row.get("state_bytes_per_parameter"), ".1f"),
            "" if "temporary_bytes" not in row else f"{row['temporary_bytes'] / 1e6:,.1f}",
            number(row.get("max_error"), ".1e"),
        ]
        table.add_row(*cells, style="bold" if row["ours"] else None)
    if any(row.get("noisy") for row in rows):
        told.append("* noisy: the quartiles lie more than 15 % of the median apart")
    table.caption = escape("\n".join(told)) or None
    return table
