"""The whole catalogue in a report: retriever alone, retriever + every method, and the ceiling.

Read from RUN/two_stage/STAGE/RETRIEVER.json, which studies.two_stage writes: the target's place for
every test user. Gains are averaged over the runs of a method. Legend: n users, M measures."""

from collections import defaultdict
from pathlib import Path

import numpy as np

from common import read_json, reading
from studies.methods import Method
from studies.two_stage import MODEL, gain_columns

REST = ("+ optimum", "ceiling", "optimum")  # how names of rows begin that need no model
Places = dict[str, np.ndarray]  # row of studies.two_stage -> (n,)


def read_places(file: Path) -> tuple[Places, int]:
    """Row -> places (n,) from 1, and the number of items; ValueError names the file."""
    content = read_json(file)
    with reading(file):
        items, places = content["items"], {}
        if type(items) is not int:
            raise TypeError("items is a number")
        for name, values in content["places"].items():
            if not values or not all(type(v) is int and 1 <= v <= items for v in values):
                raise TypeError("places are numbers from 1 to items")
            places[name] = np.array(values, np.int64)
        if {len(values) for values in places.values()} != {len(places["retriever"])}:
            raise TypeError("every row has as many users as the retriever's")
    return places, items


def by_retriever(methods: dict[str, Method]) -> dict[str, tuple[dict[str, list[Places]], int]]:
    """Retriever -> (name of a method -> places of each of its runs, number of items).

    ValueError unless a retriever had the same users and the same order everywhere."""
    found, first = {}, {}
    for method in methods.values():
        for result in method.results:
            folder = result.run / "two_stage" / result.stage
            for file in sorted(folder.glob("*.json")):
                places, items = read_places(file)
                alone = places["retriever"]
                usual, where = first.setdefault(file.stem, (alone, file))
                if not np.array_equal(alone, usual):
                    raise ValueError(
                        f"{file}: other users, or another order of the retriever, than in {where}; "
                        "measure both again with the same --users"
                    )
                groups, _ = found.setdefault(file.stem, (defaultdict(list), items))
                groups[method.name].append(places)
    return found


def rows_of(
    retriever: str, groups: dict[str, list[Places]]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Row of the report -> gains (n, M), and of a method's rows -> how many training runs."""
    every: Places = {}  # of rows that do not depend on the method any run's will do
    for group in groups.values():
        for places in group:
            every |= places
    rows, counts = {f"{retriever} alone": gain_columns(every["retriever"])}, {}
    for method, group in groups.items():
        for name in sorted_names(every, MODEL):
            runs = [gain_columns(places[name]) for places in group if name in places]
            if runs:
                shown = name.replace("model", method, 1)
                rows[shown], counts[shown] = np.mean(runs, axis=0), str(len(runs))
    for beginning in REST:  # the same for every method
        for name in sorted_names(every, beginning):
            rows[name] = gain_columns(every[name])
    return rows, counts


def sorted_names(rows: Places, beginning: str) -> list[str]:
    """Rows of one kind by rising N."""
    return sorted((name for name in rows if name.startswith(beginning)), key=lambda n: (len(n), n))
