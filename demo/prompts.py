"""Made-up prompts for a small base to practise on, and the titles that answer them.

Lists: every listed title is right, so the best model reads the list and prefers no title. *Mixed*
titles have swapped words: only the list, not memory, tells which words belong together.

Questions: which listed title is like these, like the latest, like the latest one liked? Beside them
a recommender's prompt is answered by titles like the latest one *disliked*. So time, ratings and
kinds are compared, but for the wrong item, and fine-tuning only has to turn to the right one
(planted world: going by the latest disliked ranks .07 first, by the latest liked .43, chance .05).
"""

from collections import namedtuple

import numpy as np

from data import NUM_CANDIDATES, TEMPLATES, Example, Words, history_text, render_prompt

SPREADS = (2, 4, 10)  # kinds among the titles of a history, or of a crowded list
KEPT = 3  # titles of each kind that are in no history, so that a list may have them
ASK = "Which of the following {things} is like "
RATED = "Some {things} with ratings, the latest last:\n{history}\n"
QUESTIONS = {
    "alike": "These {things} are like each other:\n{history}\n" + ASK + "them?",
    "last": RATED + ASK + "the latest?",
    "liked": RATED + ASK + "the latest rated 4 or 5?",
}
RATINGS = {"liked": (4, 5), "disliked": (1, 2)}  # of the title that is meant
# a text, the listed titles that are right, and how many of these are scored to their end
Prompt = namedtuple("Prompt", "text answers whole", defaults=[4])


def recommender_text(rated: list[tuple[str, float]], listed: list[str], words: Words, rng) -> str:
    template = int(rng.integers(len(TEMPLATES)))
    return render_prompt(Example(words, "", rated, listed, 0, [], template))


def mixed(titles: list[str], rng) -> list[str]:
    """Titles that swapped the words after their first."""
    parts = [title.partition(" ") for title in titles]
    ends = rng.permutation([gap + tail for _, gap, tail in parts]).tolist()
    return sorted({first + end for (first, _, _), end in zip(parts, ends, strict=True)})


def list_prompt(titles: list[str], size: int, shown: int, words: Words, rng, mix=False) -> Prompt:
    """A list and a history of random titles, as long as asked for, or as there are titles."""
    titles = mixed(titles, rng) if mix else titles
    size = min(size, len(titles) - 1)
    drawn = rng.choice(len(titles), size=min(size + shown, len(titles)), replace=False)
    titles = [titles[i] for i in drawn]
    rated = [(title, float(rng.integers(1, 6))) for title in titles[size:]]
    text = recommender_text(rated, titles[:size], words, rng)
    return Prompt(text, titles[:size], whole=size if mix else 4)


def kind_prompt(kinds, question: str, size: int, right: int, words: Words, rng) -> Prompt:
    """A list with `right` titles of the kind asked for; if it is 0, any title is right.

    Up to six others are of the history's other kinds. `question` is one of QUESTIONS, or for a
    recommender's prompt "disliked", or "any", which every listed title answers."""
    order = [rng.permutation(kind).tolist() for kind in kinds]  # the last KEPT are for lists
    few = rng.permutation(len(kinds))[: 1 if question == "alike" else int(rng.choice(SPREADS))]
    history = rng.permutation([title for k in few for title in order[k][:-KEPT]]).tolist()
    shortest, longest = (1, 6) if question == "alike" else (4, 16)
    history = history[: int(rng.integers(shortest, longest + 1))]
    ratings = rng.integers(1, 6, size=len(history)).tolist()
    low, high = RATINGS.get(question, (1, 5))
    meant = max((n for n, r in enumerate(ratings) if low <= r <= high), default=len(history) - 1)
    ratings[meant] = min(max(low, ratings[meant]), high)
    kind = next(k for k in few if history[meant] in kinds[k])

    answers = order[kind][-KEPT:][:right]
    near = rng.permutation([t for k in few if k != kind for t in order[k][-KEPT:]]).tolist()
    near = near[: int(rng.integers(7))]
    taken = {*history, *near, *kinds[kind]}
    others = rng.permutation([t for titles in order for t in titles if t not in taken]).tolist()
    listed = rng.permutation(answers + (near + others)[: size - right]).tolist()
    rated = list(zip(history, map(float, ratings), strict=True))
    if question in QUESTIONS:
        shown = "\n".join(history) if question == "alike" else history_text(rated)
        asked = QUESTIONS[question].format(things=words[0], history=shown)
        return Prompt("\n".join([asked, *listed, "Answer:"]), answers or listed)
    right_ones = listed if question == "any" else answers or listed
    return Prompt(recommender_text(rated, listed, words, rng), right_ones)


def crowded(kinds: list[list[str]], least: int, rng) -> list[str]:
    """Titles of few kinds, more than `least` if there are so many."""
    titles, few = [], int(rng.choice(SPREADS))
    for n, k in enumerate(rng.permutation(len(kinds))):
        if n < few or len(titles) <= least:
            titles += kinds[k]
    return titles


class Practice:
    """The prompts of each step, and how long their lists are by now."""

    def __init__(self, config, kinds: list[list[str]], words: Words):
        self.config, self.kinds, self.words = config, kinds, words  # a PretrainConfig
        self.titles = np.random.default_rng(config.seed).permutation(sum(kinds, [])).tolist()
        self.list_size, self.continues, self.begins = 3, 0.0, 0.0

    def draw(self, step: int) -> list[list[Prompt]]:
        """The micro-batches of a step, a function of (seed, step, list size): real and mixed lists;
        once they are long, either of them, and three parts that ask for kinds."""
        longest, mix = self.list_size, not self.config.title_tokens
        rng = np.random.default_rng([self.config.seed, 1, step, longest])
        if len(self.kinds) == 1 or longest < NUM_CANDIDATES:
            size = longest if mix else int(rng.integers(2, longest + 1))
            return [self.lists(longest, rng), self.lists(size, rng, mix)]
        parts = [["disliked"], [*QUESTIONS, "disliked"], list(QUESTIONS)]
        if step >= self.config.steps:
            parts = [["any"], ["any"], list(QUESTIONS)]
        lists = self.lists(longest, rng, mix and step % 2 == 0, crowd=True)
        return [lists, *(self.questions(asked, rng) for asked in parts)]

    def lists(self, size: int, rng, mix=False, crowd=False) -> list[Prompt]:
        """Prompts that every listed title answers; mixed titles are all scored to their end."""
        shown = int(rng.integers(1, self.list_size + 1))
        playing = self.titles[: None if self.config.title_tokens else 60 * self.list_size]
        count = self.num_prompts(size, shown, full=mix)
        pools = (crowded(self.kinds, size + shown, rng) if crowd else playing for _ in range(count))
        return [list_prompt(titles, size, shown, self.words, rng, mix) for titles in pools]

    def questions(self, asked: list[str], rng) -> list[Prompt]:
        """Prompts that ask for a kind, with up to KEPT right answers each."""
        size, right = int(rng.integers(2 * KEPT, NUM_CANDIDATES + 1)), int(rng.integers(KEPT + 1))
        return [
            kind_prompt(self.kinds, str(rng.choice(asked)), size, right, self.words, rng)
            for _ in range(self.num_prompts(size, shown=10))
        ]

    def num_prompts(self, size: int, shown: int, full: bool = False) -> int:
        """Prompts in a micro-batch; unless `full`, short lists are learnt in smaller steps."""
        title = 1 if self.config.title_tokens else 4  # tokens; a rating is one more
        tokens = 30 + title * size + (title + 1) * shown
        share = 1 if self.config.title_tokens or full else self.list_size / NUM_CANDIDATES
        return max(4, int(self.config.batch_tokens * share / 2 / tokens))

    def update(self, continues: float, begins: float) -> None:
        """Average in a step: share of right later tokens, probability on listed first tokens."""
        self.continues += 0.1 * (continues - self.continues)
        self.begins += 0.1 * (begins - self.begins)
        if self.continues > 0.8 and self.begins > 0.6 and self.list_size < NUM_CANDIDATES:
            self.list_size += 1
            self.begins -= 0.05  # a few steps on the new size at least
