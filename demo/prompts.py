"""Made-up prompts for a small base to practise on, and the titles that answer them.

Lists: titles drawn at random, whatever their kind, as a history with random ratings and as a list.
Every listed title is right, so the best a model can do is to spread its answer evenly over the
list: it reads, and prefers nothing. Some lists are of *mixed* titles, whose words changed partners:
a model that knows titles by heart writes the first word of one and the second of another, and of
mixed ones only the list tells what belongs together.

Questions: which listed title is like these, like the latest, like the latest one liked? There a
recommender's own prompt is answered by titles like the latest one *disliked*. So time, ratings and
kinds are looked up and compared, but for the wrong item: what a user reads next depends on the
latest liked one, and fine-tuning only has to turn to it (planted world: going by the latest
disliked ranks .07 first, by the latest liked .43, chance .05).
"""

from dataclasses import dataclass, replace

import numpy as np

from data import (
    NUM_CANDIDATES,
    TEMPLATES,
    Example,
    PromptTree,
    Words,
    build_tree,
    history_text,
    render_prompt,
)
from hub.tokenizer import Tokenizer

SPREADS = (2, 4, 10)  # kinds among the titles of a history, or of a crowded list
KEPT = 3  # titles of each kind that are in no history, so that a list may have them
LONGEST = 16  # titles of a history before a question
ASK = "Which of the following {things} is like "
RATED = "Some {things} with ratings, the latest last:\n{history}\n"
QUESTIONS = {
    "alike": "These {things} are like each other:\n{history}\n" + ASK + "them?",
    "last": RATED + ASK + "the latest?",
    "liked": RATED + ASK + "the latest rated 4 or 5?",
}


@dataclass
class Prompt:
    """A text, and the listed titles that answer it: all of them equally right."""

    text: str
    answers: list[str]
    whole: int = 4  # answers that are scored to their end, the others by their first token


def shuffled(items, rng) -> list:
    return [items[i] for i in rng.permutation(len(items))]


def recommender_text(rated: list[tuple[str, float]], listed: list[str], words: Words, rng) -> str:
    template = int(rng.integers(len(TEMPLATES)))
    return render_prompt(Example(words, "", rated, listed, 0, [], template))


def made_up_prompt(titles: list[str], list_size: int, shown: int, words: Words, rng) -> Prompt:
    """Different titles, drawn evenly: a history of `shown`, rated at random, and a list."""
    drawn = rng.choice(len(titles), size=list_size + shown, replace=False)
    chosen = [titles[i] for i in drawn]
    rated = [(title, float(rng.integers(1, 6))) for title in chosen[list_size:]]
    return Prompt(recommender_text(rated, chosen[:list_size], words, rng), chosen[:list_size])


def kinds_to_ask_for(kinds: list[list[str]]) -> list[list[str]]:
    """Those with titles enough for a history and a list; none if the others cannot fill a list."""
    kinds = [kind for kind in kinds if len(kind) >= 2 * KEPT]
    others = sum(map(len, kinds)) - max(map(len, kinds), default=0)
    return kinds if others >= LONGEST + NUM_CANDIDATES else []


def kind_prompt(
    kinds: list[list[str]], question: str, list_size: int, right: int, words: Words, rng
) -> Prompt:
    """A list with `right` titles of the kind asked for; with none of them any title answers.

    Up to six others are of the history's other kinds. `question` is one of QUESTIONS, or a
    recommender's prompt: "disliked" is answered by titles like the latest one rated 1 or 2, "any"
    by all that are listed."""
    order = [shuffled(kind, rng) for kind in kinds]
    few = rng.permutation(len(kinds))[: 1 if question == "alike" else int(rng.choice(SPREADS))]
    history = shuffled([title for k in few for title in order[k][:-KEPT]], rng)
    lengths = (1, 6) if question == "alike" else (4, LONGEST)
    history = history[: int(rng.integers(*lengths, endpoint=True))]
    ratings = rng.integers(1, 6, size=len(history)).tolist()
    low, high = {"liked": (4, 5), "disliked": (1, 2)}.get(question, (1, 5))
    meant = len(history) - 1
    meant = max((n for n, rating in enumerate(ratings) if low <= rating <= high), default=meant)
    ratings[meant] = min(max(low, ratings[meant]), high)

    kind = next(k for k in few if history[meant] in kinds[k])
    answers = order[kind][-KEPT:][:right]
    near = shuffled([title for k in few if k != kind for title in order[k][-KEPT:]], rng)
    near = near[: int(rng.integers(7))]
    read = {*history, *near}
    other = [t for k, kind_order in enumerate(order) if k != kind for t in kind_order]
    other = near + shuffled([title for title in other if title not in read], rng)
    listed = shuffled(answers + other[: list_size - right], rng)
    rated = list(zip(history, map(float, ratings), strict=True))
    if question in ("disliked", "any"):
        right_ones = listed if question == "any" else answers or listed
        return Prompt(recommender_text(rated, listed, words, rng), right_ones)
    shown = "\n".join(history) if question == "alike" else history_text(rated)
    asked = QUESTIONS[question].format(things=words[0], history=shown)
    return Prompt("\n".join([asked, *listed, "Answer:"]), answers or listed)


def mixed(titles: list[str], rng) -> list[str]:
    """Titles that changed the words behind their first."""
    parts = [title.partition(" ") for title in titles]
    ends = shuffled([gap + tail for _, gap, tail in parts], rng)
    return sorted({first + end for (first, _, _), end in zip(parts, ends, strict=True)})


def crowded(kinds: list[list[str]], least: int, rng) -> list[str]:
    """Titles of few kinds, more than `least` if there are so many."""
    titles, few = [], int(rng.choice(SPREADS))
    for n, k in enumerate(rng.permutation(len(kinds))):
        if n >= few and len(titles) > least:
            break
        titles += kinds[k]
    return titles


class Practice:
    """Batches of made-up prompts, and how long their lists are by now."""

    def __init__(self, config, kinds: list[list[str]], words: Words, tokenizer: Tokenizer):
        self.config, self.words, self.tokenizer = config, words, tokenizer  # a PretrainConfig
        self.kinds = kinds_to_ask_for(kinds)
        self.list_size, self.continues, self.begins = 3, 0.0, 0.0
        titles = [title for kind in kinds for title in kind]
        self.titles = shuffled(titles, np.random.default_rng(config.seed))

    def draw(self, step: int) -> list[list[Prompt]]:
        """The micro-batches of a step: a function of (seed, step, list size).

        Real and mixed lists; once they are long, either of them and three that ask for kinds."""
        config, longest = self.config, self.list_size
        rng = np.random.default_rng([config.seed, 1, step, longest])
        if not self.kinds or longest < NUM_CANDIDATES:
            size = int(rng.integers(2, longest + 1)) if config.title_tokens else longest
            return [self.draw_lists(longest, rng), self.draw_lists(size, rng, mix=True)]
        parts = [["disliked"], [*QUESTIONS, "disliked"], list(QUESTIONS)]
        if step >= config.steps:
            parts = [["any"], ["any"], list(QUESTIONS)]
        lists = self.draw_lists(longest, rng, mix=step % 2 == 0, crowd=True)
        return [lists, *(self.draw_questions(questions, rng) for questions in parts)]

    def draw_lists(self, size: int, rng, mix=False, crowd=False) -> list[Prompt]:
        """Prompts that any listed title answers; mixed titles are all written whole."""
        title_tokens = self.config.title_tokens
        mix = mix and not title_tokens
        playing = self.titles if title_tokens else self.titles[: 60 * self.list_size]
        shown = int(rng.integers(1, self.list_size + 1))
        prompts = []
        for _ in range(self.num_prompts(size, shown, full=mix)):
            titles = crowded(self.kinds, size + shown, rng) if crowd else playing
            if mix:
                titles = mixed(titles, rng)
            listed = min(size, len(titles) - 1)  # mixing may have made two of them one
            room = min(shown, len(titles) - listed)
            prompt = made_up_prompt(titles, listed, room, self.words, rng)
            prompts.append(replace(prompt, whole=listed) if mix else prompt)
        return prompts

    def draw_questions(self, questions: list[str], rng) -> list[Prompt]:
        """Prompts that ask for a kind, with up to KEPT right answers each."""
        size = int(rng.integers(2 * KEPT, NUM_CANDIDATES + 1))
        right = int(rng.integers(KEPT + 1))
        return [
            kind_prompt(self.kinds, str(rng.choice(questions)), size, right, self.words, rng)
            for _ in range(self.num_prompts(size, shown=10))
        ]

    def num_prompts(self, size: int, shown: int, full: bool = False) -> int:
        """Prompts of a micro-batch with so many titles in list and history; fewer for short lists,
        which are learnt in small steps, unless `full`."""
        title = 1 if self.config.title_tokens else 4  # tokens; a rating is one more
        tokens = 30 + title * size + (title + 1) * shown
        share = 1 if self.config.title_tokens or full else self.list_size / NUM_CANDIDATES
        return max(4, int(self.config.batch_tokens * share / 2 / tokens))

    def tree(self, prompts: list[Prompt], rng) -> PromptTree:
        """One PromptTree: every answer by its first token, some of them to the end."""
        answers = [title for prompt in prompts for title in prompt.answers]
        completions = iter(self.tokenizer.encode_completions(answers))
        groups = []
        for prompt in prompts:
            ids = [next(completions) for _ in prompt.answers]
            whole = set(rng.permutation(len(ids))[: prompt.whole].tolist())
            groups.append([c if n in whole else c[:1] for n, c in enumerate(ids)])
        return build_tree(self.tokenizer.encode_prompts([p.text for p in prompts]), groups)

    def update(self, continues: float, begins: float) -> None:
        """A step's shares: of later tokens that are right, of probability on listed firsts."""
        self.continues += 0.1 * (continues - self.continues)
        self.begins += 0.1 * (begins - self.begins)
        if self.continues > 0.8 and self.begins > 0.6 and self.list_size < NUM_CANDIDATES:
            self.list_size += 1
            self.begins -= 0.05  # a few steps on the new size at least
