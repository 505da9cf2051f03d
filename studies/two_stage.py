"""Retrieve, then rank: figures over the whole catalogue, compared with the retriever alone.

    python -m studies.two_stage --run runs/planted-1 --retriever markov

A test case is a user's last interaction, if it was liked; its history is all that lies before. The
retriever is fitted on training interactions and orders the items that the history does not hold;
the model ranks its first 20, the others keep the retriever's place. HR@k: the target is among the
first k; NDCG@10: 1 / log2(1 + place), 0 after the tenth; MRR: mean of 1 / place. The ceiling always
puts a retrieved target first; in the planted world the optimum is the best order of the 20.
`--retriever model`: a model with a token per title, prompted without the list, ranks the catalogue
itself, by one position's logits. Every user's places go to RUN/two_stage/STAGE/RETRIEVER.json.
Legend: E users, I items."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from common import arg, run_cli, table, writing
from data import NUM_CANDIDATES, Examples, build_tree, encode_examples
from eval import EvalConfig
from loaders.counting import Retriever, training_rows
from loaders.frozen import prepare
from loaders.planted import bayes_scores, world_of
from model import Transformer
from runtime.processes import progress, setup_distributed
from runtime.sources import check_run_data, load_source, parse_source, sources_of
from runtime.stages import write_whole
from studies.probes import predictions
from studies.sequential import RETRIEVERS, fit_retriever
from studies.statistics import holm, paired, with_interval

MOST_SPELLED = 100  # titles without a token of their own
MEASURES = ("HR@1", "HR@5", "HR@10", "NDCG@10", "MRR")


@dataclass(frozen=True)
class TwoStageConfig(EvalConfig):
    """Evaluate retriever and model of a run together, over the whole catalogue."""

    retriever: str = arg(
        "markov", "what retrieves", group="retriever", choices=(*RETRIEVERS, "model")
    )
    users: int = arg(0, "test users, the first of the split's random order; 0 = all", at_least=0)

    def __post_init__(self):
        super().__post_init__()
        if not self.run or self.dataset == "prepared":
            raise ValueError("give --run, the folder of a run of train.py on a log")
        if self.show_prompts or self.decode != "greedy":
            raise ValueError("--show_prompts, --decode are eval.py's: here log-probs are compared")
        if self.retriever == "model" and (not self.stage or "," in self.stage):
            raise ValueError("--retriever model needs one --stage: its model ranks the catalogue")


@torch.no_grad()
def title_scores(
    model: Transformer, completions: list[list[int]], prompts: Iterable
) -> Iterator[np.ndarray]:
    """Yield log-probs (I,) of the completions after each prompt, by the logits of one position.
    The few titles that have no token of their own are scored by a tree."""
    device = model.inv_freq.device
    first = torch.tensor([ids[0] for ids in completions], device=device)
    spelled = [i for i, ids in enumerate(completions) if len(ids) != 2]  # not a token and the end
    if len(spelled) > MOST_SPELLED:
        raise ValueError("only a model with a token for each title (--model titles) ranks them all")
    for prompt in prompts:
        logits = model.logits(torch.tensor([list(prompt)], device=device))[0, -1]
        scores = logits.log_softmax(0)[first]
        if spelled:
            tree = build_tree([prompt], [[completions[i] for i in spelled]]).to(device)
            scores[spelled] = tree.sum_logps(model(tree)[0])[0]
        yield scores.cpu().numpy()


def retrieved(
    retriever: Retriever | None, examples: Examples, scored: Iterator[np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The best items (E, 20) that the history does not hold, and the targets' places (E,).
    Ties go by item code. `scored` yields scores (I,) per example, instead of the retriever."""
    lists, places = [], []
    for e in progress(range(len(examples)), "retrieve", len(examples)):
        interactions, p = examples.interactions, int(examples.position[e])
        history = interactions.item[interactions.start[interactions.user[p]] : p].astype(np.int64)
        scores = next(scored) if scored else retriever.scores(history)
        scores = scores.astype(float)
        scores[history] = -np.inf
        if np.isfinite(scores).sum() < NUM_CANDIDATES:
            what = f"fewer than {NUM_CANDIDATES} items are left to retrieve"
            raise ValueError(f"user {examples[e].user}: {what}; the catalogue is too small")
        order = np.argsort(-scores, kind="stable")
        lists.append(order[:NUM_CANDIDATES])
        target = examples.candidates[e, examples.target[e]]
        places.append(1 + int(np.flatnonzero(order == target)[0]))
    return np.array(lists), np.array(places)


def shown_lists(examples: Examples, lists: np.ndarray) -> tuple[Examples, np.ndarray]:
    """The examples with the retrieved items as candidates, and their order (E, 20) in the prompt.
    The order depends on the user and the list only: the prompt does not reveal the retriever's."""
    texts = [f"{examples[e].user} {row[0]} {row[-1]}\0" for e, row in enumerate(lists)]
    seeds = [int.from_bytes(sha256(text.encode()).digest()[:8], "big") for text in texts]
    orders = np.array([np.random.default_rng(s).permutation(NUM_CANDIDATES) for s in seeds])
    shown = examples.select(slice(None))
    shown.candidates = np.take_along_axis(lists, orders, 1)
    shown.template, shown.target = np.zeros_like(shown.template), np.zeros_like(shown.target)
    return shown, orders


def ranked_places(scores, orders, lists: np.ndarray, examples: Examples, alone) -> np.ndarray:
    """The targets' places (E,) after each list is sorted by the scores (E, 20) of its shown order.
    Ties stay as retrieved; a target that the list does not hold keeps the retriever's place."""
    values = np.empty(lists.shape)
    np.put_along_axis(values, orders, scores, 1)
    order = np.take_along_axis(lists, np.argsort(-values, axis=1, kind="stable"), 1)
    found = order == np.take_along_axis(examples.candidates, examples.target[:, None], 1)
    return np.where(found.any(1), 1 + found.argmax(1), alone)


def gains(places: np.ndarray) -> dict[str, np.ndarray]:
    """Every measure (E,) of places (E,), which count from 1."""
    values = {f"HR@{k}": (places <= k).astype(float) for k in (1, 5, 10)}
    values["NDCG@10"] = np.where(places <= 10, 1 / np.log2(1 + places), 0.0)
    return values | {"MRR": 1 / places}


def catalogue_tables(places: dict[str, list[int]], ranked: dict[str, dict]) -> str:
    """Markdown tables of the measures of each row, and of differences to the retriever alone.
    The rows: the retriever, `ranked` (name -> gains), and the other places. Differences are paired
    over users, with Holm's correction within each measure."""
    beside = {name: gains(np.array(found)) for name, found in places.items() if name != "model"}
    alone = beside.pop("retriever")
    rows = {"retriever alone": alone, **ranked, **beside}
    figures = [[name, *map(with_interval, gained.values())] for name, gained in rows.items()]
    families = [[paired(gained[m], alone[m]) for gained in ranked.values()] for m in MEASURES]
    for family in families:
        holm(family)
    columns = [[f"{d}: {d.verdict}" for d in family] for family in families]
    differences = [list(row) for row in zip(ranked, *columns, strict=True)]
    tables = table(["", *MEASURES], figures), table(["minus the retriever", *MEASURES], differences)
    return "\n\n".join(tables)


def main() -> None:
    config = replace(parse_source(TwoStageConfig), decode_rest=False)
    _, _, device = setup_distributed(divides=False)
    prepared = prepare(config)
    check_run_data(config, sources_of(config), prepared.hash)
    examples = prepared.splits[config.split].select(slice(config.users or None))
    interactions, world = prepared.interactions, world_of(vars(config))
    if config.retriever == "model":
        if config.list_in_prompt:  # a list would give the target away
            raise ValueError("--retriever model needs a model trained with --no_list_in_prompt")
        (source,) = sources_of(config).values()
        model, tokenizer = load_source(config, source, device)
        prompts = encode_examples(examples, tokenizer, config.max_length).prompts
        completions = tokenizer.encode_completions(interactions.titles)
        scored = title_scores(model, completions, prompts)
        lists, alone = retrieved(None, examples, scored)
    else:
        rows = training_rows(interactions)
        lists, alone = retrieved(fit_retriever(config.retriever, prepared, config, rows), examples)
    shown, orders = shown_lists(examples, lists)
    places = {"retriever": alone, "ceiling": np.where(alone <= NUM_CANDIDATES, 1, alone)}
    if world:
        scores = bayes_scores(world, shown, config.min_rating)
        places["optimum"] = ranked_places(scores, orders, lists, examples, alone)
    for stage, records in predictions(config, shown, device):
        scores = np.array([r["logps"] for r in records])
        places["model"] = ranked_places(scores, orders, lists, examples, alone)
        content = {"data_hash": prepared.hash, "items": interactions.num_items}
        content["places"] = {name: found.tolist() for name, found in places.items()}
        folder = Path(config.output_dir or f"{config.run}/two_stage") / stage
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            name = config.retriever + "-val" * (config.split == "val")  # reports show test users
            write_whole(folder / f"{name}.json", json.dumps(content) + "\n")
        print(
            f"\n{config.run}, {stage}, {config.retriever}: {len(examples):,} users, "
            f"{interactions.num_items:,} items, data {prepared.hash[:12]}; [95 % interval]\n\n"
            f"{catalogue_tables(content['places'], {'+ model': gains(places['model'])})}\n\n"
            f"written to {folder}"
        )


if __name__ == "__main__":
    run_cli(main)
