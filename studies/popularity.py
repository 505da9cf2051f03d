"""Coverage, popularity bias and calibration of what a model ranks first, one value per run.

coverage      share of the catalogue that is ranked first for at least one test user
top           share of first places that go to the 1 % of the items that training saw most
percentile    mean share of the catalogue that training saw less often than the first place,
              equals counted half
calibration   expected calibration error: the probability of the first place (softmax over the
              20 log-probs) against how often it is right, in ten bins of equal width"""

import numpy as np

from loaders.counting import Retriever, training_rows
from loaders.frozen import Prepared
from studies.methods import Result

NUM_BINS = 10  # of probability; the last one holds 1
MEASURES = {
    "coverage": "coverage of the catalogue",
    "top": "first places to the top 1 %",
    "percentile": "mean popularity percentile",
    "calibration": "calibration error",
}


def catalogue_of(prepared: Prepared) -> dict[str, tuple[float, bool]]:
    """Title -> share of items that training saw less often, and whether it is in the top 1 %."""
    interactions = prepared.interactions
    counts = Retriever("popularity", interactions, training_rows(interactions)).counts
    ordered, top = np.sort(counts), np.zeros(len(counts), bool)
    below = np.searchsorted(ordered, counts) + np.searchsorted(ordered, counts, "right")
    most = np.argsort(-counts, kind="stable")  # equal counts: the lower code first
    top[most[: max(1, len(counts) // 100)]] = True
    facts = zip((below / 2 / len(counts)).tolist(), top.tolist(), strict=True)
    return dict(zip(interactions.titles, facts, strict=True))


def beyond_accuracy(result: Result, catalogue: dict | None) -> dict[str, float]:
    """Map measures to their value for one run; without a catalogue only calibration."""
    scores = np.array([r["logps"] for r in result.records])
    first = scores.argmax(1)
    sure = 1 / np.exp(scores - scores.max(1, keepdims=True)).sum(1)  # probability of the first
    hits = first == [r["target_slot"] for r in result.records]
    which = np.minimum((sure * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = np.bincount(which, hits - sure)  # users of a bin times their mean difference
    values = {"calibration": np.abs(gaps).sum() / len(hits)}
    if catalogue:
        titles = [r["candidates"][slot] for r, slot in zip(result.records, first, strict=True)]
        values["coverage"] = len(set(titles)) / len(catalogue)
        facts = np.array([catalogue[title] for title in titles], float)  # (n, 2)
        values["percentile"], values["top"] = facts.mean(0)
    return values
