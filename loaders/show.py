"""Show a data set: statistics, what was dropped, rendered examples with token boundaries.

python -m loaders --dataset movielens --data_dir ml-1m.zip
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import arg, parse_config
from data import Encoded, Examples, Interactions, encode_examples, render_prompt
from hub.files import resolve_path
from hub.tokenizer import Tokenizer
from loaders.frozen import DataConfig, Prepared, data_defaults, prepare

DEMO_BASE = Path(__file__).parents[1] / "demo" / "base"

# users, items, interactions in the paper's Table 3, and how to read them (a 20-core needs 20
# interactions per item and user)
TABLE_3 = {
    "movielens": (
        (6040, 3952, 994169),
        "the unfiltered data less one interaction per user (1,000,209 - 6,040 = 994,169), with the "
        "largest movie id for items; a 20-core (--core 20) would leave 6,022 users and 995,154 "
        "interactions",
    ),
    "amazon_books": (
        (5103, 38203, 62290),
        "1.6 interactions per item and 12 per user: no 20-core of anything; a sample of users, "
        "each less one interaction, fits",
    ),
    "steam": (
        (3171, 4251, 82072),
        "19.3 per item is below 20: no 20-core; with one more interaction per user it would be "
        "20.05",
    ),
    "beeradvocate": (
        (4724, 6105, 91207),
        "14.9 per item is below 20: no 20-core, but a sample of users",
    ),
    "lastfm": (
        (982, 107296, 307829),
        "2.9 per item: no 20-core; 107,296 is about Celma's count of artists with a MusicBrainz id "
        "(107,528 of 992 users), so items are artists",
    ),
}


@dataclass(frozen=True)
class InspectConfig(DataConfig):
    """Prepare examples; print statistics, what was dropped, and examples with token boundaries."""

    tokenizer: str = arg(
        str(DEMO_BASE),
        "directory of the model whose tokenizer cuts the shown examples",
        group="show",
    )
    max_length: int = arg(
        1024, "tokens of prompt and longest candidate, for the count of shortened prompts"
    )
    show: int = arg(0, "index of the first of three training examples that are shown")
    plots: str = arg("", "folder for pictures of ratings, lengths and prompts (needs matplotlib)")


def show() -> None:
    config = parse_config(InspectConfig, beneath=data_defaults)
    prepared = prepare(config)
    train = prepared.splits["train"]
    if not 0 <= config.show < len(train):
        raise ValueError(f"--show must be between 0 and {len(train) - 1}, got {config.show}")
    print(f"{config.dataset}: prepared in {prepared.folder}, hash {prepared.hash[:16]}\n")
    print(statistics(config, prepared))
    lengths = show_examples(config, train)
    if config.plots:
        draw(Path(config.plots), prepared.interactions, lengths)


def statistics(config: DataConfig, prepared: Prepared) -> str:
    """Markdown: sizes before and after the filter and in the paper, then one line per property."""
    interactions, raw = prepared.interactions, prepared.raw_counts
    per_user, per_item = (
        np.diff(interactions.start),
        np.bincount(interactions.item, minlength=interactions.num_items),
    )
    rows = [("read", raw["users"], raw["items"], raw["interactions"])]
    rows.append(
        (
            f"after --core {config.core}",
            interactions.num_users,
            interactions.num_items,
            len(interactions.user),
        )
    )
    paper, reading = TABLE_3.get(interactions.name, (None, ""))
    rows += [("paper, Table 3", *paper)] if paper else []
    out = ["|  | users | items | interactions |", "|---|---|---|---|"]
    out += [f"| {name} | {u:,} | {i:,} | {n:,} |" for name, u, i, n in rows]
    out += ["", f"The paper's row reads as: {reading}."] if paper else []
    out += ["", "dropped or changed while reading:"] if interactions.notes else []
    out += [f"  {count:>10,}  {why}" for why, count in interactions.notes.items()]

    rated = interactions.rating[~np.isnan(interactions.rating)]
    values, counts = np.unique(rated, return_counts=True)
    if len(values) > 12:
        rounded = np.clip(np.rint(rated), 1, 5).astype(int)
        values, counts = np.arange(1, 6), np.bincount(rounded, minlength=6)[1:]
    shares = counts / max(1, len(rated))
    shown = ", ".join(f"{v:g}: {s:.1%}" for v, s in zip(values, shares, strict=True))
    out += ["", f"ratings {shown or 'none'}"]
    for name, counts in (("user", per_user), ("item", per_item)):
        out.append(f"interactions per {name}: {percentiles(counts, (0, 25, 50, 75, 100))}")
    same = interactions.user[1:] == interactions.user[:-1]
    tied = (interactions.timestamp[1:] == interactions.timestamp[:-1]) & same
    out.append(
        f"neighbours in a user's log with the same time: {tied.sum() / max(1, same.sum()):.1%} "
        "(the order of the file decides)"
    )
    out += title_lines(prepared)
    for split, examples in prepared.splits.items():
        users = len(np.unique(interactions.user[examples.position]))
        few = split == "train" and 0 < len(examples) < config.train_size
        all_of_them = f" (all there are; --train_size {config.train_size})" if few else ""
        out.append(f"{split}: {len(examples):,} examples of {users:,} users{all_of_them}")
    return "\n".join(out)


def percentiles(counts, wanted: tuple[int, ...]) -> str:
    return ", ".join(f"{q}% {np.percentile(counts, q):.0f}" for q in wanted)


def title_lines(prepared: Prepared) -> list[str]:
    """Titles that several items have, and how often a candidate's title stands inside another's."""
    titles = list(prepared.interactions.titles)
    taken, numbered = set(titles), 0
    for title in titles:
        name, _, number = title.rpartition(" (")
        numbered += number.endswith(")") and number[:-1].isdigit() and name in taken
    out = [
        f"titles: {len(titles):,}, {numbered:,} of them told apart by a number; "
        f"longest {max(map(len, titles))} characters"
    ]
    lists, inside = prepared.splits["test"].candidates[:5000], 0
    for row in lists:
        names = [titles[c] for c in row]
        inside += any(a != b and a in b for a in names for b in names)
    out.append(
        f"candidate lists in which one title stands inside another: "
        f"{inside / len(lists):.1%} of {len(lists):,} test lists"
    )
    return out


def show_examples(config: InspectConfig, examples: Examples) -> list[int]:
    """Three rendered examples, and the lengths of all training prompts in tokens."""
    tokenizer = Tokenizer(resolve_path(config.tokenizer))
    encoded = encode_examples(examples, tokenizer, config.max_length)
    lengths = [len(ids) for ids in encoded.prompts]
    print(f"\nprompt tokens ({config.tokenizer}): {percentiles(lengths, (0, 5, 50, 95, 99, 100))}")
    print(
        f"prompts shortened to --max_length {config.max_length}: "
        f"{encoded.num_shortened} ({encoded.num_dropped} history items)"
    )
    for e in range(config.show, min(config.show + 3, len(examples))):
        show_example(encoded, e, tokenizer)
    return lengths


def show_example(encoded: Encoded, e: int, tokenizer: Tokenizer) -> None:
    """The prompt, the chosen and three rejected titles with their scores, the token boundary."""
    examples, example = encoded.examples, encoded.examples[e]
    chosen_score = example.scores[example.target]
    print(f"\n---- training example {e}, user {example.user}:\n\n{render_prompt(example)}")
    print(f"\nchosen:   {example.candidates[example.target]!r}, score {chosen_score:.3f}")
    for slot in examples.negatives(3)[e]:
        kind = "random" if examples.is_random[e, slot] else "follows"
        score = example.scores[slot]
        print(
            f"rejected: {example.candidates[slot]!r}, score {score:.3f} ({kind}), "
            f"target margin {chosen_score / score:.2f}"
        )
    (completion,) = encoded.slots(e, [example.target])
    shown = []
    for ids in (encoded.prompts[e].tolist()[-3:], completion):
        tokens = [tokenizer.inner.decode([i], skip_special_tokens=False) for i in ids]
        shown.append(" ".join(map(repr, tokens)))
    print(f"boundary: ... {shown[0]} || {shown[1]}   (|| ends the prompt; all behind it is scored)")


def draw(folder: Path, interactions: Interactions, prompt_tokens: list[int]) -> None:
    """statistics.png: ratings, history lengths, item popularity, prompt lengths."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("--plots needs matplotlib: pip install matplotlib") from None
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    ratings = Counter(
        np.rint(interactions.rating[~np.isnan(interactions.rating)] * 2).astype(int).tolist()
    )
    axes[0, 0].bar([r / 2 for r in ratings], ratings.values(), width=0.4)
    axes[0, 0].set(title="Ratings", xlabel="rating", ylabel="interactions", xlim=(0, 5.5))
    for axis, counts, what in (
        (axes[0, 1], np.diff(interactions.start), "user"),
        (axes[1, 0], np.bincount(interactions.item), "item"),
    ):
        edges = np.geomspace(1, max(2, counts.max() + 1), 40)
        axis.hist(counts, bins=np.unique(edges.round()))
        axis.set(
            title=f"Interactions per {what}",
            xlabel="interactions",
            ylabel=f"{what}s",
            xscale="log",
            yscale="log",
        )
    axes[1, 1].hist(prompt_tokens, bins=40)
    axes[1, 1].set(title="Training prompts", xlabel="tokens", ylabel="prompts")
    users, items = f"{interactions.num_users:,} users", f"{interactions.num_items:,} items"
    figure.suptitle(
        f"{interactions.name}: {users}, {items}, {len(interactions.user):,} interactions"
    )
    figure.savefig(folder / "statistics.png", dpi=120)
    print(f"\nwritten to {folder / 'statistics.png'}")
