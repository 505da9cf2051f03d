"""Raw files: found in a folder, unpacked, decoded.

A file may be packed by gzip, bzip2 or zstd. Text is UTF-8; other bytes are read as Windows-1252
with a note, if they look like letters of western languages."""

import contextlib
import fnmatch
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from common import print0

SPLIT_NAMES = ("train", "valid", "val", "dev", "test")  # parts that a benchmark was cut into
NUMBER = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d+"  # a UUID, or a number
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}  # by first bytes
PACKED |= {b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}  # are refused
STRAY = re.compile("[\udc80-\udcff]+")  # bytes that are not UTF-8, by surrogateescape
WESTERN = {0xDC00 + b: bytes([b]).decode("cp1252", "replace") for b in range(128, 256)}


def visible_files(folder: Path, pattern: str = "*", below: bool = False) -> list[Path]:
    """The files of a folder that fit a pattern without case, but hidden ones; part 10 comes after
    part 9. `below`: those of its folders, too."""
    found = []
    for file in folder.rglob("*") if below else folder.iterdir():
        hidden = any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)
        if not hidden and fnmatch.fnmatch(file.name.lower(), pattern.lower()) and file.is_file():
            found.append(file)
    return sorted(found, key=lambda file: re.sub(r"\d+", lambda n: n[0].zfill(20), str(file)))


def find_files(
    path, patterns: Iterable[str], what: str, without: str = "", below: bool = False
) -> list[Path]:
    """`path` itself if it is a file, else what fits a pattern in that folder; earlier ones win.

    Several files must be parts of one export: alike but for numbers and words such as train and
    test, which come in that order. Files that fit `without` are passed over."""
    path = Path(path)
    if path.is_file():
        return [path]
    for pattern in patterns if path.is_dir() else ():
        found = visible_files(path, pattern, below)
        found = [file for file in found if not fnmatch.fnmatch(file.name, without)]
        words = {f: re.split("([^a-z]+)", f.name.lower()) for f in found}
        alike = {"".join(w for w in words[f] if w not in SPLIT_NAMES) for f in found}
        if len({re.sub(NUMBER, "#", name) for name in alike}) > 1:
            names = f"{[f.name for f in found[:20]]}; give one of them as --data_dir"
            raise ValueError(f"{path}: several files could be the {what}: {names}")
        if found:
            place = {word: n for n, word in enumerate(SPLIT_NAMES)}
            return sorted(found, key=lambda f: [place[w] for w in words[f] if w in place])
    inside = [f.name for f in sorted(path.iterdir())][:8] if path.is_dir() else "no such path"
    raise ValueError(f"{path}: no {what} (looked for {', '.join(patterns)}; found {inside})")


def name_of(files: list[Path]) -> str:
    """The file, or a pattern of the parts, for messages."""
    return str(files[0] if len(files) == 1 else files[0].parent / f"*{files[0].suffix}")


def facts(files: Iterable[Path]) -> list:
    """Names, sizes and times of files: where one differs, examples are prepared anew."""
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


@contextlib.contextmanager
def open_bytes(file: Path) -> Iterator:
    """A file's bytes, unpacked; ValueError names the file where they are damaged."""
    try:
        with open(file, "rb") as plain:
            start = plain.read(6)
            codec = next((PACKED[first] for first in PACKED if start.startswith(first)), None)
            if codec in ("xz", "zip"):
                raise ValueError(f"{file}: {codec}, or a spreadsheet; unpack it, give it as CSV")
            plain.seek(0)
            yield pa.input_stream(plain, compression=codec) if codec else plain
    except (OSError, EOFError, zlib.error) as error:
        what = f"cannot be read ({error}): damaged or cut off? Fetch it again"
        raise ValueError(f"{file}: {what}") from None


def read_head(file: Path, size: int = 1 << 16) -> str:
    """The beginning of a file's text."""
    with open_bytes(file) as f:
        return f.read(size).decode("utf-8", "replace").lstrip("\ufeff \t\r\n")


def decode(content: bytes, file: Path) -> str:
    """Text of UTF-8, or of Windows-1252 with a note; else a ValueError."""
    text = content.decode("utf-8-sig", "surrogateescape")
    stray, has_nul = STRAY.findall(text), "\0" in text[:1000]
    if stray or has_nul:
        first, count = re.search("[\0\udc80-\udcff]", text).start(), len("".join(stray))
        text = text.translate(WESTERN)
        example = text[max(0, first - 20) : first + 20].strip()
        if has_nul or count - len(stray) > count / 4:  # western letters stand alone
            way_out = "save it as UTF-8, such as by iconv -f GB18030 -t UTF-8"
            raise ValueError(f"{file}: not text in UTF-8 (near {example!r}): {way_out}")
        what = f"{count:,} bytes are not UTF-8; read as Windows-1252, such as {example!r}"
        print0(f"note: {file.name}: {what}. If that is wrong, save it as UTF-8")
    return text


def read_lines(file: Path) -> Iterator[str]:
    """Lines without their ends; the text is held as a whole only if it is not UTF-8."""
    number = 0
    try:
        with open_bytes(file) as f, io.TextIOWrapper(f, "utf-8-sig", newline="\n") as lines:
            for line in lines:
                number += 1
                yield line.rstrip("\r\n")
    except UnicodeDecodeError:
        with open_bytes(file) as f:
            text = decode(f.read(), file)
        yield from (line.rstrip("\r") for line in text.split("\n")[number:])
