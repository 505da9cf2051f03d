"""Steam's reviews and games, as Kang and McAuley published them: Python literals, one a line;
hours become ratings. Reference: Kang and McAuley 2018 (github.com/kang205/SASRec)."""

from dataclasses import replace

from data import Interactions
from loaders.files import Rows, find_file, literal_record, read_records, read_titles
from loaders.table import LogBuilder

NAME, WORDS = "steam", ("games", "played", "play")


def load(config) -> Interactions:
    """steam_reviews.json and steam_games.json (Python literals, gzipped or not) of a folder.
    The amount is hours of play."""
    file = find_file(config.data_dir, ("steam_reviews*", "*reviews*"), "steam_reviews.json.gz")
    games = find_file(
        file.parent, ("steam_games*", "*games*"), "steam_games.json.gz, for the titles"
    )
    builder = LogBuilder(file, "a Python dict with username, product_id, hours, date", amounts=True)
    rows, keys = Rows(builder), ("username", "product_id", "hours", "date")
    for number, record in read_records(file, literal_record, keys, builder.bad):
        if record.get("hours") is None:
            builder.skip("reviews without hours of play")
        else:
            rows.add(number, *(record.get(key) for key in keys))
    rows.flush()
    titles = {}
    for item, title in read_titles(games, literal_record, "id", ("app_name", "title")):
        if item in builder.items and title:
            titles.setdefault(item, title)
    interactions = builder.finish(titles, NAME, config.percentile or "item")
    return replace(interactions, words=WORDS)
