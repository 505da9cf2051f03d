"""What the values of a column mean: ids, numbers, scales, moments in time.

Only the distinct values of a column are converted, all of them texts. One that is left empty (NULL,
NA, ...) is ABSENT, one that is not understood (a day or month first) is BAD."""

import contextlib
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ABSENT, BAD = -math.inf, math.nan  # of numbers
NO_ID, BAD_ID = -1, -2  # of the codes of ids; of times, too
ABSENT_TEXTS = {"", "\\N", "NA", "N/A", "#N/A", "<NA>", "NaN", "nan", "NaT", "null", "Null"}
ABSENT_TEXTS |= {"NULL", "None"}
ABSENT_IDS = frozenset(ABSENT_TEXTS | {"-1"})
ABSENT_TITLES = ABSENT_IDS | {"0"}  # fillna(0)
WORDS = {"true": 1.0, "false": 0.0}
MICRO = 1_000_000  # ticks of a second
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
DATES = {"%Y%m%d": (19700101, 21001231), "%Y%m%d%H%M%S": (197001 * 10**8, 2101 * 10**10)}


@dataclass
class Column:
    """The distinct values of a column as texts without blanks around them, and each row's code."""

    codes: np.ndarray  # (n,) int32, -1 for null
    values: list[str]


def coded(column: pa.ChunkedArray) -> Column:
    whole = column.dictionary_encode().combine_chunks()
    texts = pc.utf8_trim_whitespace(as_texts(whole.dictionary)).fill_null("")
    return Column(to_numpy(whole.indices.cast(pa.int32())), texts.to_pylist())


def as_texts(column):
    """A column of Arrow as texts; floats that are all whole are written as integers."""
    if pa.types.is_floating(column.type):
        with contextlib.suppress(pa.ArrowInvalid):
            column = column.cast(pa.int64())
    return column.cast(pa.string())


def to_numpy(array: pa.Array) -> np.ndarray:
    """An array with -1 for null. Arrow's own method would import pandas, if it is installed."""
    return np.from_dlpack(array.fill_null(-1) if array.null_count else array)


def read_ids(column: Column, absent=ABSENT_IDS) -> tuple[np.ndarray, list[str]]:
    """Code of each row's id (n,), NO_ID where there is none; and the ids in order of appearance."""
    ids = [*dict.fromkeys(text for text in column.values if text not in absent)]
    place = {text: n for n, text in enumerate(ids)} | dict.fromkeys(absent, NO_ID)
    return np.array([*map(place.get, column.values), NO_ID], np.int32)[column.codes], ids


def read_number(text: str) -> float:
    """A number, ABSENT or BAD."""
    with contextlib.suppress(ValueError):
        number = ABSENT if text in ABSENT_TEXTS else float(WORDS.get(text.lower(), text))
        return BAD if number == math.inf else number
    return BAD


def read_numbers(column: Column) -> np.ndarray:
    """float64 number, ABSENT or BAD of each distinct value, and ABSENT for null behind them."""
    return np.array([*map(read_number, column.values), ABSENT])


# ------------------------------------------------------------------------------------------- scales
def parse_scale(text: str) -> tuple[float, float]:
    """ "0,100" -> (0, 100), "binary" -> (0, 1); ValueError if it is no scale."""
    ends = [read_number(end.strip()) for end in text.replace("binary", "0,1").split(",")]
    if len(ends) != 2 or not -math.inf < ends[0] < ends[1]:
        raise ValueError(f"--scale {text!r}: expected LOWEST,HIGHEST (0,100), binary or rank:item")
    return ends[0], ends[1]


def scale_doubt(numbers: np.ndarray) -> str:
    """Why these numbers are hardly ratings from 1 to 5, and what to say; "" if they may be."""
    rated = numbers[np.isfinite(numbers)]
    rated = rated[rated != -1] if (rated > 1).any() else rated  # among others, -1 means none
    low, high = rated.min(initial=np.inf), rated.max(initial=-np.inf)
    zero_to_four = low == 0 and high == 4 and (rated == np.floor(rated)).all()
    if not len(rated) or (low >= 0 and 4 <= high <= 5 and not zero_to_four):
        return ""
    ends = f"{low if low < high else high - 1:g},{high:g}"
    others = "likes: --scale binary; hours, plays or prices: --scale rank:item"
    what = f"ratings from {low:g} to {high:g} do not look like 1 to 5; map the lowest and highest"
    return f"{what} possible one by --scale {ends}; {others}"


# -------------------------------------------------------------------------------------------- times
def parsed_times(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Moments to the microsecond, numbers, or texts that are not all of one kind."""
    if pa.types.is_temporal(column.type):
        zone = getattr(column.type, "tz", None)
        return column.cast(pa.timestamp("us", zone), safe=False)
    with contextlib.suppress(pa.ArrowException):
        return column.cast(pa.int64())
    column = column.cast(pa.string())
    column = pc.if_else(pc.is_in(column, pa.array(sorted(ABSENT_TEXTS))), None, column)
    for kind in (pa.int64(), pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC")):
        with contextlib.suppress(pa.ArrowInvalid):
            return column.cast(kind)
    return column


def read_times(column: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    """(n,) int64 ticks since 1970, NO_ID or BAD_ID; and the ticks of a second.

    A column has one form and one unit: moments or dates, UTC where no zone is named; numbers, whose
    unit is that of their median; or dates written as numbers throughout."""
    if pa.types.is_temporal(column.type):
        return to_numpy(column.cast(pa.int64()).combine_chunks()), MICRO
    if pa.types.is_integer(column.type):
        numbers = to_numpy(column.combine_chunks())
    else:
        texts = coded(column)
        numbers = read_numbers(texts)
        if np.isnan(numbers).sum() > len(texts.values) / 2:
            moments = np.array([*map(microseconds, texts.values), NO_ID], np.int64)
            return moments[texts.codes], MICRO
        numbers = numbers[texts.codes]
    fine = (numbers >= 0) & (numbers < 9e18)
    known = numbers if fine.all() else numbers[fine]
    middle, per_second = np.median(known) if len(known) else 0, 1
    while middle >= 1e11 * per_second:  # 1e11 s is the year 5138, 1e11 ms is 1973
        per_second *= 1000
    if known.dtype.kind == "f" and (known != np.floor(known)).any():
        known, per_second = np.rint(known * (MICRO / per_second)), MICRO
    known = known.astype(np.int64, copy=False)
    for form, (first, last) in DATES.items():
        if len(known) and first <= known.min() and known.max() <= last:
            distinct, places = np.unique(known, return_inverse=True)
            with contextlib.suppress(ValueError):  # Arrow would read 31 September
                dates = [datetime.strptime(str(n), form) for n in distinct.tolist()]
                known, per_second = np.array(dates, "M8[us]").astype(np.int64)[places], MICRO
    if len(known) == len(numbers):
        return known, per_second
    ticks = np.where((numbers == ABSENT) | (numbers == NO_ID), NO_ID, BAD_ID)
    ticks[fine] = known
    return ticks, per_second


def microseconds(text: str) -> int:
    """Microseconds since 1970 of a date with the year first, UTC if it names no zone; or BAD_ID."""
    date = re.sub(r"^(\d{4})[/.](\d\d)[/.](\d\d)", r"\1-\2-\3", text)
    date = re.sub(r"\s*([-+]00(:?00)?)?\s*(Z|UTC|GMT)?$", "", date)
    with contextlib.suppress(ValueError, OverflowError):
        moment = datetime.fromisoformat(date)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return max((moment - EPOCH) // timedelta(microseconds=1), BAD_ID)
    return NO_ID if text in ABSENT_IDS else BAD_ID
