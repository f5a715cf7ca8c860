"""The figures of a report."""

from __future__ import annotations

import io
from typing import Any

from .results import Result, measured

Row = dict[str, Any]
OURS, THEIRS = "#c0392b", "#7f8c8d"
COLOURS = ("#2c6fbb", "#e08e0b", "#2e8b57", "#7d3c98", "#16a085", "#8d6e63", "#d81b60", "#546e7a", "#9e9d24", "#00838f")
MARKERS = ("o", "s", "^", "v")
MOST_BARS = 60


class NoFigure(Exception):
    """A result has nothing that a figure could show."""


def new_axes(height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def style_of(names: list[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each contender: ours red diamonds, the eager path hollow."""
    styles: dict[str, dict[str, Any]] = {}
    for name in names:
        if name.startswith("fused_optim"):
            hollow = {"markerfacecolor": "none", "linestyle": "--"} if name.endswith("/eager") else {}
            styles[name] = {"color": OURS, "marker": "D", "markersize": 6, "linewidth": 2, "zorder": 4, **hollow}
        else:
            place = sum(not known.startswith("fused_optim") for known in styles)
            marker = MARKERS[place // len(COLOURS) % len(MARKERS)]
            colour = COLOURS[place % len(COLOURS)]
            styles[name] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.2, "zorder": 3}
    return styles


def ratio_bars(result: Result) -> Any:
    """How many times as long as ours each peer takes."""
    bars: list[tuple[str, float, list[float]]] = [
        (f"{case['case']}\n{case['peer']}", case["ratio"], case["ratio_quartiles"]) for case in result["cases"]
    ]
    shown = [row for row in measured(result) if "ours_times_as_fast" in row]
    differ = [key for key in ("optimizer", "model", "dtype") if len({row[key] for row in shown}) > 1]
    for row in shown:
        name = ", ".join([*(row[key] for key in differ), row["contender"]])
        bars.append((name, row["ours_times_as_fast"], row["ours_times_as_fast_quartiles"]))
    if not bars:
        raise NoFigure
    left_out = max(0, len(bars) - MOST_BARS)
    bars = bars[:MOST_BARS][::-1]
    figure, axes = new_axes(1.2 + (0.42 if result["cases"] else 0.26) * len(bars))
    values = [value for _, value, _ in bars]
    errors = [[max(0.0, v - q[0]) for _, v, q in bars], [max(0.0, q[1] - v) for _, v, q in bars]]
    colours = [OURS if value >= 1 else THEIRS for value in values]
    axes.barh(range(len(bars)), [value - 1 for value in values], left=1, color=colours, height=0.7)
    axes.errorbar(values, range(len(bars)), xerr=errors, fmt="none", ecolor="#222222", elinewidth=1, capsize=2)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars], fontsize=8)
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.set_xscale("log")
    low, high = min(0.8, *(q[0] for _, _, q in bars)), max(2.0, *(q[1] for _, _, q in bars))
    axes.set_xlim(low / 1.1, high * 1.6)
    axes.set_xticks(ticks_between(low, high))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    for place, (_, value, quartile) in enumerate(bars):
        axes.text(max(1, value, quartile[1]) * 1.05, place, f"{value:.2f}", va="center", fontsize=8)
    axes.axvline(1, color="#222222", linewidth=1)
    axes.set_xlabel("times as long as fused_optim's step (logarithmic; whiskers: quartiles)")
    more = f" (the first {MOST_BARS} of {MOST_BARS + left_out})" if left_out else ""
    axes.set_title(f"How many times as fast fused_optim is{more}", loc="left")
    return figure


def ticks_between(low: float, high: float) -> list[float]:
    steps = [mantissa * 10.0**power for power in range(-3, 6) for mantissa in (1, 2, 5)]
    return [step for step in steps if low / 1.1 <= step <= high * 1.6]


def pace(result: Result) -> Any:
    """One model: the time of each contender's step, and the time in which a copy moves the step's bytes."""
    rows = [row for row in measured(result) if row.get("bytes_moved") and row.get("copy_bytes_per_second")]
    if len({row["model"] for row in rows}) != 1:
        raise NoFigure
    rows = rows[:MOST_BARS][::-1]
    differ = [key for key in ("optimizer", "dtype") if len({row[key] for row in rows}) > 1]
    figure, axes = new_axes(1.4 + 0.32 * len(rows))
    places = range(len(rows))
    times = [row["step_us"] for row in rows]
    bytes_at_pace = [row["bytes_moved"] / row["copy_bytes_per_second"] * 1e6 for row in rows]
    axes.barh(places, times, color=[OURS if row["ours"] else THEIRS for row in rows], height=0.66, label="a step")
    axes.scatter(bytes_at_pace, places, marker="|", s=260, color="#222222", zorder=5, label="a copy of its bytes")
    for place, row, least in zip(places, rows, bytes_at_pace):
        moved = f"{row['bytes_moved'] / 1e6:,.1f} MB, {row['bytes_moved'] / row['step_us'] / 1e3:,.1f} GB/s"
        share = f"{100 * least / row['step_us']:.0f} % of the copy's pace"
        axes.text(max(row["step_us"], least), place, f"  {moved}, {share}", va="center", fontsize=8)
    names = [", ".join([*(row[key] for key in differ), row["contender"]]) for row in rows]
    axes.set_yticks(places, names, fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xscale("log")
    axes.set_xlim(min(*times, *bytes_at_pace) / 3, max(*times, *bytes_at_pace) * 12)  # room for the text
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.set_xlabel("time [µs], logarithmic")
    axes.set_title(f"{rows[0]['model']}: the bytes of a step, and the time that they take", loc="left")
    return figure


def roofline(result: Result) -> Any:
    """Several models: step time against the bytes that a step must move, and the pace of a copy."""
    rows = [row for row in measured(result) if row.get("bytes_moved")]
    if len({row["model"] for row in rows}) < 2:
        raise NoFigure
    figure, axes = new_axes(5.5)
    names = list(dict.fromkeys(row["contender"] for row in rows))
    for name, style in style_of(names).items():
        points = [(row["bytes_moved"] / 1e6, row["step_us"]) for row in rows if row["contender"] == name]
        axes.plot(*zip(*points), label=name, **{**style, "linestyle": ""})
    paces = {row["bytes_moved"]: row["copy_bytes_per_second"] for row in rows if "copy_bytes_per_second" in row}
    if paces:
        curve = sorted(paces.items())
        (first, first_pace), (last, last_pace) = curve[0], curve[-1]
        curve = [(first / 3, first_pace), *curve, (last * 3, last_pace)]  # a decade at least
        low, high = min(paces.values()) / 1e9, max(paces.values()) / 1e9
        axes.plot(
            [size / 1e6 for size, _ in curve],
            [size / pace * 1e6 for size, pace in curve],
            color="#222222",
            linewidth=1.2,
            label=f"copy: {low:,.0f}–{high:,.0f} GB/s" if len(paces) > 1 else f"copy: {high:,.0f} GB/s",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("bytes that a step must move [MB]")
    axes.set_ylabel("time of a step [µs]")
    axes.set_title("Roofline: the nearer to the line, the more of the memory's pace is used", loc="left")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def lines(
    result: Result, prefix: str, x: str, y: str, xlabel: str, ylabel: str, title: str, divide: float = 1.0
) -> Any:
    """A line a contender over the models whose names begin with the prefix; the first optimizer and dtype of each."""
    rows = [row for row in measured(result) if row["model"].startswith(prefix) and row.get(y) is not None]
    kinds = list(dict.fromkeys((row["optimizer"], row["dtype"]) for row in rows))
    rows = [row for row in rows if kinds and (row["optimizer"], row["dtype"]) == kinds[0]]
    if len({row[x] for row in rows}) < 2:
        raise NoFigure
    figure, axes = new_axes(4.8)
    names = list(dict.fromkeys(row["contender"] for row in rows))
    for name, style in style_of(names).items():
        points = sorted((row[x] / divide, row[y]) for row in rows if row["contender"] == name)
        axes.plot(*zip(*points), label=name, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(f"{title} ({kinds[0][0]}, {kinds[0][1]})", loc="left")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def host_against_groups(result: Result) -> Any:
    return lines(
        result,
        "groups-",
        "groups",
        "host_us",
        "param groups, 1,000 tensors in all",
        "host time of a step [µs]",
        "What param groups cost the host",
    )


def scaling(result: Result) -> Any:
    return lines(
        result,
        "dense-",
        "parameters",
        "step_us",
        "parameters [millions]",
        "time of a step [µs]",
        "Scaling with the number of parameters",
        divide=1e6,
    )


FIGURES = {
    "ratios": ratio_bars,
    "pace": pace,
    "roofline": roofline,
    "groups": host_against_groups,
    "scaling": scaling,
}


def draw_all(result: Result, form: str = "svg") -> dict[str, bytes]:
    """Each figure that the result has something for, as the bytes of an image."""
    from matplotlib import pyplot

    drawn = {}
    for name, draw in FIGURES.items():
        try:
            figure = draw(result)
        except NoFigure:
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, dpi=110, metadata={"Date": None} if form == "svg" else None)
        pyplot.close(figure)
        drawn[name] = buffer.getvalue()
    return drawn
