"""Retrieve, then rank: figures over the whole catalogue, beside the retriever alone.

    python -m studies.two_stage --run runs/planted-1 --retriever markov --list_sizes 20,50,100
    python -m studies.report runs/planted-1            all stages and retrievers side by side

Leave-last-two as everywhere: a test case is a user's last interaction, if it was liked; its
history is all that lies before. The retriever is fitted on training interactions only and orders
the items that the history does not hold; the model ranks its first N (lists longer than
NUM_CANDIDATES: studies/ranking.py), and what lies behind them keeps the retriever's place. So both
give the target a place among all items, and every figure is of the same users:

    HR@k      the target is among the first k
    NDCG@10   1 / log2(1 + place), 0 behind the tenth; one item is relevant, so the ideal is 1
    MRR       mean of 1 / place
    ceiling   what a ranker that always puts a retrieved target first would get

Differences are paired over users: 95 % intervals by resampling them, Holm's correction over the
list sizes of a figure. On the planted world the best possible order is known: of the same lists,
and of all items. Figures and every user's places go to RUN/two_stage/STAGE/RETRIEVER.json.

Left out: tuning of the retriever; candidates from several retrievers. Legend: E users, I items, M
measures.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import arg, check_options, parse_config, run_cli, writing
from data import NUM_CANDIDATES, Examples
from eval import EvalConfig
from loaders.frozen import Prepared, prepare
from loaders.planted import World, bayes_scores
from loaders.retrieval import Retriever, best_items, training_rows
from runtime.passes import progress
from runtime.policy import free_memory
from runtime.processes import setup_distributed
from runtime.sources import check_run_data, load_source, sources_of, with_run_options
from runtime.stages import write_whole
from studies.ranking import ListRanker, ShownList, rank_long, shown_order
from studies.retrievers import fit_retriever
from studies.statistics import Difference, interval_of, judge, resampled_means

CHUNK = 64  # users whose lists are ranked together
MEASURES = ("HR@1", "HR@5", "HR@10", "NDCG@10", "MRR")
MODEL = "+ model"  # how the names of the model's rows begin


@dataclass(frozen=True)
class TwoStageConfig:
    """Evaluate retriever and model together, over the whole catalogue."""

    run: str = arg("", "run folder of train.py", group="what is evaluated")
    stage: str = arg("", "stage of the run; empty = all finished ones")
    retriever: str = arg(
        "markov",
        "where the lists come from",
        choices=("markov", "item-knn", "popularity", "sasrec"),
    )
    list_sizes: str = arg("20,50,100", "comma-separated lengths of the retrieved lists")
    users: int = arg(0, "test users, the first of the split's random order; 0 = all", at_least=0)
    prepared_dir: str = arg("prepared", "where the run's prepared examples are kept", group="how")
    micro_batch_tokens: int = arg(8192, "padded tokens of one forward pass", at_least=1)
    output_dir: str = arg(
        "", "folder of STAGE/RETRIEVER.json; empty = RUN/two_stage, where studies.report looks"
    )

    def __post_init__(self):
        check_options(self)
        if not self.run:
            raise ValueError("--run is needed: the folder of a run of train.py")
        self.sizes()

    def sizes(self) -> list[int]:
        parts = [part.strip() for part in self.list_sizes.split(",")]
        if not all(part.isdecimal() and int(part) >= 2 for part in parts):
            raise ValueError(f"--list_sizes: expected numbers >= 2, got {self.list_sizes!r}")
        return sorted({int(part) for part in parts})


# ------------------------------------------------------------------------------------------ places
def touched_before(examples: Examples, e: int) -> np.ndarray:
    """Item codes of the history, newest last."""
    interactions, p = examples.interactions, int(examples.position[e])
    return interactions.item[interactions.start[interactions.user[p]] : p].astype(np.int64)


def targets(examples: Examples) -> np.ndarray:
    """(E,) item codes."""
    return np.take_along_axis(examples.candidates, examples.target[:, None], 1)[:, 0]


def place_among_all(scores: np.ndarray, exclude: np.ndarray, target: int) -> int:
    """The target's place from 1 by falling score (I,), equal scores by code; none of `exclude`."""
    allowed = np.ones(len(scores), bool)
    allowed[exclude] = False
    before = scores > scores[target]
    before[:target] |= scores[:target] == scores[target]
    return 1 + int((before & allowed).sum())


def place_in_list(order: np.ndarray, target: int, otherwise: int) -> int:
    """Its place in a ranked list, or the retriever's where the list does not hold it."""
    found = np.flatnonzero(order == target)
    return int(found[0]) + 1 if len(found) else otherwise


def gains(places: np.ndarray) -> dict[str, np.ndarray]:
    """Places (E,) from 1 -> every measure (E,)."""
    values = {f"HR@{k}": (places <= k).astype(float) for k in (1, 5, 10)}
    values["NDCG@10"] = np.where(places <= 10, 1 / np.log2(1 + places), 0.0)
    return values | {"MRR": 1 / places}


def gain_columns(places: np.ndarray) -> np.ndarray:
    """(E,) -> (E, M)."""
    values = gains(places)
    return np.stack([values[measure] for measure in MEASURES], 1)


def retrieved(
    retriever: Retriever, examples: Examples, size: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """(E,) places of the targets by the retriever alone, and its lists of up to `size` items."""
    places, lists = [], []
    for e, target in enumerate(progress(targets(examples).tolist(), "retrieve", len(examples))):
        history = touched_before(examples, e)
        scores = retriever.scores(history)
        places.append(place_among_all(scores, history, target))
        lists.append(best_items(scores, history, size))
    return np.array(places), lists


# ------------------------------------------------------------------------------------------ rankers
def by_model(ranker: ListRanker, examples: Examples) -> Callable:
    """For rank_long: log-probs of some items for one user, in an order that the user's id draws."""
    interactions = examples.interactions

    def shown(e: int, items: np.ndarray) -> tuple[ShownList, np.ndarray]:
        example = examples[e]
        order = shown_order(f"{example.user} {items[0]} {items[-1]}", len(items))
        titles = [interactions.titles[c] for c in items[order]]
        return ShownList(example.user, example.history, titles), order

    def score(asked: list[tuple[int, np.ndarray]]) -> list[np.ndarray]:
        made = [shown(e, items) for e, items in asked]
        rows = ranker.logps([one for one, _ in made])
        values = [np.empty(len(row)) for row in rows]
        for value, row, (_, order) in zip(values, rows, made, strict=True):
            value[order] = row
        return values

    return score


def model_places(
    ranker: ListRanker, examples: Examples, lists: list[np.ndarray], retriever_places: np.ndarray
) -> np.ndarray:
    """(E,) places of the targets after the model has ranked each list."""
    score, wanted, places = by_model(ranker, examples), targets(examples), []
    starts = range(0, len(lists), CHUNK)
    what = f"rank {max(map(len, lists))}"
    for start in progress(starts, what, len(starts)):
        part = lists[start : start + CHUNK]
        orders = rank_long(part, lambda asked, at=start: score([(at + i, c) for i, c in asked]))
        for e, order in enumerate(orders, start):
            places.append(place_in_list(order, wanted[e], retriever_places[e]))
    return np.array(places)


def optimum_scores(prepared: Prepared, examples: Examples) -> np.ndarray | None:
    """(E, I) of the best possible recommender, -inf for items of the history; None if unknown."""
    options = prepared.options
    if options["dataset"] != "planted" or options["history"] < World.max_length - 1:
        return None
    world = World(num_users=options["planted_users"], seed=options["data_seed"])
    every = examples.select(slice(None))
    every.candidates = np.tile(np.arange(examples.interactions.num_items), (len(examples), 1))
    with np.errstate(divide="ignore"):  # a genre that is read out
        scores = bayes_scores(world, every, options["min_rating"])
    for e in range(len(examples)):
        scores[e, touched_before(examples, e)] = -np.inf
    return scores


def optimum_places(
    scores: np.ndarray, examples: Examples, lists: list[np.ndarray], retriever_places: np.ndarray
) -> np.ndarray:
    """(E,) places after the best possible order of each list; equals in the retriever's order."""
    orders = [c[np.argsort(-scores[e, c], kind="stable")] for e, c in enumerate(lists)]
    wanted = targets(examples)
    return np.array(
        [place_in_list(o, wanted[e], retriever_places[e]) for e, o in enumerate(orders)]
    )


# ------------------------------------------------------------------------------------------ figures
def evaluate_lists(
    examples: Examples,
    found: tuple[np.ndarray, list[np.ndarray]],
    ranker: ListRanker,
    sizes: list[int],
    optimum: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """Row of the table -> places of the targets (E,); `found` is what retrieved() gives, for the
    longest list, or for all items where the optimum is known."""
    alone, lists = found
    rows = {"retriever": alone}
    for size in sizes:
        short = [items[:size] for items in lists]
        rows[f"{MODEL}, N = {size}"] = model_places(ranker, examples, short, alone)
        if optimum is not None:
            rows[f"+ optimum, N = {size}"] = optimum_places(optimum, examples, short, alone)
        rows[f"ceiling, N = {size}"] = np.where(alone <= size, 1, alone)
    if optimum is not None:
        rows["optimum of all items"] = optimum_places(optimum, examples, lists, alone)
    return rows


def figures(rows: dict[str, np.ndarray]) -> dict:
    """Places of studies.two_stage's own rows -> paired_figures."""
    gained = {name: gain_columns(places) for name, places in rows.items()}
    return paired_figures(gained, [name for name in rows if name.startswith(MODEL)])


def paired_figures(gained: dict[str, np.ndarray], ranked: list[str]) -> dict:
    """Row -> measure -> mean and 95 % interval, of gains (n, M).

    Those of the `ranked` rows less the first row's, the retriever, too: "minus_retriever" with
    interval and verdict. All rows see the same draws of users, so differences are paired; Holm over
    the ranked rows of a measure."""
    stacked = np.stack(list(gained.values()), 1)  # (n, rows, M)
    less = stacked - stacked[:, :1]  # drawn themselves: equal rows differ by 0, without rounding
    columns = np.concatenate([stacked, less], 1)
    drawn = resampled_means(columns.reshape(len(columns), -1)).reshape(-1, *columns.shape[1:])
    means, less_means = np.split(drawn, 2, 1)  # (resamples, rows, M)
    values, result = stacked.mean(0), {name: {} for name in gained}
    for m, measure in enumerate(MEASURES):
        family = {}
        for i, name in enumerate(gained):
            result[name][measure] = {
                "mean": float(values[i, m]),
                "ci95": interval_of(means[:, i, m]),
            }
            if name in ranked:
                family[name] = Difference(float(less[:, i, m].mean()), less_means[:, i, m], (1, 1))
        judge(list(family.values()))
        for name, d in family.items():
            result[name][measure] |= {
                "minus_retriever": d.mean,
                "minus_retriever_interval": d.interval,
                "verdict": d.verdict,
            }
    return result


def figure_rows(result: dict) -> list[list[str]]:
    """A row of cells for each row: its name and measures."""
    rows = []
    for name, row in result.items():
        entries = [row[measure] for measure in MEASURES]
        cells = [f"{e['mean']:.4f} [{e['ci95'][0]:.3f}, {e['ci95'][1]:.3f}]" for e in entries]
        rows.append([name, *cells])
    return rows


def difference_rows(result: dict) -> list[list[str]]:
    """A row of cells for each row that is compared with the retriever."""
    rows = []
    for name, row in result.items():
        if "verdict" in row["MRR"]:
            cells = []
            for entry in (row[measure] for measure in MEASURES):
                low, high = entry["minus_retriever_interval"]
                less = f"{entry['minus_retriever']:+.4f} [{low:+.3f}, {high:+.3f}]"
                cells.append(f"{less}: {entry['verdict']}")
            rows.append([name, *cells])
    return rows


def tables(result: dict) -> str:
    """Markdown: every row's measures, and the differences to the retriever."""
    parts = []
    for corner, rows in (
        ("", figure_rows(result)),
        ("minus the retriever", difference_rows(result)),
    ):
        lines = [[corner, *MEASURES], ["---"] * (1 + len(MEASURES)), *rows]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def save_figures(file: Path, facts: dict, rows: dict[str, np.ndarray], result: dict) -> None:
    """Facts, places (E,) of every row in the order of the test split, and figures()."""
    places = {name: values.tolist() for name, values in rows.items()}
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(facts | {"rows": result, "places": places}) + "\n")


def main() -> None:
    config = parse_config(TwoStageConfig)
    _, world_size, device = setup_distributed()
    if world_size > 1:
        raise ValueError("studies.two_stage runs in one process: start it without torchrun")
    source = EvalConfig(
        run=config.run,
        stage=config.stage,
        prepared_dir=config.prepared_dir,
        micro_batch_tokens=config.micro_batch_tokens,
    )
    source = with_run_options(source)
    if source.dataset == "prepared":
        raise ValueError(f"{config.run}: prepared examples have no log to retrieve from")
    started = time.monotonic()
    stages = sources_of(source)
    prepared = prepare(source)
    interactions = prepared.interactions
    check_run_data(source, stages, prepared.hash)
    examples = prepared.splits["test"].select(slice(config.users or None))

    retriever = fit_retriever(config.retriever, prepared, source, training_rows(interactions))
    optimum, sizes = optimum_scores(prepared, examples), config.sizes()
    longest = max(sizes) if optimum is None else interactions.num_items
    found = retrieved(retriever, examples, longest)
    seconds = time.monotonic() - started  # until here, for all stages

    folder = Path(config.output_dir or f"{config.run}/two_stage")
    limits = (source.max_length, config.micro_batch_tokens)
    for stage, weights in stages.items():
        started = time.monotonic()
        model, tokenizer = load_source(source, weights, device)
        ranker = ListRanker(model, tokenizer, interactions.words, *limits, device)
        rows = evaluate_lists(examples, found, ranker, sizes, optimum)
        result = figures(rows)
        facts = {
            "run": config.run,
            "stage": stage,
            "retriever": config.retriever,
            "users": len(examples),
            "items": interactions.num_items,
            "data_hash": prepared.hash,
            "seconds": round(seconds + time.monotonic() - started, 1),
        }
        file = folder / stage / f"{config.retriever}.json"
        save_figures(file, facts, rows, result)
        print(
            f"\n{config.run}, {stage}, {config.retriever}: {len(examples):,} users, "
            f"{facts['items']:,} items, data {prepared.hash[:12]}, {facts['seconds']} s; "
            f"lists longer than {NUM_CANDIDATES} in groups with shared anchors; [95 % interval]\n"
        )
        print(f"{tables(result)}\n\nwritten to {file}", flush=True)
        del model, ranker
        free_memory()  # before the next one is loaded


if __name__ == "__main__":
    run_cli(main)
