"""The interaction table against plain loops, and the MovieLens loader on hand-made files,
damaged ones and the real ones."""

import hashlib
import http.client
import io
import os
import re
import time
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
from loaders.table import clean_title, make_interactions, sort_order, unique_titles

DATA = Path(os.environ.get("RECPO_DATA") or Path(__file__).parents[2] / "shared/data")
MOVIELENS = DATA / "ml-1m.zip"
needs_movielens = pytest.mark.skipif(
    not MOVIELENS.exists(),
    reason=f"{MOVIELENS} is absent; RECPO_DATA names the folder of ml-1m.zip",
)

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


@pytest.mark.parametrize("scale", [1, 1 << 50])  # one key; two where they do not fit into one
def test_the_order_is_lexsorts(scale):
    """Ties stay as they stand; times may be negative, and far from zero."""
    rng = np.random.default_rng(0)
    for n in (0, 1, 2, 500):
        first = (
            rng.integers(0, 9, n).astype(np.int32) if scale == 1 else rng.integers(0, 9, n) * scale
        )
        for shift in (0, -5, 1 << 40):
            then = rng.integers(-3, 20, n) * min(scale, 1 << 20) + shift
            assert np.array_equal(sort_order(first, then), np.lexsort((then, first)))


def random_rows(seed: int, num_users: int = 12, num_items: int = 15, n: int = 200) -> list[tuple]:
    """(user, item, rating, timestamp) with many repeated pairs and many equal times,
    in no order."""
    rng = np.random.default_rng(seed)
    columns = [rng.integers(m, size=n) for m in (num_users, num_items, 5, 8)]
    return [(f"u{u}", int(i) * 10, int(r) + 1, int(t)) for u, i, r, t in zip(*columns, strict=True)]


def load_movielens(path) -> Interactions:
    return load_interactions(DataConfig(dataset="movielens", data_dir=str(path)))


def log_of(rows: list[tuple]) -> Interactions:
    return make_interactions(*zip(*rows, strict=True), {row[1]: f"item {row[1]}" for row in rows})


def rows_of(interactions: Interactions) -> list[tuple]:
    """The log's rows in its order, codes turned back into ids."""
    columns = zip(
        interactions.user.tolist(),
        interactions.item.tolist(),
        interactions.rating.tolist(),
        interactions.timestamp.tolist(),
        strict=True,
    )
    return [
        (interactions.user_ids[u], int(interactions.item_ids[i]), int(r), t)
        for u, i, r, t in columns
    ]


def check_table(interactions: Interactions) -> None:
    """What every later step takes for granted."""
    assert interactions.start[0] == 0 and interactions.start[-1] == len(interactions.user)
    assert (
        np.repeat(np.arange(interactions.num_users), np.diff(interactions.start))
        == interactions.user
    ).all()
    assert sorted(set(interactions.item.tolist())) == list(range(interactions.num_items))
    assert len(set(interactions.titles)) == len(interactions.titles) == len(interactions.item_ids)
    for start, end in zip(interactions.start[:-1], interactions.start[1:], strict=True):
        assert (np.diff(interactions.timestamp[start:end]) >= 0).all() and len(
            set(interactions.item[start:end])
        ) == end - start > 0


# ---------------------------------------------------------------------------------------- the table
@pytest.mark.parametrize("seed", range(5))
def test_rows_are_sorted_and_the_last_of_a_pair_is_kept(seed):
    """By user, then time, ties in the order of the file;
    of a repeated user-item pair only the last one stays."""
    rows = random_rows(seed)
    by_pair = {}
    for row in sorted(rows, key=lambda row: (row[0], row[3])):  # stable
        by_pair.pop(row[:2], None)  # or the pair would keep its earlier place
        by_pair[row[:2]] = row
    interactions = log_of(rows)
    check_table(interactions)
    assert rows_of(interactions) == list(by_pair.values())
    assert len(interactions.user) < len(rows)
    assert [interactions.titles[i] for i in interactions.item] == [
        f"item {row[1]}" for row in by_pair.values()
    ]


def test_items_without_title_are_named():
    """An item of the log that has no title is an error, not an empty candidate."""
    with pytest.raises(ValueError, match=r"1 items of the log have no title.*20"):
        make_interactions([1, 1], [10, 20], [5, 5], [1, 2], {10: "a"})


def test_repeated_titles_get_numbers():
    """A number is added to repeated titles, and never one that would repeat another title."""
    assert unique_titles(["A", "B", "A", "A"]) == ["A", "B", "A (2)", "A (3)"]
    assert unique_titles(["A", "A", "A (2)", "A (2)"]) == ["A", "A (3)", "A (2)", "A (2) (2)"]
    rng = np.random.default_rng(0)
    for _ in range(200):
        titles = rng.choice(
            ["A", "A (2)", "A (3)", "A (2) (2)", "B"], size=rng.integers(1, 9)
        ).tolist()
        found = unique_titles(titles)
        assert len(set(found)) == len(titles) and unique_titles(found) == found, titles
        for title, name in zip(titles, found, strict=True):
            assert name.startswith(title)
        for title in titles:
            assert found[titles.index(title)] == title, titles


def test_titles_are_cleaned():
    """HTML entities are text, and white space is single blanks: a title is one line of a prompt."""
    assert clean_title(" Sam &amp; Max\n Hit\tthe  Road ") == "Sam & Max Hit the Road"


# ------------------------------------------------------------------------------------------- k-core
def core_by_loop(rows: list[tuple], k: int) -> list[tuple]:
    """Remove one user or item with fewer than k rows at a time, until there is none."""
    while True:
        users = Counter(row[0] for row in rows)
        items = Counter(row[1] for row in rows)
        poor = [(0, u) for u, n in users.items() if n < k]
        poor += [(1, i) for i, n in items.items() if n < k]
        if not poor:
            return rows
        column, value = poor[0]
        rows = [row for row in rows if row[column] != value]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [0, 1, 2, 4, 6])
def test_k_core_equals_removal_one_by_one(seed, k):
    """What is left does not depend on the order of removal;
    rows keep their order and their content."""
    interactions = log_of(random_rows(seed, num_users=20, num_items=25, n=150))
    expected = core_by_loop(rows_of(interactions), k)
    if not expected:
        with pytest.raises(ValueError, match=f"--core {k}"):
            k_core(interactions, k)
        return
    core = k_core(interactions, k)
    check_table(core)
    assert rows_of(core) == expected
    assert core.titles == [f"item {i}" for i in core.item_ids] and core.name == interactions.name
    assert rows_of(k_core(core, k)) == expected


def test_k_core_test_is_not_vacuous():
    """Among the random logs above one loses rows in several rounds, and one loses all."""
    logs = [log_of(random_rows(seed, num_users=20, num_items=25, n=150)) for seed in range(5)]
    left = [len(core_by_loop(rows_of(interactions), k)) for interactions in logs for k in (4, 6)]
    assert 0 in left and any(0 < n < 140 for n in left)


# ---------------------------------------------------------------------------------- MovieLens files
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
    assert rows_of(interactions) == [
        ("2", 661, 3, 978298413),  # the same second: the order of the file
        ("2", 1193, 2, 978298413),
        ("7", 1193, 5, 978300760),
        ("7", 661, 1, 978300760),
        ("7", 3114, 4, 978301968),
    ]
    assert interactions.titles == ["James and the Giant Peach", "Les Misérables", "Toy Story 2"]
    assert interactions.name == "movielens"


def test_movielens_loads_from_folder_and_zip(tmp_path):
    """The folder of the files, the folder around it, the zip,
    and the folder that holds the zip give the same log."""
    write_movielens(tmp_path / "outer/ml-1m")
    (tmp_path / "zipped").mkdir()
    archive = zip_movielens(tmp_path / "zipped/ml-1m.zip")
    for path in (
        tmp_path / "outer/ml-1m",
        tmp_path / "outer",
        archive,
        archive.parent,
        str(archive),
    ):
        check_small_movielens(load_movielens(path))


@pytest.mark.parametrize(
    "name, title",
    [
        ("Matrix, The (1999)", "The Matrix"),
        ("American in Paris, An (1951)", "An American in Paris"),
        ("Bug's Life, A (1998)", "A Bug's Life"),
        ("Mystery, Alaska (1999)", "Mystery, Alaska"),
        ("Associate, The (L'Associe)(1982)", "The Associate (L'Associe)"),
        ("Postino, Il (The Postman) (1994)", "Il Postino (The Postman)"),
        ("Seventh Seal, The (Sjunde inseglet, Det) (1957)",
         "The Seventh Seal (Sjunde inseglet, Det)"),
        ("Umbrellas of Cherbourg, The (Parapluies de Cherbourg, Les) (1964)",
         "The Umbrellas of Cherbourg (Parapluies de Cherbourg, Les)"),
        ("Atalante, L' (1934)", "L'Atalante"),
        ("Good, The Bad and The Ugly, The (1966)", "The Good, The Bad and The Ugly"),
        ("...And Justice for All (1979)", "...And Justice for All"),
        ("2001: A Space Odyssey (1968)", "2001: A Space Odyssey"),
        ("1984 (1984)", "1984"),
    ],
)  # fmt: skip
def test_year_goes_and_article_moves_to_the_front(name, title):
    """A title reads as a person would write it:
    nothing is cut out of its middle, no foreign name is lost."""
    assert movielens_titles({1: name}) == {1: title}


def test_shared_names_keep_the_year():
    """Two movies of one name stay apart by their years,
    also when only the article's place differs."""
    names = {
        1: "Titanic (1953)",
        2: "Titanic (1997)",
        3: "Robe, The (1953)",
        4: "The Robe (1970)",
        5: "Alien (1979)",
    }
    titles = ["Titanic (1953)", "Titanic (1997)", "The Robe (1953)", "The Robe (1970)", "Alien"]
    assert list(movielens_titles(names).values()) == titles


@pytest.mark.parametrize(
    "ratings, culprit",
    [
        ("", r"line 1\b"),
        # only the line break is missing: a digit might be, too
        (RATINGS[:-1], r"line 5\b.*truncated"),
        (RATINGS[:-8], r"line 5\b.*truncated"),
        (RATINGS[: RATINGS.rindex("::")] + "\n", r"line 5\b"),  # in the middle of a record
        (RATINGS.replace("::3::", "::"), r"line 3\b"),
        (RATINGS.replace("::3::", "::3::3::"), r"line 3\b"),
        (RATINGS.replace("::", ","), r"line 1\b"),
        (RATINGS.replace("::", "\t"), r"line 1\b"),
        (RATINGS.replace("2::661::3::", "2,661,3,"), r"line 3\b"),
        (RATINGS.replace("2::661::", "2::tt661::"), r"line 3\b"),
        (RATINGS.replace("::3::", "::::"), r"line 3\b"),
        (RATINGS.replace("::3::", "::nan::"), r"line 3\b"),
        (RATINGS.replace("::3::", "::6::"), r"line 3\b"),
        (RATINGS.replace("::3::", "::0::"), r"line 3\b"),
        (RATINGS.replace("2::661::", "2::0::"), r"line 3\b"),
    ],
    ids=[
        "empty", "no line break", "cut", "cut record", "short", "long", "comma", "tab", "mixed",
        "letters", "blank", "nan", "6", "0", "item 0",
    ],
)  # fmt: skip
def test_bad_ratings_are_named_by_file_and_line(ratings, culprit, tmp_path):
    """A file that was cut off, or that holds anything but whole and sensible records,
    is refused where it is wrong."""
    write_movielens(tmp_path, ratings=ratings)
    with pytest.raises(ValueError, match=rf"ratings\.dat.*{culprit}"):
        load_movielens(tmp_path)


@pytest.mark.parametrize(
    "movies, culprit",
    [
        (MOVIES.replace("::", "|"), r"line 1\b"),
        (MOVIES.replace("1193::", "x1193::"), r"line 2\b"),
        (MOVIES[: MOVIES.rindex("::")], r"line 3\b"),  # in the middle of a record
        (MOVIES[: MOVIES.rindex("Toy")], r"line 3\b"),
        (MOVIES.replace("Misérables, Les (1995)", ""), r"line 2\b"),
        (MOVIES.replace("Misérables, Les (1995)", " "), r"line 2\b"),
        (MOVIES[: MOVIES.index("3114")], "1 items of the log have no title.*3114"),
        ("", "3 items of the log have no title"),
    ],
    ids=[
        "separator",
        "number",
        "cut record",
        "cut",
        "no title",
        "blank title",
        "line gone",
        "empty",
    ],
)
def test_bad_movies_are_named_by_file_and_line(movies, culprit, tmp_path):
    """Records without three fields, without a number or without a title are refused;
    so are rated movies not listed."""
    write_movielens(tmp_path, movies=movies)
    with pytest.raises(ValueError, match=rf"movies\.dat.*{culprit}"):
        load_movielens(tmp_path)


def test_missing_files_are_named(tmp_path):
    """A path without the files, a folder with one of them,
    and a zip with one of them say what is missing where."""
    with pytest.raises(ValueError, match=r"nowhere.*ratings\.dat"):
        load_movielens(tmp_path / "nowhere")
    (write_movielens(tmp_path / "half") / "movies.dat").unlink()
    with pytest.raises(ValueError, match=r"half.*movies\.dat"):
        load_movielens(tmp_path / "half")
    with pytest.raises(ValueError, match=r"half\.zip.*movies\.dat"):
        load_movielens(zip_movielens(tmp_path / "half.zip", ["ratings.dat"]))


def test_damaged_zip_is_refused_by_name(tmp_path):
    """Cut off anywhere or with any one byte changed, a zip gives a ValueError with its name,
    or the right log."""
    whole = zip_movielens(tmp_path / "ml-1m.zip").read_bytes()
    damaged = [whole[:n] for n in range(0, len(whole), 7)]
    damaged += [whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :] for i in range(len(whole))]
    file, refused, escaped = tmp_path / "damaged.zip", 0, set()
    for content in damaged:
        file.write_bytes(content)
        try:
            check_small_movielens(load_movielens(file))
        except ValueError as error:
            refused += "damaged.zip" in str(error)
        except Exception as error:
            escaped.add(type(error).__name__)
    assert not escaped
    assert refused > len(damaged) / 2


# ------------------------------------------------------------------------------------- the download
class Response(io.BytesIO):
    """What urlopen returns; breaks off with `error` at the end."""

    def __init__(self, content: bytes, error: Exception | None = None):
        super().__init__(content)
        self.headers, self.error = {"Content-Length": str(len(content))}, error

    def read(self, size=-1):
        block = super().read(size)
        if not block and self.error:
            raise self.error
        return block


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A function that makes the URL answer with these bytes,
    and publishes their checksum if asked to."""

    def serve(content: bytes, published: bool, error: Exception | None = None) -> None:
        def urlopen(url, timeout):
            assert url == MOVIELENS_URL
            return Response(content, error)

        monkeypatch.setattr("urllib.request.urlopen", urlopen)
        if published:
            monkeypatch.setattr("loaders.movielens.MOVIELENS_MD5", hashlib.md5(content).hexdigest())

    return serve


@pytest.mark.parametrize("path", ["new", "new/ml-1m.zip"])
def test_download_with_the_published_checksum_is_put_in_place(path, tmp_path, served, monkeypatch):
    """It loads at once, leaves no partial file behind, and is not fetched a second time."""
    served(zip_movielens(tmp_path / "made.zip").read_bytes(), published=True)
    download_movielens(tmp_path / path)
    check_small_movielens(load_movielens(tmp_path / path))
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["ml-1m.zip"]
    monkeypatch.setattr("urllib.request.urlopen", None)
    download_movielens(tmp_path / path)


def test_download_with_another_checksum_is_not_used(tmp_path, served):
    """Whatever is not the published file, whole,
    is refused with both checksums and not put in place."""
    content = zip_movielens(tmp_path / "made.zip").read_bytes()
    served(content, published=False)
    with pytest.raises(
        ValueError, match=f"md5 {hashlib.md5(content).hexdigest()}, published c4d9eec"
    ):
        download_movielens(tmp_path / "new")
    assert not (tmp_path / "new/ml-1m.zip").exists()


@pytest.mark.parametrize(
    "error",
    [
        URLError("no route"),
        TimeoutError("timed out"),
        ConnectionResetError("reset"),
        http.client.IncompleteRead(b""),
    ],
)
def test_broken_download_says_what_to_do(error, tmp_path, served):
    """No network, or one that breaks off, is one message with the address and the way out;
    a later try succeeds."""
    content = zip_movielens(tmp_path / "made.zip").read_bytes()
    served(content[:100], published=False, error=error)
    with pytest.raises(ValueError, match=f"{MOVIELENS_URL}.*--data_dir"):
        download_movielens(tmp_path / "new")
    assert not (tmp_path / "new/ml-1m.zip").exists()
    served(content, published=True)
    download_movielens(tmp_path / "new")
    check_small_movielens(load_movielens(tmp_path / "new"))


# ------------------------------------------------------------------------------------ the real file
@cache
def movielens() -> Interactions:
    return load_movielens(MOVIELENS)


@needs_movielens
def test_movielens_has_the_published_size():
    """6,040 users, 3,706 rated movies, 1,000,209 ratings of 1 to 5, nobody with fewer than 20;
    titles are unique."""
    interactions = movielens()
    check_table(interactions)
    assert (interactions.num_users, interactions.num_items, len(interactions.user)) == (
        6040,
        3706,
        1000209,
    )
    assert (
        set(interactions.rating.tolist()) == {1, 2, 3, 4, 5}
        and np.diff(interactions.start).min() == 20
    )
    assert interactions.rating.mean() == pytest.approx(3.58, abs=0.005)


@needs_movielens
def test_movielens_titles_read_well():
    """No title keeps a moved article or white space;
    a year stays only where two movies share the name."""
    titles = movielens().titles
    assert {
        "The Matrix",
        "An American in Paris",
        "Mystery, Alaska",
        "Titanic (1997)",
        "Les Misérables (1995)",
    } <= set(titles)
    assert [
        t for t in titles if t != clean_title(t) or not t or t.endswith((", The", ", A", ", An"))
    ] == []
    with_year = Counter(match[1] for t in titles if (match := re.fullmatch(r"(.+) \(\d{4}\)", t)))
    assert (len(with_year), sum(with_year.values()), min(with_year.values())) == (38, 80, 2)


@needs_movielens
@pytest.mark.parametrize(
    "core, size, num_val, num_test",
    [(0, (6040, 3706, 1000209), 3486, 3563), (20, (6022, 3043, 995154), 3486, 3548)],
)
def test_movielens_splits_have_the_known_sizes(core, size, num_val, num_test):
    """The k-core and the number of users whose last (test) or last but one (validation) item is
    liked."""
    started = time.perf_counter()
    interactions = k_core(load_movielens(MOVIELENS), core)
    splits = build_examples(
        interactions, DataConfig(dataset="movielens", data_dir=str(DATA), core=core)
    )
    seconds = time.perf_counter() - started
    print(f"MovieLens-1M, core {core}: {seconds:.1f} s from the zip to frozen examples")
    assert (interactions.num_users, interactions.num_items, len(interactions.user)) == size
    assert {split: len(examples) for split, examples in splits.items()} == {
        "train": 10000,
        "val": num_val,
        "test": num_test,
    }


@needs_movielens
def test_movielens_training_prefixes_are_all_those_with_ten_followers(monkeypatch):
    """5 interactions before, 10 after and before the user's last two: 903,569;
    the chosen one of the ten must be liked."""
    with zipfile.ZipFile(MOVIELENS) as z:
        lengths = Counter(
            line.split(b"::", 1)[0] for line in z.read("ml-1m/ratings.dat").splitlines()
        )
    assert sum(max(0, n - 2 - 10 - 5 + 1) for n in lengths.values()) == 903569
    # counting needs no candidates
    monkeypatch.setattr("data.draw_candidates", lambda interactions, split, rows, *rest: rows)
    interactions, options = (
        movielens(),
        {"dataset": "movielens", "data_dir": str(DATA), "train_size": 0},
    )
    rows = build_examples(interactions, DataConfig(**options, min_rating=0))["train"]
    assert len(rows) == len(set(rows.tolist())) == 903569
    ratings = interactions.rating[rows[:, None] + np.arange(10)].astype(int)
    # of the scores, times 2520: integers, so that ties are exact
    squares = ratings**2 * (2520 // np.arange(1, 11))
    best = np.take_along_axis(ratings, squares.argmax(1)[:, None], 1)
    for positive, liked, share in (("argmax", best >= 4, 0.716), ("first", ratings >= 4, 0.959)):
        rows = build_examples(interactions, DataConfig(**options, positive=positive))["train"]
        assert len(rows) == liked.any(1).sum()
        assert liked.any(1).mean() == pytest.approx(share, abs=5e-4)


# of the examples with default options: what was published with them must stay comparable
HASHES = {
    0: "56846b922f7a42454287e645cb327d720a62f6b10145686bad5afaf756377acb",
    20: "4f5be1e891da251389f99ec6fb5e41f576af5643ba39d7b69550821a41a4c562",
}


@needs_movielens
@pytest.mark.parametrize("core", HASHES)
def test_hashes_of_movielens_stay(core, tmp_path):
    config = DataConfig(
        dataset="movielens", data_dir=str(MOVIELENS), core=core, prepared_dir=str(tmp_path)
    )
    assert prepare(config).hash == HASHES[core]
