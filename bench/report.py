"""A report to read or to pass on: one file of HTML with its figures in it, or Markdown with images beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .plots import draw_all
from .results import Result, by_title, is_noisy

CAPTIONS = {
    "ratios": "A bar to the right of 1: the peer takes that many times as long as fused_optim in the same round.",
    "pace": "A bar: the time of a step. The stroke: the time of a copy of as many bytes, between the same steps. On a "
    "CPU a copy also reads what it overwrites, which a step has read anyway: a step can then end before the stroke.",
    "roofline": "The line: a copy that moves as many bytes, between the same steps. On a CPU a copy also reads what it "
    "overwrites, which a step has read anyway: a step can then lie below the line.",
    "groups": "Host time: on a CPU of a step with two elements a tensor, on a GPU the time until the call returns.",
    "scaling": "40 equal matrices in one group.",
}
ZERO_WIDTH_SPACE = "\u200b"  # where a cell may be parted
# Below 66rem a row of a table is a card, whose lines are the columns.
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222;
  background: #fff; overflow-wrap: anywhere }
table { border-collapse: collapse; font-size: 12px; margin: 1rem 0; max-width: 100% }
th, td { padding: .25rem .35rem; border-bottom: 1px solid #ddd; text-align: right; overflow-wrap: normal }
td { white-space: nowrap } td.wraps { white-space: normal }
th { vertical-align: bottom; line-height: 1.25 }
th:first-child, td:first-child { text-align: left; white-space: normal }
tr.ours { font-weight: 600 }
figure { margin: 1rem 0; overflow-x: auto } img { max-width: 100%; min-width: 40rem }
figcaption, .small { color: #666; font-size: 13px }
h1 { font-size: 1.6rem } h2 { margin-top: 2.5rem; font-size: 1.25rem }
@media (max-width: 66rem) {
  thead { display: none }
  table, tbody, tr, td { display: block }
  tr { margin: 0 0 1rem; border-top: 2px solid #bbb }
  td { display: flex; justify-content: space-between; gap: 1rem; white-space: normal }
  td::before { content: attr(data-label); color: #666; font-weight: 400; text-align: left }
  td:empty { display: none } td:first-child { font-weight: 600 } td:first-child::before { content: none }
}
"""


def check_output(path: Path) -> None:
    """Refuse a report that could not be written, before an hour of measuring.

    Raises:
        ValueError: the ending is not .html or .md, or matplotlib is missing.
    """
    if path.suffix not in (".html", ".md"):
        raise ValueError(f"--report {path}: the name of a report ends in .html or .md")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("a report needs matplotlib: pip install matplotlib") from None


def write_report(result: Result, path: Path) -> None:
    """Write a result with its tables and figures to an .html or .md file.

    Raises:
        ValueError: another ending, matplotlib is missing, or the result has no figures at all.
    """
    check_output(path)
    if not result["cases"] and not result["grid"]:
        raise ValueError(f"{path}: the result is empty: nothing was measured")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        path.write_text(as_html(result))
        return
    images = {}
    for name, data in draw_all(result, "png").items():
        beside = path.with_name(f"{path.stem}-{name}.png")
        beside.write_bytes(data)
        images[name] = beside.name
    path.write_text(as_markdown(result, images))


def introduction(result: Result) -> list[str]:
    machine, protocol = result["machine"], result["protocol"]
    said = [", ".join(f"{key} {value}" for key, value in machine.items()) + "."]
    if protocol.get("command"):
        said.append(f"Command: python -m fused_optim.bench {protocol['command']}")
    if protocol.get("load_average") is not None:
        said.append(f"Processes that wanted a core in the minute before the run: {protocol['load_average']}.")
    if result["interrupted"]:
        said.append("The run was interrupted: this is what was measured until then.")
    if noise := is_noisy(result):
        said.append(f"The run is {noise}.")
    return said


CASE_HEADINGS = ("case", "beside", "ours [µs]", "peer [µs]", "times as fast", "quartiles")


def case_cells(case: dict[str, Any]) -> list[str]:
    low, high = case["ratio_quartiles"]
    times = [f"{case[key]:,.0f}" for key in ("ours_us", "peer_us")]
    return [case["case"], case["peer"], *times, f"{case['ratio']:.2f}", f"{low:.2f}–{high:.2f}"]


def figure_of(key: str, form: str = ",.1f", divide: float = 1.0) -> Callable[[dict[str, Any]], str]:
    return lambda row: "" if row.get(key) is None else format(row[key] / divide, form)


def pace_of(row: dict[str, Any]) -> str:
    return "" if row.get("bytes_moved") is None else f"{row['bytes_moved'] / row['step_us'] / 1e3:,.1f}"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "contender": lambda row: row["contender"] + ("\u00a0*" if row["noisy"] else ""),
    "step [µs]": figure_of("wall_us"),
    "quartiles [µs]": lambda row: f"–{ZERO_WIDTH_SPACE}".join(f"{value:,.1f}" for value in row["wall_quartiles_us"]),
    "ours is x times as fast": figure_of("ours_times_as_fast", ".2f"),
    "device [µs]": figure_of("device_us"),
    "host [µs]": figure_of("host_us"),
    "host a tensor [µs]": figure_of("host_us_per_tensor", ".2f"),
    "launches": figure_of("launches", ",.0f"),
    "moved [MB]": figure_of("bytes_moved", ",.1f", 1e6),
    "GB/s": pace_of,
    "of copy": figure_of("share_of_copy", ".0%"),
    "state [B/param]": figure_of("state_bytes_per_parameter"),
    "temporary [MB]": figure_of("temporary_bytes", ",.1f", 1e6),
    "peak [MB]": figure_of("peak_bytes", ",.1f", 1e6),
    "max error": figure_of("max_error", ".1e"),
}


def grid_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of what was measured of a case; a column that has nothing to show is left out."""
    shown = [row for row in rows if "wall_us" in row]
    columns = {heading: [cell(row) for row in shown] for heading, cell in COLUMNS.items()}
    kept = {heading: cells for heading, cells in columns.items() if any(cells)}
    return list(kept), [list(cells) for cells in zip(*kept.values())]


def remarks(rows: list[dict[str, Any]]) -> list[str]:
    said = []
    for row in rows:
        if row["status"] != "measured":
            said.append(f"{row['contender']}: {row['status']}: {row['reason']}")
            continue
        words = [row["library"] if not row["ours"] else "", row["note"], row["reason"]]
        words.append("writes into the gradients" if row.get("writes_gradients") else "")
        if any(words):
            said.append(f"{row['contender']}: {'; '.join(word for word in words if word)}")
    if any(row.get("noisy") for row in rows):
        said.append("* noisy: the quartiles lie more than 15 % of the median apart")
    return said


def subtitle(row: dict[str, Any]) -> str:
    return f"{row['parameters']:,} parameters in {row['tensors']:,} tensors and {row['groups']:,} groups"


EXPLANATION = (
    "Step: wall time, median. Max error: the largest difference of a parameter from the same optimizer in float64 "
    "after three steps of a small model with parameters in [-1, 1]. Moved: parameters and states read and written "
    "once, gradients read once. Temporary: what a step takes from torch's allocator beside what it has."
)


def as_html(result: Result) -> str:
    def cell(heading: str, text: str) -> str:
        wraps = ' class="wraps"' if ZERO_WIDTH_SPACE in text else ""
        return f'<td data-label="{html.escape(heading)}"{wraps}>{html.escape(text)}</td>'

    def table(headings: Sequence[str], rows: list[tuple[list[str], str]]) -> str:
        head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
        body = "\n".join(f'<tr class="{kind}">{"".join(map(cell, headings, cells))}</tr>' for cells, kind in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"

    parts = [f"<p>{html.escape(line)}</p>" for line in introduction(result)]
    for name, data in draw_all(result, "svg").items():
        image = base64.b64encode(data).decode()
        caption = html.escape(CAPTIONS[name])
        source = f"data:image/svg+xml;base64,{image}"
        parts.append(f'<figure><img alt="{name}" src="{source}"><figcaption>{caption}</figcaption></figure>')
    if result["cases"]:
        parts.append("<h2>Named cases</h2>")
        parts.append(table(CASE_HEADINGS, [(case_cells(case), "") for case in result["cases"]]))
    for title, rows in by_title(result).items():
        parts.append(f'<h2>{html.escape(title)}</h2><p class="small">{html.escape(subtitle(rows[0]))}</p>')
        kinds = ["ours" if row["ours"] else "" for row in rows if "wall_us" in row]
        headings, cells = grid_table(rows)
        if cells:
            parts.append(table(headings, list(zip(cells, kinds))))
        parts += [f'<div class="small">{html.escape(line)}</div>' for line in remarks(rows)]
    if result["grid"]:
        parts.append(f'<p class="small">{html.escape(EXPLANATION)}</p>')
    body = "\n".join(parts)
    title = f"fused_optim.bench, {result['machine']['date']}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def as_markdown(result: Result, images: dict[str, str]) -> str:
    def table(headings: Sequence[str], rows: list[list[str]]) -> str:
        lines = [headings, ["---"] * len(headings), *rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines)

    parts = [f"# fused_optim.bench, {result['machine']['date']}", *introduction(result)]
    parts += [f"![{name}]({file})\n\n{CAPTIONS[name]}" for name, file in images.items()]
    if result["cases"]:
        parts += ["## Named cases", table(CASE_HEADINGS, [case_cells(case) for case in result["cases"]])]
    for title, rows in by_title(result).items():
        parts += [f"## {title}", subtitle(rows[0])]
        headings, cells = grid_table(rows)
        if cells:
            parts.append(table(headings, cells))
        parts.append("\n".join(f"- {line}" for line in remarks(rows)))
    if result["grid"]:
        parts.append(EXPLANATION)
    return "\n\n".join(part for part in parts if part) + "\n"
