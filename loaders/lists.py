"""The same test cases with other candidates: uniform, by popularity, or what Markov retrieves."""

from dataclasses import replace

import numpy as np

from data import ExampleConfig, Examples, draw_candidates
from loaders.counting import markov_top

KINDS = ("uniform", "popularity", "retrieved")
TEST_SEED = 2  # build_examples' generator of the test split; the kind is added


def other_lists(test: Examples, config: ExampleConfig) -> dict[str, Examples]:
    """Kind -> the test cases with candidates of this kind, for all but the configuration's own.

    Users, histories and targets stay; candidates are drawn from --data_seed and the kind, so every
    method that is tested on them meets the same."""
    lists = {}
    for number, kind in enumerate(KINDS):
        if kind == config.negatives:
            continue
        rng = np.random.default_rng([config.data_seed, TEST_SEED, number])
        as_kind = replace(config, negatives=kind)
        lists[kind] = draw_candidates(
            test.interactions, "test", test.position, np.arange(1), as_kind, rng, markov_top
        )
    return lists
