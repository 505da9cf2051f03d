"""Rows of an acceptance run: what was looked at, pass or fail or a mere figure, and the goal.

at_most("log-prob against float64", error, 1e-3)       pass or fail; NaN fails
figure("step", "812 ms")                               no goal
skipped("Liger", "not installed")                      with its reason
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

VERDICTS = ("pass", "fail", "figure", "skipped")


@dataclass
class Row:
    name: str
    verdict: str
    figure: str
    goal: str = ""


def at_most(name: str, value: float, limit: float, unit: str = "", note: str = "") -> Row:
    """Passes up to the limit; what cannot be compared, NaN, fails."""
    return _judged(name, value, value <= limit, f"≤ {limit:g}{unit}", unit, note)


def at_least(name: str, value: float, limit: float, unit: str = "", note: str = "") -> Row:
    """Passes from the limit on; what cannot be compared, NaN, fails."""
    return _judged(name, value, value >= limit, f"≥ {limit:g}{unit}", unit, note)


def holds(name: str, true: bool, what: str) -> Row:
    """A yes or no."""
    return Row(name, "pass" if true else "fail", what, "yes")


def _judged(name: str, value: float, good: bool, goal: str, unit: str, note: str) -> Row:
    figure = f"{value:.3g}{unit}" + (f" ({note})" if note else "")
    return Row(name, "pass" if good else "fail", figure, goal)


def figure(name: str, what: str) -> Row:
    return Row(name, "figure", what)


def skipped(name: str, reason: str) -> Row:
    return Row(name, "skipped", reason)


def run_section(title: str, section: Callable[[], list[Row]], deadline: float) -> list[Row]:
    """The section's rows. What it raises is a failed row, what comes too late a skipped one."""
    if time.monotonic() > deadline:
        return [skipped(title, "the time was over")]
    try:
        return section()
    except Exception as error:  # the sections behind it must still be seen
        return [Row(title, "fail", f"{type(error).__name__}: {first_line(error)}")]


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200].replace("|", "/")


def failures(sections: dict[str, list[Row]]) -> int:
    return sum(row.verdict == "fail" for rows in sections.values() for row in rows)


def page(title: str, notes: list[str], sections: dict[str, list[Row]]) -> str:
    """Markdown: counts of verdicts, then a table per section."""
    rows = [row for section in sections.values() for row in section]
    counts = [f"{sum(r.verdict == v for r in rows)} {v}" for v in VERDICTS]
    lines = [f"# {title}", "", *notes, "", ", ".join(counts) + "."]
    for name, section in sections.items():
        lines += ["", f"## {name}", "", "| | verdict | | goal |", "|---|---|---|---|"]
        for row in section:
            verdict = f"**{row.verdict}**" if row.verdict == "fail" else row.verdict
            lines.append(f"| {row.name} | {verdict} | {row.figure} | {row.goal} |")
    return "\n".join(lines) + "\n"
