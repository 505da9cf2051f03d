"""Raw files: found in a folder, unpacked, decoded.

Hidden files (.x, and macOS's ._x) are passed over. A file may be packed by gzip, bzip2, xz or zstd,
or be the single file of a zip. Text is UTF-8, or UTF-16 with a byte-order mark; bytes that are not
UTF-8 are Windows-1252, if they look like the letters of western languages, and that is said."""

import bz2
import codecs
import contextlib
import fnmatch
import gzip
import io
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from common import print0

BLOCK = 1 << 24  # bytes that are read together


# ------------------------------------------------------------------------------------------ folders
SPLIT_NAMES = ("train", "valid", "val", "dev", "test")  # parts that a benchmark was cut into
NUMBERED = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d+")  # a UUID, or a number


def natural_key(name: str) -> list:
    """A key by which part 10 comes after part 9."""
    return [int(text) if text.isdigit() else text for text in re.split(r"(\d+)", name)]


def visible_files(folder: Path, below: bool = False) -> list[Path]:
    """The files of a folder, part 10 after part 9; `below` in its folders, too."""
    found = []
    for file in folder.rglob("*") if below else folder.iterdir():
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith((".", "_") if below else ".") for part in parts)
        if not hidden and file.is_file():
            found.append(file)
    return sorted(found, key=lambda f: natural_key(str(f.relative_to(folder))))


def matching_files(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder by a pattern without case."""
    return [f for f in visible_files(folder) if fnmatch.fnmatch(f.name.lower(), pattern.lower())]


def find_files(
    path, patterns: Iterable[str], what: str, without: str = "", joined: Sequence[str] = ()
) -> list[Path]:
    """`path` itself if it is a file, else what fits a pattern in that folder; earlier ones win.

    Several files must be parts of one export: alike but for a number, or for one of the words
    `joined`, in whose order they come. Files that fit `without` are passed over."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; expected {what}")
    for pattern in patterns:
        found = matching_files(path, pattern)
        found = [f for f in found if not without or not fnmatch.fnmatch(f.name.lower(), without)]
        if len(found) > 1 and not (found := as_parts(found, joined)):
            names = [f.name for f in matching_files(path, pattern)]
            raise ValueError(
                f"{path}: several files could be {what}: {names}; give one of them as --data_dir"
            )
        if found:
            return found
    inside = [f.name for f in sorted(path.iterdir())][:8]
    raise ValueError(f"{path}: no {what} (looked for {', '.join(patterns)}; there are {inside})")


def as_parts(files: list[Path], joined: Sequence[str]) -> list[Path]:
    """The files in their order as parts of one; none if their names differ by more."""
    if len({NUMBERED.sub("#", f.name.lower()) for f in files}) == 1:
        return files
    words = [re.split(r"([^a-z]+)", f.name.lower()) for f in files]
    places = [next((w for w in joined if w in parts), None) for parts in words]
    rest = {tuple("#" if w == p else w for w in parts) for p, parts in zip(places, words)}
    if None in places or len(set(places)) < len(files) or len(rest) > 1:
        return []
    return [f for _, f in sorted(zip(places, files), key=lambda pair: joined.index(pair[0]))]


def name_of(files: list[Path]) -> str:
    """The file, or a pattern of the parts' names, for messages."""
    start = os.path.commonprefix([f.name for f in files])
    end = os.path.commonprefix([f.name[len(start) :][::-1] for f in files])[::-1]
    return str(files[0] if len(files) == 1 else files[0].parent / f"{start}*{end}")


def facts(files: Iterable[Path]) -> list:
    """Names, sizes and times of files: where one differs, examples are prepared anew."""
    return [(str(f.name), f.stat().st_size, f.stat().st_mtime_ns) for f in files]


# -------------------------------------------------------------------------------------------- bytes
UNPACKERS = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"),
}


@contextlib.contextmanager
def open_bytes(file: Path) -> Iterator:
    """A file's bytes, unpacked; whatever is wrong with them while they are read is one ValueError
    that names the file."""
    damage = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, OSError, RuntimeError)
    try:
        with open(file, "rb") as f:
            start = f.read(6)
        unpack = next((u for magic, u in UNPACKERS.items() if start.startswith(magic)), None)
        if start.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(file) as archive:
                names = [n for n in archive.namelist() if not n.startswith("__MACOSX")]
                if len(names) != 1:
                    raise ValueError(
                        f"{file}: a zip or Excel file of {len(names)} parts, {names[:3]}; unpack "
                        "it, and give the table as CSV"
                    )
                with archive.open(names[0]) as f:
                    yield f
            return
        with unpack(file) if unpack else open(file, "rb") as f:
            yield f
    except damage as error:
        if isinstance(error, OSError) and error.strerror:
            raise ValueError(f"{file}: cannot be opened ({error.strerror})") from None
        raise ValueError(
            f"{file}: the compressed file is damaged or cut off ({error}); fetch it again"
        ) from None


def read_head(file: Path, size: int = 1 << 20) -> bytes:
    """The first bytes, of whole lines where there are several."""
    with open_bytes(file) as f:
        head = f.read(size)
    return head if len(head) < size else head[: max(head.rfind(b"\n"), 0) + 1 or size]


# --------------------------------------------------------------------------------------------- text
class Stray:
    """Bytes of a text that are not UTF-8, and how they were read."""

    def __init__(self):
        self.count, self.together, self.end, self.example = 0, 0, -1, ""

    def __call__(self, error: UnicodeDecodeError) -> tuple[str, int]:
        byte = error.object[error.start : error.start + 1]
        text = byte.decode("cp1252", "ignore") or byte.decode("latin-1")
        self.count += 1
        self.together += error.start == self.end
        self.end = error.start + 1
        if not self.example:
            around = error.object[max(0, error.start - 20) : error.start + 20]
            self.example = around.decode("cp1252", "replace").strip()
        return text, error.start + 1


def decode(content: bytes, file: Path, quiet: bool = False) -> str:
    """Text of UTF-8, marked UTF-16, or Windows-1252, which is said; else a ValueError."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")
    stray = Stray()
    codecs.register_error("recpo-stray", stray)
    text = content.decode("utf-8-sig", "recpo-stray")
    if stray.together > stray.count / 4:
        raise ValueError(
            f"{file}: not text in UTF-8 (near {stray.example!r} in Windows-1252): save it as "
            "UTF-8, such as by iconv -f GB18030 -t UTF-8, or by open(..., encoding=...) in Python"
        )
    if stray.count and not quiet:
        print0(
            f"note: {file}: {stray.count:,} bytes are not UTF-8; read as Windows-1252, such as "
            f"{stray.example!r}. If that is wrong, save the file as UTF-8"
        )
    return text


def read_text(file: Path) -> str:
    with open_bytes(file) as f:
        return decode(f.read(), file)


def read_lines(file: Path) -> Iterator[str]:
    """Lines without their ends, of a text that is not held as a whole unless it is not UTF-8."""
    with open_bytes(file) as f:
        start = f.read(3)
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        yield from io.StringIO(read_text(file))
        return
    number = 0
    try:
        with open_bytes(file) as f:
            for line in io.TextIOWrapper(f, "utf-8-sig", newline="\n"):
                number += 1
                yield line.rstrip("\r\n")
    except UnicodeDecodeError:
        lines = read_text(file).split("\n")
        yield from (line.rstrip("\r") for line in lines[number:])
