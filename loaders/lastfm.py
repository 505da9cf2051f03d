"""LastFM-1K's listening events: an interaction is a user's first play of an artist,
its amount all plays. Reference: Celma 2010."""

import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

from data import Interactions
from loaders.files import Rows, find_file, read_lines
from loaders.table import LogBuilder

NAME, WORDS = "lastfm", ("artists", "listened to", "listen to")


def load(config) -> Interactions:
    """userid-timestamp-artid-artname-traid-traname.tsv, plain, gzipped,
    or inside lastfm-dataset-1K.tar.gz.

    An interaction is a user's first play of an artist that has a MusicBrainz id;
    its amount is the number of all plays."""
    what = "userid-timestamp-artid-artname-traid-traname.tsv, or lastfm-dataset-1K.tar.gz"
    file = find_file(config.data_dir, ("userid-timestamp*", "lastfm-dataset-1K*"), what)
    builder = LogBuilder(
        file, "user, time, artist id, artist, track id, track between tabs", "sum", amounts=True
    )
    rows, titles = Rows(builder), {}
    for number, line in enumerate(read_lines(file, _lastfm_member(file)), 1):
        fields = line.split("\t")
        if len(fields) != 6:
            builder.bad(number, line)
        elif not fields[2]:
            builder.skip("plays of an artist without MusicBrainz id")
        else:
            rows.add(number, fields[0], fields[2], 1.0, fields[1])
            titles.setdefault(fields[2], fields[3])
    rows.flush()
    interactions = builder.finish(titles, NAME, config.percentile or "item")
    return replace(interactions, words=WORDS)


def _lastfm_member(file: Path):
    """The events inside the published archive; None if the file is no archive."""
    try:
        if not tarfile.is_tarfile(file):
            return None
        archive = tarfile.open(file)
        member = next((m for m in archive if m.isfile() and "userid-timestamp" in m.name), None)
        if member is None:
            raise ValueError(f"{file}: holds no userid-timestamp-artid-artname-traid-traname.tsv")
        return archive.extractfile(member)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(
            f"{file}: the archive is damaged or cut off ({error}); fetch it again"
        ) from None
