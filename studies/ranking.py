"""Lists that the model ranks in one pass: prompts of any user with any candidates, and long lists.

A model is trained on lists of NUM_CANDIDATES. It sees the candidates in its prompt, so
log-probabilities of two prompts are not on one scale. `rank_long` orders more candidates than that:

    1. The retriever's best ANCHORS stand in every group of NUM_CANDIDATES; the others are dealt
       out in the retriever's order, so that no group is stronger than another.
    2. A group's log-probs are shifted so that its anchors have the mean of all groups: now all
       are on one scale. An item of several groups (the anchors, and those that fill up the last
       group) has the mean of its values.
    3. The best NUM_CANDIDATES meet in one last list; what counts for them is the mean of its
       log-probs and of their values so far, both less their own mean over these items.

If the model's log-ratios of two candidates do not depend on the rest of the list, as those of the
best possible recommender, step 2 alone gives its exact order, and step 3 keeps it; step 3 repairs
what a real model's anchors blur.

Legend: B lists of a batch, N candidates of a list, G groups of a long list.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch

from data import NUM_CANDIDATES, Example, PromptTree, build_tree, micro_batches, render_prompt
from hub.tokenizer import Tokenizer
from model import Transformer

ANCHORS = 4  # of NUM_CANDIDATES; their mean has half the noise of one
KEPT_TITLES = 200_000  # tokenised titles that are kept


@dataclass
class ShownList:
    """One prompt: a user's history and candidates, in the order in which they are shown."""

    user: str
    history: list[tuple[str, float]]  # (title, rating), oldest first; NaN: not shown
    candidates: list[str]


def shown_order(user: str, count: int, salt: str = "") -> np.ndarray:
    """A permutation that depends on the user alone, so that a prompt does not tell the ranks."""
    digest = sha256(f"{user}\0{salt}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(count)


class ListRanker:
    """Log-probabilities of candidates, by the model's one pass over a tree."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        words: str,  # data set whose words the prompts use
        max_length: int,
        micro_batch_tokens: int,
        device="cpu",
    ):
        self.model, self.tokenizer, self.words = model, tokenizer, words
        self.max_length, self.micro_batch_tokens = max_length, micro_batch_tokens
        self.device = device
        self.completions: dict[str, list[int]] = {}

    def completions_of(self, titles: list[str]) -> list[list[int]]:
        """Ids of each title with EOS; a title is tokenised once."""
        if len(self.completions) > KEPT_TITLES:
            self.completions = {}
        new = [title for title in dict.fromkeys(titles) if title not in self.completions]
        self.completions |= zip(new, self.tokenizer.encode_completions(new), strict=True)
        return [self.completions[title] for title in titles]

    def prompt_text(self, shown: ShownList, skip: int = 0) -> str:
        example = Example(self.words, shown.user, shown.history, shown.candidates, 0, [], 0)
        return render_prompt(example, skip)

    def encode(self, lists: Sequence[ShownList]) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Prompt ids and completion ids; the oldest history goes until a prompt fits max_length."""
        titles = [title for shown in lists for title in shown.candidates]
        ids = iter(self.completions_of(titles))
        groups = [[next(ids) for _ in shown.candidates] for shown in lists]
        prompts = self.tokenizer.encode_prompts([self.prompt_text(shown) for shown in lists])
        for i, (shown, group) in enumerate(zip(lists, groups, strict=True)):
            room, skip = self.max_length - max(map(len, group)), 0
            while len(prompts[i]) > room:
                skip += 1
                if skip >= len(shown.history):
                    raise ValueError(
                        f"user {shown.user}: {len(prompts[i])} prompt tokens do not fit "
                        f"--max_length {self.max_length} even with a history of one item; "
                        "raise --max_length or give fewer candidates"
                    )
                (prompts[i],) = self.tokenizer.encode_prompts([self.prompt_text(shown, skip)])
        return prompts, groups

    def trees(self, lists: Sequence[ShownList]) -> list[tuple[list[int], PromptTree]]:
        """Micro-batches of lists of one length: (indices of the lists, tree)."""
        prompts, groups = self.encode(lists)
        widths = [
            (len(p), sum(len(ids) - 1 for ids in g)) for p, g in zip(prompts, groups, strict=True)
        ]
        batches = []
        for length in sorted({len(group) for group in groups}):
            same = [i for i, group in enumerate(groups) if len(group) == length]
            batches += micro_batches(widths, same, 1, self.micro_batch_tokens)[0]
        return [
            (batch, build_tree([prompts[i] for i in batch], [groups[i] for i in batch]))
            for batch in batches
        ]

    @torch.no_grad()
    def score(self, tree: PromptTree) -> np.ndarray:
        """(B, N) log-probabilities of the completions."""
        tree = tree.to(self.device)
        return tree.sum_logps(self.model(tree)[0]).double().cpu().numpy()

    def logps(self, lists: Sequence[ShownList]) -> list[np.ndarray]:
        """(N,) log-probabilities of each list's candidates."""
        found: list = [None] * len(lists)
        for batch, tree in self.trees(lists):
            for i, row in zip(batch, self.score(tree), strict=True):
                found[i] = row
        return found


# --------------------------------------------------------------------------------------- long lists
def groups_of(count: int, size: int = NUM_CANDIDATES, anchors: int = ANCHORS) -> list[np.ndarray]:
    """Places (size,) in the retriever's order that stand together; the anchors in every group."""
    if count <= size:
        return [np.arange(count)]
    rest = np.arange(anchors, count)
    room = size - anchors
    number = -(-len(rest) // room)
    groups = []
    for g in range(number):
        members = rest[g::number]
        others = np.setdiff1d(rest, members)
        filled = np.concatenate([np.arange(anchors), members, others[: room - len(members)]])
        groups.append(filled)
    return groups


def on_one_scale(
    count: int, groups: list[np.ndarray], logps: list[np.ndarray], anchors: int = ANCHORS
) -> np.ndarray:
    """(count,) values of all places: each group shifted to the anchors' mean over all groups."""
    anchor_logps = np.stack([row[:anchors] for row in logps])  # (G, anchors)
    shifts = anchor_logps.mean() - anchor_logps.mean(1)  # (G,)
    total, times = np.zeros(count), np.zeros(count)
    for places, row, shift in zip(groups, logps, shifts, strict=True):
        total[places] += row + shift
        times[places] += 1
    return total / times


def rank_long(
    lists: Sequence[np.ndarray],
    score: Callable[[list[tuple[int, np.ndarray]]], list[np.ndarray]],
    size: int = NUM_CANDIDATES,
) -> list[np.ndarray]:
    """Each list's items, best first. Lists hold item codes in the retriever's order.

    `score` takes (which list, up to `size` of its items) and gives a log-prob for each of them. It
    is called once for all groups and once for all last lists. Equal values keep their order."""
    plans = [groups_of(len(items), size) for items in lists]
    asked = [(i, items[places]) for i, items in enumerate(lists) for places in plans[i]]
    rows = iter(score(asked))
    orders, best_values = [], []
    for items, groups in zip(lists, plans, strict=True):
        own = [next(rows) for _ in groups]
        values = own[0] if len(groups) == 1 else on_one_scale(len(items), groups, own)
        order = np.argsort(-values, kind="stable")
        orders.append(items[order])
        best_values.append(values[order[:size]])
    long = [i for i, groups in enumerate(plans) if len(groups) > 1]
    finals = score([(i, orders[i][:size]) for i in long]) if long else []
    for i, final in zip(long, finals, strict=True):
        before = best_values[i] - best_values[i].mean()
        both = before + final - final.mean()
        orders[i][:size] = orders[i][:size][np.argsort(-both, kind="stable")]
    return orders
