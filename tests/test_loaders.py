"""The interaction table against plain loops; MovieLens's files, damaged ones and the real ones."""

import os
import zipfile
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from data import Interactions, build_examples, k_core
from loaders.frozen import DataConfig, load_interactions, prepare
from loaders.published import movie_titles
from loaders.table import Rows, finish, unique_titles

DATA = Path(os.environ.get("RECPO_DATA") or Path(__file__).parents[2] / "shared/data")
MOVIELENS = DATA / "ml-1m.zip"
needs_movielens = pytest.mark.skipif(
    not MOVIELENS.exists(), reason=f"{MOVIELENS} is absent; RECPO_DATA names its folder"
)


def load_movielens(path) -> Interactions:
    return load_interactions(DataConfig(dataset="movielens", data_dir=str(path)))


def make_interactions(user, item, rating, timestamp, titles, name="") -> Interactions:
    """The log of raw columns; `titles` maps item id to title."""
    user_ids, user = np.unique(np.asarray(user), return_inverse=True)
    item_ids, item = np.unique(np.asarray(item), return_inverse=True)
    rating, time = np.asarray(rating, np.float32), np.asarray(timestamp, np.int64)
    ids = [*map(str, user_ids)], [*map(str, item_ids)]
    rows = Rows(user.astype(np.int32), item.astype(np.int32), rating, time, 1, *ids)
    titles = [titles[i] for i in item_ids.tolist()]
    return finish(rows, titles, name, key=lambda i: int(i) if i.isdecimal() else i)


def log_of(rows: list[tuple]) -> Interactions:
    """Of (user, item, rating, time) in any order."""
    return make_interactions(*zip(*rows, strict=True), {row[1]: f"item {row[1]}" for row in rows})


def rows_of(interactions: Interactions) -> list[tuple]:
    """The log's rows in its order, codes turned back into ids."""
    names = ("user", "item", "rating", "timestamp")
    columns = (getattr(interactions, name).tolist() for name in names)
    users, items = interactions.user_ids, interactions.item_ids
    return [(users[u], items[i], r, t) for u, i, r, t in zip(*columns, strict=True)]


def check_table(interactions: Interactions) -> None:
    """What every later step takes for granted."""
    start = interactions.start
    assert start[0] == 0 and start[-1] == len(interactions.user)
    assert (np.repeat(np.arange(interactions.num_users), np.diff(start)) == interactions.user).all()
    assert sorted(set(interactions.item.tolist())) == list(range(interactions.num_items))
    assert len(set(interactions.titles)) == len(interactions.titles) == len(interactions.item_ids)
    for begin, end in zip(start[:-1], start[1:], strict=True):
        assert (np.diff(interactions.timestamp[begin:end]) >= 0).all()
        assert len(set(interactions.item[begin:end])) == end - begin > 0


# ---------------------------------------------------------------------------------------- the table
def random_rows(seed: int, num_users: int = 12, num_items: int = 15, n: int = 200) -> list[tuple]:
    """(user, item, rating, time) with many repeated pairs and many equal times, in no order."""
    rng = np.random.default_rng(seed)
    columns = [rng.integers(m, size=n) for m in (num_users, num_items, 5, 8)]
    return [(f"u{u}", f"{i}0", int(r) + 1, int(t)) for u, i, r, t in zip(*columns, strict=True)]


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_sorted_and_the_last_of_a_pair_is_kept(seed):
    """By user, then time, ties in the order of the file."""
    rows, by_pair = random_rows(seed), {}
    for row in sorted(rows, key=lambda row: (row[0], row[3])):  # stable
        by_pair.pop(row[:2], None)  # or the pair would keep its earlier place
        by_pair[row[:2]] = row
    interactions = log_of(rows)
    check_table(interactions)
    assert rows_of(interactions) == list(by_pair.values()) and len(by_pair) < len(rows)
    titles = [interactions.titles[i] for i in interactions.item]
    assert titles == [f"item {row[1]}" for row in by_pair.values()]


def test_repeated_titles_get_numbers():
    assert unique_titles(["A", "B", "A", "A"]) == ["A", "B", "A (2)", "A (3)"]
    rng, choice = np.random.default_rng(0), ["A", "A (2)", "A (3)", "A (2) (2)", "B"]
    for _ in range(200):
        titles = rng.choice(choice, size=rng.integers(1, 9)).tolist()
        found = unique_titles(titles)
        assert len(set(found)) == len(titles) and unique_titles(found) == found, titles
        assert all(found[titles.index(title)] == title for title in titles)


def core_by_loop(rows: list[tuple], k: int) -> list[tuple]:
    """Remove one user or item with fewer than k rows at a time, until there is none."""
    while True:
        counts = [Counter(row[column] for row in rows) for column in (0, 1)]
        poor = [(c, value) for c in (0, 1) for value, n in counts[c].items() if n < k]
        if not poor:
            return rows
        rows = [row for row in rows if row[poor[0][0]] != poor[0][1]]


def test_k_core_equals_removal_one_by_one():
    left = []
    for seed, k in product(range(5), (0, 1, 2, 4, 6)):
        interactions = log_of(random_rows(seed, num_users=20, num_items=25, n=150))
        expected = core_by_loop(rows_of(interactions), k)
        left.append(len(expected))
        if not expected:
            with pytest.raises(ValueError, match=f"--core {k}"):
                k_core(interactions, k)
            continue
        core = k_core(interactions, k)
        check_table(core)
        assert rows_of(core) == expected == rows_of(k_core(core, k))
        assert core.titles == [f"item {i}" for i in core.item_ids]
    assert 0 in left and any(0 < n < 140 for n in left)  # several rounds, and nothing left


# ---------------------------------------------------------------------------------- MovieLens files
RATINGS = """\
7::3114::4::978301968
7::1193::5::978300760
2::661::3::978298413
2::1193::2::978298413
7::661::1::978300760
"""
MOVIES = """\
661::James and the Giant Peach (1996)::Animation|Children's|Musical
1193::Misérables, Les (1995)::Drama
3114::Toy Story 2 (1999)::Animation|Children's|Comedy
"""
ROWS = [  # of the same second in the order of the file
    ("2", "661", 3, 978298413), ("2", "1193", 2, 978298413),
    ("7", "1193", 5, 978300760), ("7", "661", 1, 978300760), ("7", "3114", 4, 978301968),
]  # fmt: skip


def zip_movielens(file: Path, ratings: str = RATINGS, movies: str = MOVIES) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        for name, text in (("ratings.dat", ratings), ("movies.dat", movies)):
            z.writestr(f"ml-1m/{name}", text.encode("latin-1"))
    return file


def check_small_movielens(interactions: Interactions) -> None:
    check_table(interactions)
    assert rows_of(interactions) == ROWS and interactions.name == "movielens"
    assert interactions.titles == ["James and the Giant Peach", "Les Misérables", "Toy Story 2"]


TITLES = {
    "Matrix, The (1999)": "The Matrix", "Mystery, Alaska (1999)": "Mystery, Alaska",
    "Associate, The (L'Associe)(1982)": "The Associate (L'Associe)",
    "Postino, Il (The Postman) (1994)": "Il Postino (The Postman)",
    "Seventh Seal, The (Sjunde inseglet, Det) (1957)": "The Seventh Seal (Sjunde inseglet, Det)",
    "Atalante, L' (1934)": "L'Atalante", "1984 (1984)": "1984",
    "Good, The Bad and The Ugly, The (1966)": "The Good, The Bad and The Ugly",
    "Titanic (1953)": "Titanic (1953)", "Titanic (1997)": "Titanic (1997)",
    "Robe, The (1953)": "The Robe (1953)", "The Robe (1970)": "The Robe (1970)",
}  # fmt: skip


def test_year_goes_and_article_moves_to_the_front():
    assert [*movie_titles(dict(enumerate(TITLES))).values()] == [*TITLES.values()]


DAMAGE = {  # ratings or movies -> what the message names, beside the file
    "cut record": (RATINGS[: RATINGS.rindex("::")] + "\n", MOVIES, "ratings.dat.*5"),
    "letters": (RATINGS.replace("::661::3", "::tt661::3"), MOVIES, "ratings.dat.*tt661"),
    "6 stars": (RATINGS.replace("::3::", "::6::"), MOVIES, "ratings.dat.*row 3, .*'6'"),
    "line gone": (RATINGS, MOVIES[: MOVIES.index("3114")], "movies.dat.*3114"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused_where_they_are_wrong(name, tmp_path):
    ratings, movies, culprit = DAMAGE[name]
    with pytest.raises(ValueError, match=culprit):
        load_movielens(zip_movielens(tmp_path / "ml-1m.zip", ratings, movies))


def test_damaged_zips_are_named(tmp_path):
    """Cut off anywhere or with any one byte changed, a zip gives a ValueError with its name, or the
    right log."""
    file, refused = zip_movielens(tmp_path / "ml-1m.zip"), 0
    whole = file.read_bytes()
    damaged = [whole[:n] for n in range(0, len(whole), 7)]
    damaged += [whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :] for i in range(len(whole))]
    for content in damaged:
        file.write_bytes(content)
        try:
            check_small_movielens(load_movielens(file))
        except ValueError as error:
            refused += "ml-1m.zip" in str(error)
    assert refused > len(damaged) / 2


# ------------------------------------------------------------------------------------ the real file
@cache
def movielens() -> Interactions:
    return load_movielens(MOVIELENS)


@needs_movielens
@pytest.mark.parametrize("positive, share", [("argmax", 0.716), ("first", 0.959)])
def test_movielens_training_prefixes_are_all_those_with_ten_followers(positive, share, monkeypatch):
    """5 interactions before, 10 after and before the user's last two; one of the ten is liked."""
    monkeypatch.setattr("data.draw_candidates", lambda interactions, split, rows, *rest: rows)
    options = {"dataset": "movielens", "data_dir": str(DATA), "train_size": 0}
    rows, liked = (
        build_examples(movielens(), DataConfig(**options, positive=positive, min_rating=least))
        for least in (0, 4)
    )
    assert len(rows["train"]) == len(set(rows["train"].tolist())) == 903569
    assert len(liked["train"]) / 903569 == pytest.approx(share, abs=5e-4)


# core -> hash of the examples, users, items, interactions, examples: what was published with the
# default options must stay comparable
KNOWN = {
    0: ("56846b922f7a42454287e645cb327d720a62f6b10145686bad5afaf756377acb",
        (6040, 3706, 1000209), (10000, 3486, 3563)),
    20: ("4f5be1e891da251389f99ec6fb5e41f576af5643ba39d7b69550821a41a4c562",
         (6022, 3043, 995154), (10000, 3486, 3548)),
}  # fmt: skip


@needs_movielens
@pytest.mark.parametrize("core", KNOWN)
def test_hashes_and_sizes_of_movielens_stay(core, tmp_path):
    options = {"dataset": "movielens", "data_dir": str(MOVIELENS), "prepared_dir": str(tmp_path)}
    prepared = prepare(DataConfig(**options, core=core))
    log = prepared.interactions
    check_table(log)
    sizes = tuple(map(len, prepared.splits.values()))
    assert (prepared.hash, (log.num_users, log.num_items, len(log.user)), sizes) == KNOWN[core]
