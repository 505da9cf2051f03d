"""From interactions to batches: splits, candidates, prompts, token ids, and the PromptTree.

One real prompt (MovieLens-1M, shortened), and one of its completions:

    A user watched these movies, oldest first, and rated each from 1 to 5:
    Girl, Interrupted | Rating: 4
    Titanic (1997) | Rating: 5
    Which of the following movies will the user watch next and like?
    The Matrix
    Back to the Future
    Answer:                                 the completion is " Back to the Future" + EOS

The chosen item is the best of the user's next 10 (`chosen_follower`). The other 19 candidates are
the rest of those 10 and random items (`draw_candidates`); K of the 19, drawn at random, are the
rejected titles (`Examples.negatives`). `python -m loaders` shows this for a data set.
Legend: E examples, F followers among the candidates, B examples of a batch, N completions of each,
P prompt width, C completion width, M scored tokens."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import isnan, nan

import numpy as np
import torch
from torch import Tensor

from common import arg, check_options
from hub.tokenizer import Tokenizer
from losses import preference_score

NUM_CANDIDATES = 20
RANDOM_RATING, RANDOM_STEPS = 3.0, 10  # of random candidates, as in the released code
SPLITS = ("train", "val", "test")
KINDS = ("uniform", "popularity", "retrieved")  # of random candidates
BOUNDARY_CHECKS = 256  # examples whose prompt and completion are also encoded as one text

Words = tuple[str, str, str]  # of a data set's prompts: the things, what a user did, will do
ITEMS: Words = ("items", "chose", "choose")  # if nothing better is known


# ------------------------------------------------------------------------------------- interactions
@dataclass
class Interactions:
    """A log as flat arrays, sorted by user, then time, then original order."""

    user: np.ndarray  # (n,) int32 code
    item: np.ndarray  # (n,) int32 code
    rating: np.ndarray  # (n,) float32
    timestamp: np.ndarray  # (n,) int64 seconds
    start: np.ndarray  # (users + 1,) int64: user u owns rows start[u] : start[u + 1]
    titles: list[str]  # per item, unique
    user_ids: list[str]
    item_ids: list[str]
    name: str = ""  # of the data set; part of its hash
    notes: dict[str, int] = field(default_factory=dict)  # what was left out or changed -> how often
    words: Words = ITEMS
    train_end: np.ndarray | None = None  # (users,) int64, replaces the default of training_end

    def training_end(self) -> np.ndarray:
        """(users,) one past each user's last training row; usually the last two are held out."""
        last_two = np.maximum(self.start[1:] - 2, self.start[:-1])
        return last_two if self.train_end is None else self.train_end

    @property
    def num_users(self) -> int:
        return len(self.start) - 1

    @property
    def num_items(self) -> int:
        return len(self.titles)


def k_core(interactions: Interactions, k: int) -> Interactions:
    """Drop users and items with fewer than k interactions until all have k; k = 0 keeps all."""
    user, item = interactions.user, interactions.item
    keep, before = np.ones(len(user), bool), -1
    while k > 0 and keep.sum() != before:
        before = keep.sum()
        enough = np.bincount(user[keep], minlength=interactions.num_users)[user] >= k
        keep &= enough & (np.bincount(item[keep], minlength=interactions.num_items)[item] >= k)
    if not keep.any():
        raise ValueError(f"no interaction is left after --core {k}; use a smaller one, or 0")
    return interactions if keep.all() else select_rows(interactions, keep)


def select_rows(log: Interactions, keep: np.ndarray) -> Interactions:
    """Keep only these rows, and the users and items that occur in them."""
    users, user = np.unique(log.user[keep], return_inverse=True)
    items, item = np.unique(log.item[keep], return_inverse=True)
    start = np.concatenate([[0], np.cumsum(np.bincount(user))]).astype(np.int64)
    titles, item_ids = ([texts[i] for i in items] for texts in (log.titles, log.item_ids))
    arrays = {"user": user.astype(np.int32), "item": item.astype(np.int32), "start": start}
    arrays |= {"rating": log.rating[keep], "timestamp": log.timestamp[keep], "train_end": None}
    user_ids = [log.user_ids[u] for u in users]
    return replace(log, **arrays, titles=titles, user_ids=user_ids, item_ids=item_ids)


# ----------------------------------------------------------------------------------------- examples
@dataclass(frozen=True)
class ExampleConfig:
    """How a log becomes frozen examples and prompts."""

    train_size: int = arg(10000, "training examples; 0 = all", group="examples", at_least=0)
    test_size: int = arg(0, "validation and test users each, drawn from all; 0 = all", at_least=0)
    history: int = arg(20, "most recent interactions shown in a prompt", at_least=1)
    history_items: str = arg("all", "all, or liked ones (may be none)", choices=("all", "positive"))
    ratings: bool = arg(True, "show the ratings of a history; off: titles only")
    list_in_prompt: bool = arg(True, "list the candidates in the prompt; off: only score them")
    min_history: int = arg(5, "interactions needed before an example", at_least=1)
    followers: int = arg(10, "later items among candidates", at_least=1, at_most=NUM_CANDIDATES - 1)
    positive: str = arg("argmax", "chosen: best score, or first liked", choices=("argmax", "first"))
    min_rating: float = arg(4.0, "lowest rating of a liked item", at_least=0)
    decay: float = arg(0.5, "preference score = rating / (1 + steps)^decay", at_least=0)
    exclude: str = arg("all", "random items: never touched, or not shown", choices=("all", "seen"))
    negatives: str = arg("uniform", "how random candidates are drawn", choices=KINDS)
    data_seed: int = arg(0, "seed of candidates, negatives, order and templates", at_least=0)

    def __post_init__(self):
        check_options(self)
        if self.min_history > self.history:
            raise ValueError(f"--min_history {self.min_history} is above --history {self.history}")


@dataclass
class Example:
    """One example as text: what its prompt shows, and what is known about its candidates."""

    words: Words
    user: str
    history: list[tuple[str, float]]  # (title, rating or NaN), oldest first
    candidates: list[str]
    target: int  # index of the chosen candidate
    scores: list[float]  # preference score of each candidate
    template: int
    list_in_prompt: bool = True  # the prompt lists the candidates


@dataclass
class Examples:
    """A split with frozen candidates; the history of example e ends before row position[e]."""

    interactions: Interactions
    split: str
    history: int  # interactions shown
    position: np.ndarray  # (E,) int64
    candidates: np.ndarray  # (E, 20) int32 item codes
    target: np.ndarray  # (E,) int32 slot of the chosen item
    scores: np.ndarray  # (E, 20) float32
    is_random: np.ndarray  # (E, 20) bool
    negative_order: np.ndarray  # (E, 19) int32: the other slots in random order
    template: np.ndarray  # (E,) int32
    min_shown_rating: float = 0.0  # history items that are rated lower are not shown
    ratings: bool = True  # show those of the history
    list_in_prompt: bool = True

    # field -> its name in prepared files, which is part of their hash
    ARRAYS = {f: f for f in ("position", "candidates", "target", "scores", "is_random", "template")}
    ARRAYS |= {"negative_order": "others"}

    def __len__(self) -> int:
        return len(self.position)

    def __getitem__(self, e: int) -> Example:
        log = self.interactions
        shown = [(log.titles[log.item[r]], float(log.rating[r])) for r in self.history_rows(e)]
        return Example(
            words=log.words,
            user=log.user_ids[log.user[self.position[e]]],
            history=shown if self.ratings else [(title, nan) for title, _ in shown],
            candidates=[log.titles[c] for c in self.candidates[e]],
            target=int(self.target[e]),
            scores=self.scores[e].tolist(),
            template=int(self.template[e]),
            list_in_prompt=self.list_in_prompt,
        )

    def history_rows(self, e: int) -> list[int]:
        """Rows of the log that the prompt shows, oldest first."""
        p = int(self.position[e])
        start = int(self.interactions.start[self.interactions.user[p]])
        hidden = self.interactions.rating[start:p] < self.min_shown_rating  # False for NaN
        return (start + np.flatnonzero(~hidden)[-self.history :]).tolist()

    def select(self, indices) -> "Examples":
        return replace(self, **{name: getattr(self, name)[indices] for name in self.ARRAYS})

    def negatives(self, K: int, source: str = "both") -> np.ndarray:
        """(E, K) slots of the rejected titles: the first K of this source in negative_order."""
        is_random = np.take_along_axis(self.is_random, self.negative_order, 1)
        allowed = {"both": is_random | True, "random": is_random, "follow": ~is_random}[source]
        if (fewest := allowed.sum(1).min(initial=K)) < K:
            raise ValueError(f"--num_negatives {K}: --negative_source {source} has only {fewest}")
        first = np.argsort(~allowed, axis=1, kind="stable")[:, :K]
        return np.take_along_axis(self.negative_order, first, 1)


def build_examples(
    interactions: Interactions,
    config: ExampleConfig | None = None,
    retrieve: Callable | None = None,  # for --negatives retrieved
    places: dict[str, np.ndarray] | None = None,  # split -> rows that may be predicted
) -> dict[str, Examples]:
    """Build the splits, each with its own seeded generator; ValueError if one is empty."""
    config, splits = config or ExampleConfig(), {}
    for split, rows in (places or last_two_places(interactions, config)).items():
        liked = interactions.rating[rows] >= config.min_rating
        if split == "train":
            parts = np.array_split(rows, 1 + len(rows) // 50_000)  # whose arrays stay in the cache
            liked = np.concatenate([chosen_follower(interactions, p, config)[1] for p in parts])
        if not liked.any():
            low, high = interactions.rating.min(), interactions.rating.max()
            what = f"no {split} example: none of {len(rows):,} positions has a liked chosen item"
            lower = f"--min_history, --followers or --min_rating {config.min_rating:g}"
            raise ValueError(f"{what}; lower {lower} (ratings go from {low:g} to {high:g})")
        rng = np.random.default_rng([config.data_seed, SPLITS.index(split)])
        size = config.train_size if split == "train" else config.test_size
        rows = rng.permutation(rows[liked])[: size or None]
        steps = np.arange(config.followers if split == "train" else 1)
        splits[split] = draw_candidates(interactions, split, rows, steps, config, rng, retrieve)
    return splits


def last_two_places(interactions: Interactions, config: ExampleConfig) -> dict[str, np.ndarray]:
    """Rows to predict per split: each user's last (test), the one before (val), earlier ones."""
    user, row, end = interactions.user, np.arange(len(interactions.user)), interactions.start[1:]
    first = interactions.start[:-1] + config.min_history  # (users,)
    last = end - 2 - config.followers  # followers end before the last two: validation and test
    train = np.flatnonzero((row >= first[user]) & (row <= last[user]))
    return {"train": train, "val": end[first <= end - 2] - 2, "test": end[first <= end - 1] - 1}


def chosen_follower(interactions: Interactions, rows: np.ndarray, config: ExampleConfig):
    """Return the chosen follower of each row (E,), and whether it may be used (E,).
    It has the best preference score, the earlier one of equals; it may be used if it is liked and
    scores above a random candidate. --positive first: it is the first liked one, at any score."""
    chosen, best = np.zeros(len(rows), np.int64), np.full(len(rows), -np.inf)
    for step in range(config.followers):
        ratings = interactions.rating[rows + step]
        scores = preference_score(ratings.astype(float), step, config.decay)
        if config.positive == "first":
            scores = np.where(ratings >= config.min_rating, np.inf, 0.0)
        chosen[scores > best] = step
        np.maximum(best, scores, out=best)
    liked = interactions.rating[rows + chosen] >= config.min_rating
    return chosen, liked & (best > preference_score(RANDOM_RATING, RANDOM_STEPS, config.decay))


def draw_candidates(
    interactions: Interactions,
    split: str,
    rows: np.ndarray,  # (E,) rows to predict
    steps: np.ndarray,  # (F,) steps from such a row to the followers among the candidates
    config: ExampleConfig,
    rng: np.random.Generator,
    retrieve: Callable | None = None,
) -> Examples:
    """Draw the random candidates, score and shuffle all 20, order the negatives, draw templates."""
    log, E, F = interactions, len(rows), len(steps)
    follow = rows[:, None] + steps  # (E, F) rows of the log
    users, count = log.user[rows], NUM_CANDIDATES - F
    seen = None  # (E, S) items that are no random candidates; None: all that the user touched
    if config.exclude == "seen":  # rows that the prompt shows; the target's where it has fewer
        shown = np.flatnonzero(~(log.rating < config.min_rating) | (config.history_items == "all"))
        before = (np.searchsorted(shown, rows)[:, None] - 1 - np.arange(config.history)).clip(0)
        before = np.where(shown[before] < log.start[users, None], rows[:, None], shown[before])
        seen = log.item[np.concatenate([before, follow], 1)]
    if config.negatives == "retrieved":
        randoms = retrieve(log, rows, config.history, count, seen)
    else:
        randoms = _draw_unseen(log, users, count, seen, config.negatives, rng)
    if len(short := np.flatnonzero((randoms < 0).any(1))):
        what = f"user {log.user_ids[users[short[0]]]}: of {log.num_items} items, fewer than {count}"
        what += " are not in the prompt" if seen is not None else " are untouched by this user"
        raise ValueError(f"{what}; lower --core, raise --followers, or take --exclude seen")

    items = np.concatenate([log.item[follow], randoms], 1).astype(np.int32)
    scores = np.full(items.shape, preference_score(RANDOM_RATING, RANDOM_STEPS, config.decay))
    scores[:, :F] = preference_score(log.rating[follow], steps, config.decay)
    chosen = chosen_follower(log, rows, config)[0] if split == "train" else np.zeros(E, int)
    slots = np.tile(np.arange(NUM_CANDIDATES), (E, 1))
    order = rng.permuted(slots, axis=1)  # shown slot -> drawn slot
    target = (order == chosen[:, None]).argmax(1).astype(np.int32)
    negative_order = rng.permuted(slots[slots != target[:, None]].reshape(E, -1), axis=1)
    return Examples(
        interactions=interactions,
        split=split,
        history=config.history,
        position=rows.astype(np.int64),
        candidates=np.take_along_axis(items, order, 1),
        target=target,
        scores=np.take_along_axis(scores, order, 1).astype(np.float32),
        is_random=order >= F,
        negative_order=negative_order.astype(np.int32),
        template=rng.integers(len(TEMPLATES), size=E).astype(np.int32),
        min_shown_rating=config.min_rating if config.history_items == "positive" else 0.0,
        ratings=config.ratings,
        list_in_prompt=config.list_in_prompt,
    )


def _draw_unseen(log: Interactions, users, count: int, seen, kind: str, rng) -> np.ndarray:
    """Draw (E, count) distinct items per row, new to the user or, if given, not in `seen` (E, S).

    Taken or repeated items are drawn again; after 50 rounds (the user touched nearly all items)
    they are drawn from the items that are left. A row is -1 if too few are left."""
    n, uniform, owners, items = log.num_items, kind == "uniform", log.user, log.item
    if seen is not None:
        users, owners, items = np.arange(len(seen)), np.arange(len(seen))[:, None], seen
    taken = np.sort((owners.astype(np.int64) * n + items).ravel())  # pairs of owner and item
    drawn = np.full((len(users), count), -1, np.int64)
    left, missing = np.arange(len(users)), np.ones(drawn.shape, bool)  # rows, their missing slots
    for _ in range(50):
        own, owner = drawn[left], users[left[np.nonzero(missing)[0]]].astype(np.int64)
        new = rng.integers(n, size=len(owner)) if uniform else rng.choice(log.item, len(owner))
        own[missing], pairs = new, owner * n + new
        missing[missing] = taken[np.searchsorted(taken, pairs) % len(taken)] == pairs
        for k in range(count):  # the first of equal items stays
            missing[:, k] |= (own[:, :k] == own[:, k, None]).any(1)
        drawn[left] = own
        left, missing = left[missing.any(1)], missing[missing.any(1)]

    weights = np.ones(n) if uniform else np.bincount(log.item, minlength=n)
    for e in left:
        free = np.setdiff1d(np.arange(n), taken[taken // n == users[e]] % n)
        shares = weights[free] / weights[free].sum()
        drawn[e] = rng.choice(free, count, False, shares) if len(free) >= count else -1
    return drawn


# ------------------------------------------------------------------------------------------ prompts
# the question before the candidates; [with ratings|without], <with the list|without>
TEMPLATES = (
    "A user {did} these {things}, oldest first[, and rated each from 1 to 5|]:\n{history}\n"
    "Which <of the following |>{things} will the user {do} next and like?",
    "[Ratings from 1 to 5 that one person gave to {things}|What one person {did}], in order of "
    "time:\n{history}\nChoose the one this person will {do} next and rate highly:",
    "Recent {things} of a user[, with ratings (5 is best)|]:\n{history}\n"
    "<From this list, recommend|Recommend> what the user should {do} next:",
    "Below is what someone {did}[ and how they rated it|], the latest last.\n{history}\n"
    "<One of these {things} comes next and will please them. Name it.|"
    "Name what comes next and will please them.>",
    "History of a user ({things}[ and ratings, 1 = disliked, 5 = loved|, oldest first]):\n"
    "{history}\nPredict the next one the user will {do} and enjoy<, given these candidates|>:",
)
LOWEST = len(TEMPLATES)  # the template of the probe aversion; never drawn
LIKED, LEAST = "will the user {do} next and like?", "would the user rate lowest?"
ALL_TEMPLATES = (*TEMPLATES, TEMPLATES[0].replace(LIKED, LEAST))


def history_text(shown: list[tuple[str, float]]) -> str:
    """A line for each (title, rating), without the rating if it is NaN."""
    return "\n".join(t if isnan(r) else f"{t} | Rating: {r:g}" for t, r in shown)


def render_prompt(example: Example, skip: int = 0) -> str:
    """The prompt text, up to "Answer:", without its `skip` oldest history items."""
    things, did, do = example.words
    unrated = example.history and all(isnan(rating) for _, rating in example.history)
    template = ALL_TEMPLATES[example.template]
    template = re.sub(r"\[(.*?)\|(.*?)\]", r"\2" if unrated else r"\1", template)
    template = re.sub(r"<(.*?)\|(.*?)>", r"\1" if example.list_in_prompt else r"\2", template)
    history = history_text(example.history[skip:])
    question = template.format(things=things, did=did, do=do, history=history)
    return "\n".join([question, *(example.candidates if example.list_in_prompt else []), "Answer:"])


# ------------------------------------------------------------------------------------------- tokens
@dataclass
class Encoded:
    """Tokenised examples: prompt ids, and completion ids per item of the log."""

    examples: Examples
    prompts: list[np.ndarray]  # int32 ids
    completions: dict[int, list[int]]  # item code -> ids with EOS
    num_shortened: int = 0  # prompts that lost history items to fit max_length
    histories: np.ndarray | None = None  # (E, 2) first token of each history, and one past its last

    def title_ids(self, e: int, slots) -> list[list[int]]:
        """Completion ids of these candidates of example e."""
        return [self.completions[int(self.examples.candidates[e, s])] for s in slots]

    def tree(self, batch: list[int], slots) -> "PromptTree":
        """One PromptTree of the examples in `batch`, each with its row of `slots` (E, N)."""
        completions = [self.title_ids(e, slots[e]) for e in batch]
        return build_tree([self.prompts[e] for e in batch], completions)


def tree_widths(encoded: Encoded, slots: np.ndarray) -> np.ndarray:
    """(E, 2) token counts: each example's prompt, and all its completions at `slots` (E, N)."""
    inner = np.zeros(encoded.examples.interactions.num_items, np.int64)  # EOS is never an input
    inner[list(encoded.completions)] = [len(ids) - 1 for ids in encoded.completions.values()]
    items = np.take_along_axis(encoded.examples.candidates, np.asarray(slots), 1)
    return np.stack([list(map(len, encoded.prompts)), inner[items].sum(1)], 1)


def shortened(example: Example, longest: int, tokenizer: Tokenizer, max_length: int):
    """Prompt ids that fit with the longest completion, and how many oldest items were left out."""
    for skip in range(max(1, len(example.history))):
        (prompt,) = tokenizer.encode_prompts([render_prompt(example, skip)])
        if len(prompt) + longest <= max_length:
            return prompt, skip
    what = f"user {example.user}: {len(prompt)} prompt tokens, with a history of one item"
    raise ValueError(f"{what}; raise --max_length {max_length}")


def encode_examples(examples: Examples, tokenizer: Tokenizer, max_length: int) -> Encoded:
    """Render and tokenise all examples; prompts that are too long lose their oldest items.
    ValueError if two candidates tokenise alike, or prompt and title differently as one text."""
    items = np.unique(examples.candidates).tolist()
    titles = tokenizer.encode_completions([examples.interactions.titles[i] for i in items])
    encoded = Encoded(examples, [], dict(zip(items, titles, strict=True)))
    texts = [render_prompt(examples[e]) for e in range(len(examples))]
    for e, prompt in enumerate(tokenizer.encode_prompts(texts)):
        candidates = encoded.title_ids(e, range(NUM_CANDIDATES))
        if len(set(map(tuple, candidates))) < NUM_CANDIDATES:
            same = f"two candidates have the same tokens: {examples[e].candidates}"
            raise ValueError(f"user {examples[e].user}: {same}")
        skip, longest = 0, max(map(len, candidates))
        if len(prompt) + longest > max_length:
            prompt, skip = shortened(examples[e], longest, tokenizer, max_length)
            encoded.num_shortened += 1
        if e < BOUNDARY_CHECKS:
            text, target = render_prompt(examples[e], skip), examples.target[e]
            title = examples[e].candidates[target]
            (whole,) = tokenizer.encode_answered([text], [title])
            if prompt + candidates[target][:-1] != whole:
                raise ValueError(f"tokenised differently as one text: {text[-80:]!r}, {title!r}")
        encoded.prompts.append(np.array(prompt, np.int32))  # a list takes ten times the memory
    return encoded


# ------------------------------------------------------------------------------------------ batches
@dataclass
class PromptTree:
    """A batch: a row per prompt, right-padded, then its N completions one after another."""

    input_ids: Tensor  # (B, P + C) int64
    position_ids: Tensor  # (B, P + C) int64; completions continue from the prompt's true length
    branch_ids: Tensor  # (B, P + C) int64: 0 prompt, 1..N completion, -1 padding
    rows: Tensor  # (M,) flat index of the hidden state that predicts the token
    labels: Tensor  # (M,) the token
    sequence_ids: Tensor  # (M,) b * N + n
    prompt_width: int
    num_completions: int

    def to(self, device) -> "PromptTree":
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **{name: to_device(t, device) for name, t in tensors.items()})

    def with_prompt_labels(self, spans: np.ndarray) -> "PromptTree":
        """Also score the prompts' tokens in these spans (B, 2), after the M of completions."""
        every = torch.arange(self.input_ids.numel()).view(self.input_ids.shape)
        tokens = torch.cat([row[slice(*span)] for row, span in zip(every, spans, strict=True)])
        labels = torch.cat([self.labels, self.input_ids.flatten()[tokens]])
        return replace(self, rows=torch.cat([self.rows, tokens - 1]), labels=labels)

    def sum_logps(self, token_logps: Tensor) -> Tensor:
        """Sum token log-probs (M,) per completion (B, N), bitwise the same in every run.
        Each completion gets a row, because index_add on a GPU adds in no fixed order."""
        B, N = len(self.input_ids), self.num_completions
        width = self.input_ids.shape[1] - self.prompt_width + 1  # C inputs, and EOS: a title fits
        starts = torch.searchsorted(self.sequence_ids, self.sequence_ids)  # (M,); ids ascend
        tokens = torch.arange(len(self.sequence_ids), device=self.sequence_ids.device)
        cells = self.sequence_ids * width + tokens - starts
        rows = token_logps.new_zeros(B * N * width).scatter(0, cells, token_logps[: len(tokens)])
        return rows.view(B, N, width).sum(2)


def build_tree(prompts: list, completions: list[list[list[int]]]) -> PromptTree:
    """Build the tree of B prompts (lists or arrays of ids), each with N completions ending in EOS.

    All of a completion is scored, but its EOS is a label only: n ids occupy n - 1 positions. The
    last prompt token predicts the first token of every completion."""
    counts = [len(group) for group in completions]
    sequences = [*prompts, *(ids for group in completions for ids in group)]
    same = len(prompts) == len(counts) and 0 < min(counts, default=0) == max(counts)
    if not same or min(map(len, sequences)) == 0:
        what = "all prompts need the same number of completions, and nothing may be empty"
        raise ValueError(f"{what}; got {counts} for {len(prompts)} prompts")
    B, P, N = len(prompts), max(map(len, prompts)), counts[0]
    C = max(sum(len(ids) - 1 for ids in group) for group in completions)
    input_ids, position_ids = np.zeros((2, B, P + C), np.int64)
    branch_ids = np.full((B, P + C), -1, np.int64)
    rows, labels, sequence_ids = [], [], []
    for b, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        length, first, at = len(prompt), b * (P + C), P  # first: flat index of the row
        input_ids[b, :length], branch_ids[b, :length] = prompt, 0
        position_ids[b, :length] = np.arange(length)
        for n, ids in enumerate(group):
            end = at + len(ids) - 1
            input_ids[b, at:end], branch_ids[b, at:end] = ids[:-1], n + 1
            position_ids[b, at:end] = np.arange(length, length + end - at)
            rows += [first + length - 1, *range(first + at, first + end)]
            labels += ids
            sequence_ids += [b * N + n] * len(ids)
            at = end
    arrays = (input_ids, position_ids, branch_ids, *map(np.array, (rows, labels, sequence_ids)))
    return PromptTree(*map(torch.from_numpy, arrays), prompt_width=P, num_completions=N)


def to_device(tensor: Tensor, device) -> Tensor:
    """Copy without waiting: from pageable memory the host would wait until the GPU is idle."""
    cuda = torch.device(device).type == "cuda"
    return (tensor.pin_memory() if cuda else tensor).to(device, non_blocking=cuda)


def micro_batches(widths, indices, num_ranks: int, budget: int) -> list[list[list[int]]]:
    """Divide one global batch: for each rank a list of micro-batches of examples of similar widths.

    Examples, sorted by tree_widths, are dealt out in turn. A micro-batch holds one example, or as
    many as fit into `budget` tokens with padding; ranks with fewer micro-batches get empty ones."""
    ordered = sorted((int(i) for i in indices), key=lambda i: (-sum(widths[i]), i))
    widths, ranks = np.asarray(widths), [[] for _ in range(num_ranks)]
    for n, batches in enumerate(ranks):
        for i in ordered[n::num_ranks]:
            together = [*batches[-1], i] if batches else [i]
            fits = len(together) == 1 or len(together) * widths[together].max(0).sum() <= budget
            batches[-1:] = [together] if fits else [batches[-1], [i]]
    return [batches + [[]] * (max(map(len, ranks)) - len(batches)) for batches in ranks]
