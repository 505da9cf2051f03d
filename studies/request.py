"""One user's own history and candidates, ranked: python recommend.py --run DIR --request my.json

    {"history": [{"title": "...", "rating": 4}, ...], "candidates": ["...", ...]}

Titles are cleaned and prompts shortened as in training.
"""

import math
from pathlib import Path

import torch

from common import read_json
from data import Example, build_tree, render_prompt
from hub.tokenizer import Tokenizer
from loaders.frozen import words_of
from loaders.table import clean_title
from loaders.values import parse_scale
from model import Transformer
from runtime.sources import SourceConfig

REQUEST = '{"history": [{"title": "...", "rating": 4}, ...], "candidates": ["...", ...]}'


def read_request(config: SourceConfig) -> Example:
    """One user's history and candidates, cleaned as training cleans its titles;
    ValueError says what does not fit."""
    file = Path(config.request)
    request = read_json(file)
    history, candidates = request.get("history"), request.get("candidates")
    if not isinstance(history, list) or not isinstance(candidates, list) or len(candidates) < 2:
        raise ValueError(f"{file}: expected {REQUEST}, with at least two different candidates")
    rows = []
    for number, entry in enumerate(history, 1):
        entry = entry if isinstance(entry, dict) else {}
        title = request_title(file, f"history entry {number}", entry.get("title"))
        rows.append((title, request_rating(config, number, entry.get("rating"))))
    titles: list[str] = []
    for number, candidate in enumerate(candidates, 1):
        title = request_title(file, f"candidate {number}", candidate)
        if title in titles:
            first = titles.index(title) + 1
            raise ValueError(f"{file}: candidates {first} and {number} are one title, {title!r}")
        titles.append(title)
    if config.history_items == "positive":  # as the model was trained
        rows = [(title, rating) for title, rating in rows if rating >= config.min_rating]
    if not config.ratings:
        rows = [(title, math.nan) for title, _ in rows]
    words = words_of(config.dataset, config.data_dir)
    return Example(words, "", rows[-config.history :], titles, 0, [], 0)


def request_title(file: Path, place: str, title) -> str:
    if not isinstance(title, str):
        raise ValueError(f"{file}: {place} has no title; expected {REQUEST}")
    cleaned = clean_title(title)
    if not cleaned:
        raise ValueError(f"{file}: {place} is empty, {title!r}: leave it out or name it")
    return cleaned


def request_rating(config: SourceConfig, number: int, rating) -> float:
    """A rating as prompts show it, mapped from --scale;
    NaN, if the model saw histories without ratings and none is given."""
    positive = config.history_items == "positive"
    if rating is None and not positive and (not config.ratings or config.dataset == "prepared"):
        return math.nan
    scale = parse_scale(config.scale)
    low, high = scale or (0.0, 5.0)
    is_number = isinstance(rating, int | float) and not isinstance(rating, bool)
    if not is_number or not low <= rating <= high or (rating == 0 and not scale):
        what = f"of --scale {config.scale}" if scale else "above 0 and up to 5"
        raise ValueError(
            f"{config.request}: history entry {number} has rating {rating!r}; expected a number "
            f"{what}, as the ratings of the log"
        )
    return 1 + 4 * (rating - low) / (high - low) if scale else float(rating)


def fitting_prompt(config: SourceConfig, tokenizer: Tokenizer, example: Example, room: int) -> list:
    """Prompt ids that leave `room` of --max_length;
    the oldest history goes first, as in training."""
    for skip in range(max(1, len(example.history))):
        (prompt,) = tokenizer.encode_prompts([render_prompt(example, skip)])
        if len(prompt) <= config.max_length - room:
            return prompt
    raise ValueError(
        f"{config.request}: {len(prompt)} prompt tokens and a candidate of {room} do not fit "
        f"--max_length {config.max_length}; give fewer candidates, or raise it"
    )


def ranked_request(config: SourceConfig, model: Transformer, tokenizer: Tokenizer, device) -> str:
    """The candidates of one user, best first,
    with their share of the probability of all of them."""
    example = read_request(config)
    candidates = example.candidates
    completions = tokenizer.encode_completions(candidates)
    if len(set(map(tuple, completions))) < len(completions):
        raise ValueError(f"{config.request}: two candidates have the same tokens: {candidates}")
    prompt = fitting_prompt(config, tokenizer, example, max(map(len, completions)))
    tree = build_tree([prompt], [completions]).to(device)
    with torch.no_grad():
        logps = tree.sum_logps(model(tree)[0])[0]  # (N,)
    shares = logps.softmax(0).tolist()
    order = logps.argsort(descending=True).tolist()
    lines = [
        f"{rank:3}. {shares[n]:6.1%}  log-prob {logps[n]:8.2f}  {candidates[n]}"
        for rank, n in enumerate(order, 1)
    ]
    return "\n".join(lines)
