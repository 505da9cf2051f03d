"""What the values of a column mean: ids, numbers, scales, moments in time.

A column is coded, and only its distinct values are converted. A value that is left empty (NULL, NA,
...) is ABSENT, one that is not understood (a date with the day or the month first) is BAD."""

import contextlib
import math
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from uuid import UUID

import numpy as np

ABSENT, BAD = -math.inf, math.nan  # of numbers
NO_ID, BAD_ID = -1, -2  # of the codes of ids; of times, too
ABSENT_TEXTS = frozenset(
    ("", "\\N", "NA", "N/A", "#N/A", "<NA>", "NaN", "nan", "NaT", "null", "Null", "NULL", "None")
)
ABSENT_IDS = ABSENT_TEXTS | {"-1"}
ABSENT_TITLES = ABSENT_IDS | {"0"}  # fillna(0)


@dataclass
class Column:
    """A column of any type: the distinct values, and where each row's stands among them."""

    codes: np.ndarray  # (n,) int32, -1 for null
    values: list

    def value(self, row: int):
        return self.values[self.codes[row]]


# ---------------------------------------------------------------------------------------------- ids
def id_text(value) -> str | None:
    """The text of an id; None where the value is none (True, 1.5, a list)."""
    if isinstance(value, bytes):
        text = value.decode(errors="backslashreplace")
        value = str(UUID(bytes=value)) if len(value) == 16 else text
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, (float, Decimal)) and math.isfinite(value) and value == value // 1:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return "" if value != value else None  # NaN is absent


def read_ids(column: Column, absent=ABSENT_IDS) -> tuple[np.ndarray, list[str]]:
    """Code of each row's id (n,), NO_ID or BAD_ID; and the ids in order of appearance."""
    places, new = dict.fromkeys(absent, NO_ID), []
    for text in map(id_text, column.values):
        new.append(BAD_ID if text is None else places.setdefault(text, len(places) - len(absent)))
    return np.array([*new, NO_ID], np.int32)[column.codes], [*places][len(absent) :]


# ------------------------------------------------------------------------------------------ numbers
WORDS = {"true": 1.0, "false": 0.0}
THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")  # 1,234.5
DECIMAL_COMMA = re.compile(r"[-+]?\d*,\d+")  # 3,5


def read_number(value, decimal_comma: bool = False) -> float:
    """A number, ABSENT or BAD; a comma stands between thousands, or is decimal."""
    if isinstance(value, str):
        value = value.strip()
        if value in ABSENT_TEXTS:
            return ABSENT
        if decimal_comma:
            value = value.replace(".", "?").replace(",", ".")  # 1.234 may be 1234
        elif THOUSANDS.fullmatch(value):
            value = value.replace(",", "")
        value = WORDS.get(value.lower(), value)
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError):
        return BAD
    return ABSENT if math.isnan(number) else BAD if math.isinf(number) else number


def read_numbers(column: Column, delimiter: str = ",") -> np.ndarray:
    """float64 number, ABSENT or BAD of each distinct value, and ABSENT for null behind them.

    Commas stand between thousands, unless one cannot: then all are decimal. In a file whose fields
    a semicolon divides they are decimal always."""
    texts = [v.strip() for v in column.values if isinstance(v, str) and "," in v]
    decimals = [t for t in texts if DECIMAL_COMMA.fullmatch(t) and not THOUSANDS.fullmatch(t)]
    decimal_comma = bool(decimals or (texts and delimiter == ";"))
    return np.array([*(read_number(value, decimal_comma) for value in column.values), ABSENT])


# ------------------------------------------------------------------------------------------- scales
def parse_scale(text: str) -> tuple[float, float] | None:
    """ "0,100" -> (0, 100), "binary" -> (0, 1), "" -> None; ValueError if it is no scale."""
    if not text:
        return None
    ends = [read_number(end) for end in ("0,1" if text == "binary" else text).split(",")]
    if len(ends) != 2 or not all(map(math.isfinite, ends)) or ends[0] >= ends[1]:
        what = "the lowest and the highest rating, such as 0,100; or binary, or rank:item"
        raise ValueError(f"--scale {text!r}: expected {what}")
    return ends[0], ends[1]


def scale_doubt(numbers: np.ndarray) -> str:
    """Why these numbers are hardly ratings from 1 to 5, and the options that say what they are; ""
    if they look like them."""
    rated = numbers[np.isfinite(numbers)]
    rated = rated[rated != -1] if (rated > 1).any() else rated  # among others, -1 means none
    low, high = rated.min(initial=np.inf), rated.max(initial=-np.inf)
    zero_to_four = low == 0 and high == 4 and (rated == np.floor(rated)).all()
    if not len(rated) or (low >= 0 and 4 <= high <= 5 and not zero_to_four):
        return ""
    scale = f"{low if low < high else high - 1:g},{high:g}"
    return (
        f"ratings from {low:g} to {high:g} do not look like a scale from 1 to 5; name the lowest "
        "and the highest possible one (0 or -1 outside of them means none), and they are mapped: "
        f"--scale {scale}; likes: --scale binary; hours, plays or prices: --scale rank:item"
    )


# -------------------------------------------------------------------------------------------- times
DATE = re.compile(  # 2017/07/14 20:09, 2017-07-14 20:09:44.5 UTC, 2017-07-14 20:09:44 +0000
    r"(\d{4})[-/.](\d\d?)[-/.](\d\d?)(?:[T\s]+(\d\d?):(\d\d)(?::(\d\d)(?:[.,](\d+))?)?)?"
    r"\s*(?:Z|UTC|GMT|([-+]\d\d):?(\d\d)?)?(?:\s*UTC)?",
    re.IGNORECASE,
)
MICRO = 1_000_000
DATES = {"%Y%m%d": (19700101, 21001231), "%Y%m%d%H%M%S": (197001 * 10**8, 2101 * 10**10)}


def microseconds(value) -> int:
    """Microseconds since 1970 of a date with the year first, UTC where no zone is named;
    NO_ID or BAD_ID."""
    text = value.strip() if isinstance(value, str) else "?"
    if text in ABSENT_IDS:
        return NO_ID
    if not (match := DATE.fullmatch(text)):
        return BAD_ID
    *parts, fraction, hours, minutes = match.groups(default="00")
    zone = timedelta(hours=int(hours), minutes=int(hours[0] + minutes))
    with contextlib.suppress(ValueError, OverflowError):
        moment = datetime(*map(int, parts), int(f"{fraction:0<6}"[:6])) - zone
        since = (moment - datetime(1970, 1, 1)) // timedelta(microseconds=1)
        return since if since >= 0 else BAD_ID
    return BAD_ID


def read_times(column: Column | np.ndarray) -> tuple[np.ndarray, int]:
    """(n,) int64 ticks since 1970, NO_ID or BAD_ID; and the ticks of a second.

    A column has one form and one unit: moments, numbers, whose unit is that of their median, dates
    written as numbers throughout, or dates."""
    ticks = column
    if isinstance(column, Column):
        numbers = np.array([*map(read_number, column.values), ABSENT])
        ticks = numbers[column.codes]
        if np.isnan(numbers).sum() > len(column.values) / 2:
            moments = np.array([*map(microseconds, column.values), NO_ID], np.int64)
            return moments[column.codes], MICRO
    elif ticks.dtype.kind == "M":
        return ticks.view(np.int64), MICRO
    fine = (ticks >= 0) & (ticks < 9e18)
    good = ticks if fine.all() else ticks[fine]
    middle, per_second = np.median(good) if len(good) else 0, 1
    while middle >= 1e11 * per_second:  # 1e11 s is the year 5138, 1e11 ms is 1973
        per_second *= 1000
    if good.dtype.kind == "f" and (good != np.floor(good)).any():
        good, per_second = np.rint(good * (MICRO / per_second)), MICRO
    good = good.astype(np.int64)
    for form, (first, last) in DATES.items():
        if len(good) and first <= good.min() and good.max() <= last:
            distinct, places = np.unique(good, return_inverse=True)
            with contextlib.suppress(ValueError):
                dates = [datetime.strptime(str(n), form) for n in distinct.tolist()]
                good = np.array(dates, "datetime64[us]").astype(np.int64)[places]
                per_second = MICRO
    if len(good) == len(ticks):
        return good, per_second
    out = np.where((ticks == ABSENT) | (ticks == -1), NO_ID, BAD_ID)
    out[fine] = good
    return out, per_second
