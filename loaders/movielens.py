"""ML"""

import hashlib
import http.client
import io
import re
import urllib.request
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import Interactions, clean_title, make_interactions

MOVIELENS_URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"


MOVIELENS_MD5 = "c4d9eecfca2ab87c1945afe126590906"


def load_movielens(path) -> Interactions:
    """MovieLens-1M from its folder or zip (`ratings.dat`, `movies.dat`). ValueError names the file and line."""
    ratings, ratings_name = _movielens_file(Path(path), "ratings.dat")
    movies, movies_name = _movielens_file(Path(path), "movies.dat")
    names = {}
    for number, line in enumerate(movies.decode("latin-1").splitlines(), 1):
        parts = line.split("::")
        if len(parts) != 3 or not parts[0].isdigit() or not parts[1].strip():
            raise ValueError(
                f"{movies_name}: line {number} is not MovieID::Title::Genres: {line[:80]!r}"
            )
        names[int(parts[0])] = clean_title(parts[1])

    first = ratings[:200].split(b"\n", 1)[0]
    if first.count(b"::") != 3:
        raise ValueError(
            f"{ratings_name}: line 1 is not UserID::MovieID::Rating::Timestamp: {first[:80]!r}"
        )
    if not ratings.endswith(b"\n"):
        raise ValueError(
            f"{ratings_name}: ends in the middle of line {ratings.count(10) + 1}: truncated? Fetch it again"
        )
    try:
        table = np.loadtxt(
            io.BytesIO(ratings.replace(b"::", b"\t")), delimiter="\t", comments=None, ndmin=2
        )
    except ValueError:  # its message counts lines from 0 or 1 and recommends its own options
        record = re.compile(rb"\d+::\d+::\d+(\.\d+)?::\d+")
        number, line = next(
            (n, line)
            for n, line in enumerate(ratings.splitlines(), 1)
            if not record.fullmatch(line)
        )
        raise ValueError(
            f"{ratings_name}: line {number} is not UserID::MovieID::Rating::Timestamp: {line[:80]!r}"
        ) from None
    user, item, rating, timestamp = table.T
    bad = np.flatnonzero(
        ~((rating >= 1) & (rating <= 5) & (user > 0) & (item > 0) & (timestamp > 0))
    )
    if len(bad):
        raise ValueError(
            f"{ratings_name}: line {bad[0] + 1}: expected ids > 0, rating 1 to 5, time > 0: {table[bad[0]]}"
        )
    try:
        titles = movielens_titles(names)
        return make_interactions(
            user.astype(np.int64), item.astype(np.int64), rating, timestamp, titles, "movielens"
        )
    except ValueError as error:
        raise ValueError(f"{movies_name}: {error}") from None


def _movielens_file(path: Path, name: str) -> tuple[bytes, str]:
    """Contents of one of the files, and its name for messages."""
    for folder in (path, path / "ml-1m"):
        if (folder / name).is_file():
            return (folder / name).read_bytes(), str(folder / name)
    archive = path / "ml-1m.zip" if path.is_dir() else path
    if not archive.is_file():
        raise ValueError(
            f"{path}: no {name} and no ml-1m.zip there; give the MovieLens-1M folder or zip, or --download"
        )
    try:
        with zipfile.ZipFile(archive) as z:
            inside = [n for n in z.namelist() if n.rpartition("/")[2] == name]
            if not inside:
                raise ValueError(f"{archive}: holds no {name}; expected the MovieLens-1M zip")
            return z.read(inside[0]), f"{archive}:{inside[0]}"
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise ValueError(f"{archive}: not a whole zip file ({error}); fetch it again") from None


def movielens_titles(names: dict[int, str]) -> dict[int, str]:
    """ "Matrix, The (1999)" -> "The Matrix"; the year stays where two movies share a name ("Titanic (1997)")."""
    plain = {}
    for movie, name in names.items():
        title = re.sub(r"\s*\(\d{4}\)$", "", name)
        article = re.fullmatch(
            r"(.+), (The|An|A|Les|Le|La|L'|Il|Lo|El|Los|Las|Der|Die|Das|Det|Den|Un|Una)( \(.*\))?",
            title,
        )
        if article:
            head, word, rest = article.groups(default="")
            title = f"{word}{'' if word.endswith(chr(39)) else ' '}{head}{rest}"
        plain[movie] = title
    shared = Counter(plain.values())
    return {m: t if shared[t] == 1 else f"{t} {names[m][-6:]}" for m, t in plain.items()}


def download_movielens(path: Path) -> None:
    """Fetch the published zip with a progress bar; it is put in place only after its checksum fits."""
    target = path if path.suffix == ".zip" else path / "ml-1m.zip"
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        with urllib.request.urlopen(MOVIELENS_URL, timeout=60) as response, open(part, "wb") as out:
            total = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=target.name) as bar:
                while block := response.read(1 << 16):
                    out.write(block)
                    bar.update(len(block))
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(
            f"{MOVIELENS_URL}: {error}; fetch it by hand and give it as --data_dir"
        ) from None
    found = hashlib.md5(part.read_bytes()).hexdigest()
    if found != MOVIELENS_MD5:
        raise ValueError(
            f"{part}: md5 {found}, published {MOVIELENS_MD5}: damaged or changed; not used"
        )
    part.rename(target)
