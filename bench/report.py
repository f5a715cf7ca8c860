"""A report to read or to pass on: one file of HTML with its figures in it, or Markdown with images beside it."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from .plots import draw_all
from .results import Result, by_title, is_noisy

CAPTIONS = {
    "ratios": "A bar to the right of 1: the peer takes that many times as long as fused_optim in the same round.",
    "roofline": "The line: a copy that moves as many bytes, between the same steps. On a CPU a copy also reads what it "
    "overwrites, which a step has read anyway: a step can then lie below the line.",
    "groups": "Host time: on a CPU of a step with two elements a tensor, on a GPU the time until the call returns.",
    "scaling": "40 equal matrices in one group.",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0 }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child, td.text { text-align: left }
td.text { white-space: normal }
tr.ours { font-weight: 600 } tr.absent { color: #888 }
img { max-width: 100% } figcaption, .small { color: #666; font-size: 13px }
h2 { margin-top: 2.5rem } .overflow { overflow-x: auto }
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


HEADINGS = (
    "contender",
    "step [µs]",
    "quartiles [µs]",
    "ours is x times as fast",
    "device [µs]",
    "host [µs]",
    "host a tensor [µs]",
    "launches",
    "moved [MB]",
    "GB/s",
    "of copy",
    "state [B/param]",
    "temporary [MB]",
    "peak [MB]",
    "max error",
)


def grid_cells(row: dict[str, Any]) -> list[str]:
    def cell(key: str, form: str = ",.1f", divide: float = 1.0) -> str:
        return "" if row.get(key) is None else format(row[key] / divide, form)

    if "wall_us" not in row:
        return [row["contender"], row["status"], *[""] * (len(HEADINGS) - 2)]
    low, high = row["wall_quartiles_us"]
    moved = row.get("bytes_moved")
    return [
        row["contender"] + (" *" if row["noisy"] else ""),
        cell("wall_us"),
        f"{low:,.1f}–{high:,.1f}",
        cell("ours_times_as_fast", ".2f"),
        cell("device_us"),
        cell("host_us"),
        cell("host_us_per_tensor", ".2f"),
        cell("launches", ",.0f"),
        cell("bytes_moved", ",.1f", 1e6),
        "" if moved is None else f"{moved / row['step_us'] / 1e3:,.1f}",
        cell("share_of_copy", ".0%"),
        cell("state_bytes_per_parameter"),
        cell("temporary_bytes", ",.1f", 1e6),
        cell("peak_bytes", ",.1f", 1e6),
        cell("max_error", ".1e"),
    ]


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
    def table(headings: tuple[str, ...], rows: list[tuple[list[str], str]]) -> str:
        head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
        body = "\n".join(
            f'<tr class="{kind}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
            for cells, kind in rows
        )
        return f'<div class="overflow"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'

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
        kinds = [("ours" if row["ours"] else "") if "wall_us" in row else "absent" for row in rows]
        parts.append(table(HEADINGS, list(zip(map(grid_cells, rows), kinds))))
        parts += [f'<div class="small">{html.escape(line)}</div>' for line in remarks(rows)]
    if result["grid"]:
        parts.append(f'<p class="small">{html.escape(EXPLANATION)}</p>')
    body = "\n".join(parts)
    title = f"fused_optim.bench, {result['machine']['date']}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def as_markdown(result: Result, images: dict[str, str]) -> str:
    def table(headings: tuple[str, ...], rows: list[list[str]]) -> str:
        lines = [headings, ["---"] * len(headings), *rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines)

    parts = [f"# fused_optim.bench, {result['machine']['date']}", *introduction(result)]
    parts += [f"![{name}]({file})\n\n{CAPTIONS[name]}" for name, file in images.items()]
    if result["cases"]:
        parts += ["## Named cases", table(CASE_HEADINGS, [case_cells(case) for case in result["cases"]])]
    for title, rows in by_title(result).items():
        parts += [f"## {title}", subtitle(rows[0]), table(HEADINGS, [grid_cells(row) for row in rows])]
        parts.append("\n".join(f"- {line}" for line in remarks(rows)))
    if result["grid"]:
        parts.append(EXPLANATION)
    return "\n\n".join(part for part in parts if part) + "\n"
