"""Sections of a report beyond the paper's tables: other lists, the whole catalogue, popularity,
more negatives."""

from pathlib import Path

from loaders.lists import KINDS
from studies import two_stage
from studies.catalogue import by_retriever, rows_of
from studies.lists import list_rows
from studies.methods import Method
from studies.negatives import COLUMNS, negative_rows
from studies.pictures import pyplot
from studies.popularity import MEASURES, Beyond, draw_reliability


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def lists_section(methods: dict[str, Method]) -> list[str]:
    rows = list_rows(methods)
    if not rows:
        return []
    text = (
        "HR@1 ranked first of the same users among 19 uniform, popular or retrieved items "
        "(Markov's best that the user never touched). Training is that of the run."
    )
    return ["## Harder lists", text, markdown_table(["method", *KINDS], rows)]


def catalogue_section(methods: dict[str, Method]) -> list[str]:
    parts = []
    for retriever, (groups, items) in by_retriever(methods).items():
        rows, runs = rows_of(retriever, groups)
        result = two_stage.paired_figures(rows, [name for name in rows if name in runs])
        figures = [[*cells, runs.get(cells[0], "")] for cells in two_stage.figure_rows(result)]
        differences = two_stage.difference_rows(result)
        n, columns = len(rows[f"{retriever} alone"]), list(two_stage.MEASURES)
        parts += [
            f"**{retriever}** retrieves N of {items:,} items for {n:,} test users:",
            markdown_table(["", *columns, "runs"], figures),
            f"Minus {retriever} alone, over the same users; each column holds together "
            "(Holm, 95 %):",
            markdown_table(["difference", *columns], differences),
        ]
    if not parts:
        return []
    text = (
        "Where the target comes among all items that the history does not hold. A model ranks the "
        "N items that a retriever puts first; the ceiling puts a retrieved target first always. "
        "Intervals resample users."
    )
    return ["## The whole catalogue", text, *parts]


def popularity_section(beyond: Beyond) -> list[str]:
    text = (
        "First places of the test users, ranked by log-prob; popularity as training counts it. "
        "Intervals resample users; the changes hold together (Holm, 95 %)."
    )
    if beyond.catalogue is None:
        text += " The prepared examples are not at hand, so nothing is known of popularity."
    columns = list(MEASURES.values())
    parts = [
        "## Beyond accuracy",
        text,
        markdown_table(["method", "runs", *columns], beyond.rows()),
    ]
    changes = beyond.change_rows()
    if changes:
        parts += ["Change from SFT, over the same users and seeds:"]
        parts += [markdown_table(["change", *columns], changes)]
    return parts


def negatives_section(methods: dict[str, Method]) -> list[str]:
    rows = negative_rows(methods)
    if not rows:
        return []
    text = (
        "K rejected titles per prompt. Means over runs (lowest to highest run); training figures "
        "are those of the last tenth of the steps."
    )
    return ["## More negatives", text, markdown_table(COLUMNS, rows)]


def more_sections(methods: dict[str, Method], folder: Path) -> tuple[str, list[tuple[str, str]]]:
    """Markdown, and (file, title) of the pictures drawn into the folder."""
    beyond = Beyond.of(methods)
    parts = lists_section(methods) + catalogue_section(methods)
    parts += popularity_section(beyond) + negatives_section(methods)
    plt, drawn = pyplot(), []
    if plt and draw_reliability(plt, beyond, folder / "calibration.png"):
        drawn.append(("calibration.png", "How often the first place is right"))
    return "\n\n".join(parts), drawn
