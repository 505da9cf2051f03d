"""The interaction table against plain loops, and the MovieLens loader on hand-made files,
damaged ones and the real ones."""

import hashlib
import http.client
import io
import os
import zipfile
from collections import Counter
from functools import cache
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

from data import Interactions, build_examples, k_core
from loaders.frozen import DataConfig, load_interactions, prepare
from loaders.movielens import MOVIELENS_URL, download_movielens, movielens_titles
from loaders.table import make_interactions, stable_order, unique_titles

DATA = Path(os.environ.get("RECPO_DATA") or Path(__file__).parents[2] / "shared/data")
MOVIELENS = DATA / "ml-1m.zip"
needs_movielens = pytest.mark.skipif(
    not MOVIELENS.exists(),
    reason=f"{MOVIELENS} is absent; RECPO_DATA names the folder of ml-1m.zip",
)


def load_movielens(path) -> Interactions:
    return load_interactions(DataConfig(dataset="movielens", data_dir=str(path)))


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


@pytest.mark.parametrize("scale", [1, 1 << 50])  # key and row in one number, or not
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_the_order_is_that_of_a_stable_sort(scale, dtype):
    """Keys may be negative, and far from zero."""
    for n in (0, 1, 2, 500):
        for shift in (0, -5, 1 << 25):
            key = np.random.default_rng(n).integers(-3, 20, n) * scale + shift
            key = key.astype(dtype) if scale == 1 else key
            assert np.array_equal(stable_order(key), np.argsort(key, kind="stable"))


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
    """A number is added to repeated titles, and never one that would repeat another title."""
    assert unique_titles(["A", "B", "A", "A"]) == ["A", "B", "A (2)", "A (3)"]
    rng, choice = np.random.default_rng(0), ["A", "A (2)", "A (3)", "A (2) (2)", "B"]
    for _ in range(200):
        titles = rng.choice(choice, size=rng.integers(1, 9)).tolist()
        found = unique_titles(titles)
        assert len(set(found)) == len(titles) and unique_titles(found) == found, titles
        assert all(name.startswith(title) for title, name in zip(titles, found, strict=True))
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
    """What is left does not depend on the order of removal; rows keep their order and content."""
    left = []
    for seed in range(5):
        interactions = log_of(random_rows(seed, num_users=20, num_items=25, n=150))
        for k in (0, 1, 2, 4, 6):
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


def write_movielens(folder: Path, ratings: str = RATINGS, movies: str = MOVIES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ratings.dat").write_bytes(ratings.encode("latin-1"))
    (folder / "movies.dat").write_bytes(movies.encode("latin-1"))
    return folder


def zip_movielens(file: Path, names=("ratings.dat", "movies.dat")) -> Path:
    contents = {"ratings.dat": RATINGS, "movies.dat": MOVIES}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        for name in names:
            z.writestr(f"ml-1m/{name}", contents[name].encode("latin-1"))
    return file


def check_small_movielens(interactions: Interactions) -> None:
    check_table(interactions)
    assert rows_of(interactions) == ROWS and interactions.name == "movielens"
    assert interactions.titles == ["James and the Giant Peach", "Les Misérables", "Toy Story 2"]


def test_movielens_loads_from_folder_and_zip(tmp_path):
    """The files' folder, the one around it, the zip, and the folder that holds the zip."""
    folder = write_movielens(tmp_path / "outer/ml-1m")
    (tmp_path / "zipped").mkdir()
    archive = zip_movielens(tmp_path / "zipped/ml-1m.zip")
    for path in (folder, folder.parent, archive, archive.parent):
        check_small_movielens(load_movielens(path))


TITLES = {
    "Matrix, The (1999)": "The Matrix",
    "Mystery, Alaska (1999)": "Mystery, Alaska",
    "Associate, The (L'Associe)(1982)": "The Associate (L'Associe)",
    "Postino, Il (The Postman) (1994)": "Il Postino (The Postman)",
    "Seventh Seal, The (Sjunde inseglet, Det) (1957)": "The Seventh Seal (Sjunde inseglet, Det)",
    "Atalante, L' (1934)": "L'Atalante",
    "Good, The Bad and The Ugly, The (1966)": "The Good, The Bad and The Ugly",
    "2001: A Space Odyssey (1968)": "2001: A Space Odyssey",
    "1984 (1984)": "1984",
    "Titanic (1953)": "Titanic (1953)",
    "Titanic (1997)": "Titanic (1997)",
    "Robe, The (1953)": "The Robe (1953)",
    "The Robe (1970)": "The Robe (1970)",
}


def test_year_goes_and_article_moves_to_the_front():
    """Nothing is cut out of a title's middle, no foreign name is lost; shared names keep the year,
    also when only the article's place differs."""
    assert movielens_titles(dict(enumerate(TITLES))) == dict(enumerate(TITLES.values()))


DAMAGE = {  # ratings or movies -> what the message names, beside the file
    "cut in a number": (RATINGS[:-1], MOVIES, "ratings.dat"),
    "cut record": (RATINGS[: RATINGS.rindex("::")] + "\n", MOVIES, "ratings.dat.*5"),
    "letters": (RATINGS.replace("::661::3", "::tt661::3"), MOVIES, "ratings.dat.*tt661"),
    "6 stars": (RATINGS.replace("::3::", "::6::"), MOVIES, "ratings.dat.*2::661::6"),
    "item 0": (RATINGS.replace("2::661::", "2::0::"), MOVIES, "ratings.dat.*2::0::3"),
    "bars": (RATINGS, MOVIES.replace("::", "|"), "movies.dat"),
    "cut": (RATINGS, MOVIES[: MOVIES.rindex("::")], "movies.dat"),
    "line gone": (RATINGS, MOVIES[: MOVIES.index("3114")], "movies.dat.*3114"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused_where_they_are_wrong(name, tmp_path):
    """Whatever is cut off, or holds anything but whole and sensible records."""
    ratings, movies, culprit = DAMAGE[name]
    with pytest.raises(ValueError, match=culprit):
        load_movielens(write_movielens(tmp_path, ratings, movies))


def test_missing_files_and_damaged_zips_are_named(tmp_path):
    """Cut off anywhere or with any one byte changed, a zip gives a ValueError with its name, or the
    right log."""
    (write_movielens(tmp_path / "half") / "movies.dat").unlink()
    zip_movielens(tmp_path / "half.zip", ["ratings.dat"])
    for path, culprit in {"nowhere": "ratings", "half": "movies", "half.zip": "movies"}.items():
        with pytest.raises(ValueError, match=rf"{path}.*{culprit}.dat"):
            load_movielens(tmp_path / path)
    whole = zip_movielens(tmp_path / "ml-1m.zip").read_bytes()
    damaged = [whole[:n] for n in range(0, len(whole), 7)]
    damaged += [whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :] for i in range(len(whole))]
    file, refused = tmp_path / "damaged.zip", 0
    for content in damaged:
        file.write_bytes(content)
        try:
            check_small_movielens(load_movielens(file))
        except ValueError as error:
            refused += "damaged.zip" in str(error)
    assert refused > len(damaged) / 2


# ------------------------------------------------------------------------------------- the download
ERRORS = [URLError("no route"), TimeoutError("timed out"), http.client.IncompleteRead(b""), None]


@pytest.mark.parametrize("path", ["new", "new/ml-1m.zip"])
@pytest.mark.parametrize("error", ERRORS)
def test_only_a_download_with_the_published_checksum_is_put_in_place(
    path, error, tmp_path, monkeypatch
):
    """A broken or changed one gives one message with the address and the way out, or both
    checksums; a later try succeeds, leaves no partial file, and is not repeated."""
    content = zip_movielens(tmp_path / "made.zip").read_bytes()

    def broken(url, timeout):
        assert url == MOVIELENS_URL
        if error:
            raise error
        return io.BytesIO(content)

    monkeypatch.setattr("urllib.request.urlopen", broken)
    way_out = "--data_dir" if error else "md5 [0-9a-f]{32}, published c4d9eec"
    with pytest.raises(ValueError, match=f"{MOVIELENS_URL}.*{way_out}"):
        download_movielens(tmp_path / path)
    assert not (tmp_path / "new/ml-1m.zip").exists()
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(content))
    monkeypatch.setattr("loaders.movielens.MOVIELENS_MD5", hashlib.md5(content).hexdigest())
    download_movielens(tmp_path / path)
    check_small_movielens(load_movielens(tmp_path / path))
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["ml-1m.zip"]
    monkeypatch.setattr("urllib.request.urlopen", None)
    download_movielens(tmp_path / path)


# ------------------------------------------------------------------------------------ the real file
@cache
def movielens() -> Interactions:
    return load_movielens(MOVIELENS)


@needs_movielens
def test_movielens_training_prefixes_are_all_those_with_ten_followers(monkeypatch):
    """5 interactions before, 10 after and before the user's last two: 903,569;
    the chosen one of the ten must be liked."""
    lengths = np.diff(movielens().start)
    assert np.maximum(lengths - 2 - 10 - 5 + 1, 0).sum() == 903569
    # counting needs no candidates
    monkeypatch.setattr("data.draw_candidates", lambda interactions, split, rows, *rest: rows)
    options = {"dataset": "movielens", "data_dir": str(DATA), "train_size": 0}

    def training_rows(**more):
        return build_examples(movielens(), DataConfig(**options, **more))["train"]

    rows = training_rows(min_rating=0)
    assert len(rows) == len(set(rows.tolist())) == 903569
    ratings = movielens().rating[rows[:, None] + np.arange(10)].astype(int)
    # of the scores, times 2520: integers, so that ties are exact
    squares = ratings**2 * (2520 // np.arange(1, 11))
    best = np.take_along_axis(ratings, squares.argmax(1)[:, None], 1)
    for positive, liked, share in (("argmax", best >= 4, 0.716), ("first", ratings >= 4, 0.959)):
        assert len(training_rows(positive=positive)) == liked.any(1).sum()
        assert liked.any(1).mean() == pytest.approx(share, abs=5e-4)


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
    config = DataConfig(
        dataset="movielens", data_dir=str(MOVIELENS), core=core, prepared_dir=str(tmp_path)
    )
    prepared, log = prepare(config), prepare(config).interactions
    check_table(log)
    sizes = tuple(map(len, prepared.splits.values()))
    assert (prepared.hash, (log.num_users, log.num_items, len(log.user)), sizes) == KNOWN[core]
