"""What the values of a column mean: ids, numbers however they are written, moments in time, scales.

A column is coded, and only its distinct values are converted, one by one. A value that is left
empty (NULL, NA, ...) is ABSENT: its row is left out and counted. One that is not understood is BAD.
Dates with the day or the month first are left out, because nobody can tell them apart."""

import math
import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
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

    @staticmethod
    def of(values) -> "Column":
        """The column of a list of Python values."""
        places: dict = {}
        known = (-1 if v is None else places.setdefault(v, len(places)) for v in values)
        codes = np.fromiter(known, np.int32, len(values))
        return Column(codes, list(places))

    @staticmethod
    def joined(columns: list["Column"]) -> "Column":
        if len(columns) == 1:
            return columns[0]
        places: dict = {}
        codes = []
        for column in columns:
            new = [places.setdefault(value, len(places)) for value in column.values]
            codes.append(np.array([*new, -1], np.int32)[column.codes])
        return Column(np.concatenate(codes), list(places))

    def converted(self, convert, null) -> np.ndarray:
        """(n,) convert(value) of each row, with `null` where there is none."""
        return np.array([*map(convert, self.values), null])[self.codes]


# ---------------------------------------------------------------------------------------------- ids
def id_text(value) -> str | None:
    """The text of an id; None where the value is none (True, 1.5, a list)."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, (float, Decimal)):
        whole = math.isfinite(value) and value == value // 1
        return str(int(value)) if whole else "" if value != value else None
    if isinstance(value, bytes):
        try:
            return str(UUID(bytes=value)) if len(value) == 16 else value.decode().strip()
        except UnicodeDecodeError:
            return None
    return None


def read_ids(column: Column, absent=ABSENT_IDS) -> tuple[np.ndarray, list[str]]:
    """Code of each row's id (n,), NO_ID or BAD_ID; and the ids in order of appearance."""
    places, new = {}, []
    for value in column.values:
        text = id_text(value)
        if text is None or len(text) > 1000:
            new.append(BAD_ID)
        elif text in absent:
            new.append(NO_ID)
        else:
            new.append(places.setdefault(text, len(places)))
    ids = [text.encode("utf-8", "replace").decode() for text in places]
    return np.array([*new, NO_ID], np.int32)[column.codes], ids


# ------------------------------------------------------------------------------------------ numbers
WORDS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0, "t": 1.0, "f": 0.0, "y": 1.0, "n": 0.0}
_SPACES = re.compile(r"(?<=\d)[\s\u00a0\u202f'’](?=\d{3}(?:\D|$))")  # 1 234, 1'234
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")  # 1,234.5
_DECIMAL_COMMA = re.compile(r"[-+]?\d*,\d+|[-+]?\d{1,3}(?:\.\d{3})+(?:,\d+)?")  # 3,5 and 1.234,5


def read_number(value, comma: str = "") -> float:
    """A number, ABSENT or BAD; `comma` says what it means in this column."""
    if isinstance(value, str):
        value = value.strip()
        if value in ABSENT_TEXTS:
            return ABSENT
        if value.lower() in WORDS:
            return WORDS[value.lower()]
        value = _SPACES.sub("", value)
        if comma == "thousands" and _THOUSANDS.fullmatch(value):
            value = value.replace(",", "")
        elif comma == "decimal" and _DECIMAL_COMMA.fullmatch(value):
            value = value.replace(".", "").replace(",", ".")
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError):
        return BAD
    return ABSENT if math.isnan(number) else BAD if math.isinf(number) else number


def read_numbers(column: Column, delimiter: str = ",") -> np.ndarray:
    """float64 number, ABSENT or BAD of each distinct value, and ABSENT for null behind them.

    A comma is decimal, unless all values that have one have it between thousands. In a file whose
    fields a semicolon divides it is decimal always."""
    texts = [v.strip() for v in column.values if isinstance(v, str) and "," in v]
    thousands = delimiter != ";" and all(_THOUSANDS.fullmatch(text) for text in texts)
    comma = "thousands" if thousands else "decimal"
    return np.array([*(read_number(value, comma) for value in column.values), ABSENT])


# ------------------------------------------------------------------------------------------- scales
def parse_scale(text: str) -> tuple[float, float] | None:
    """ "0,100" -> (0, 100), "binary" -> (0, 1), "" -> None; ValueError if it is no scale."""
    if not text:
        return None
    if text == "binary":
        return 0.0, 1.0
    ends = [read_number(end) for end in text.split(",")]
    if len(ends) != 2 or not all(map(math.isfinite, ends)) or ends[0] >= ends[1]:
        raise ValueError(
            f"--scale {text!r}: expected the lowest and the highest rating, "
            "such as 0,100, or binary"
        )
    return ends[0], ends[1]


def fitting_scale(x: np.ndarray) -> str:
    """The options that say what these ratings are; "" if they look like 1 to 5."""
    if not len(x):
        return ""
    low, high, zeros, fractions = x.min(), x.max(), (x == 0).any(), (x != np.floor(x)).any()
    if low < 0 and (low != -1 or high <= 1):
        end = round_up(max(-low, high))
        return f"--scale {-end:g},{end:g}"
    if high > 10:
        return f"--scale 0,{round_up(high):g}; hours, plays or prices: --percentile item"
    if high > 5:
        zero = "--scale 0,10, or if 0 means none: " if zeros else ""
        return f"{zero}--scale 1,10; hours, plays or prices: --percentile item"
    if high <= 1:
        return "--scale 0,1" if fractions else "--scale binary"
    if high < 4 or (high == 4 and zeros and not fractions):
        start = 0 if zeros or x[x > 0].min() < 1 else 1
        end = max(start + 1, math.ceil(high))
        return f"--scale {start},{end}; if they are 1 to 5 all the same: --scale 1,5"
    return ""


def round_up(high: float) -> float:
    """The end of the scale that a highest rating suggests: 9.4 -> 10, 87 -> 100."""
    ends = (end for end in (1, 2, 3, 4, 5, 10, 20, 100) if high <= end)
    return next(ends, 10.0 ** math.ceil(math.log10(high)))


# -------------------------------------------------------------------------------------------- times
# 2017/07/14 20:09, 2017-07-14 20:09:44.5 UTC, 2017-07-14 20:09:44 +0000
_TIME = re.compile(
    r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})"
    r"(?:[T\s]+(\d{1,2}):(\d{2})(?::(\d{2})(?:[.,](\d+))?)?)?"
    r"\s*(?:Z|UTC|GMT|([-+])(\d{2}):?(\d{2})?)?(?:\s*UTC)?",
    re.IGNORECASE,
)
TIME_ADVICE = "write times as 2024-12-31 or 2024-12-31 23:59:59, or in seconds since 1970"
MICRO = 1_000_000
DAY, SECOND = "%Y%m%d", "%Y%m%d%H%M%S"  # dates that look like numbers


def microseconds(value) -> int:
    """Microseconds since 1970 of a date with the year first, UTC where no zone is named;
    NO_ID or BAD_ID."""
    if not isinstance(value, str):
        return BAD_ID
    text = value.strip()
    if text in ABSENT_IDS:
        return NO_ID
    match = _TIME.fullmatch(text)
    if not match:
        return BAD_ID
    *parts, fraction, sign, hours, minutes = match.groups()
    try:
        moment = datetime(*(int(part or 0) for part in parts), tzinfo=timezone.utc)
    except ValueError:
        return BAD_ID
    offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
    moment -= offset if sign == "+" else -offset
    since = moment - datetime(1970, 1, 1, tzinfo=timezone.utc)
    total = since // timedelta(microseconds=1) + int(f"{fraction or 0:0<6}"[:6])
    return total if total >= 0 else BAD_ID


def compact_dates(ticks: np.ndarray, form: str) -> np.ndarray | None:
    """Microseconds of numbers that are dates throughout (20200914); None if one is not."""
    distinct, places = np.unique(ticks, return_inverse=True)
    try:
        dates = [datetime.strptime(str(n), form).replace(tzinfo=timezone.utc) for n in distinct]
    except ValueError:
        return None
    return np.array([int(d.timestamp()) * MICRO for d in dates], np.int64)[places]


def read_times(column: Column | np.ndarray) -> tuple[np.ndarray, int]:
    """(n,) int64 ticks since 1970, NO_ID or BAD_ID; and the ticks of a second.

    A column has one form and one unit: numbers, whose unit is that of their median, dates written
    as numbers throughout, or dates."""
    if isinstance(column, Column):
        numbers = np.array([read_time_number(value) for value in column.values])
        if np.isnan(numbers).sum() > len(numbers) / 2 or not len(numbers):
            return column.converted(microseconds, NO_ID).astype(np.int64), MICRO
        ticks = np.array([*numbers, ABSENT])[column.codes]
    else:
        ticks = column
    absent = (ticks == ABSENT) | (ticks == -1)
    fine = (ticks >= 0) & (ticks < 9e18)
    good = ticks[fine]
    middle, per_second = np.median(good) if len(good) else 0, 1
    while middle >= 1e11 * per_second:  # 1e11 s is the year 5138, 1e11 ms is 1973
        per_second *= 1000
    if good.dtype.kind == "f" and (good != np.floor(good)).any():
        good, per_second = np.rint(good * (MICRO / per_second)), MICRO
    good = good.astype(np.int64)
    for form, first, last in ((DAY, 19700101, 21001231), (SECOND, 197001 * 10**8, 2101 * 10**10)):
        inside = len(good) and good.min() >= first and good.max() <= last
        if inside and (dates := compact_dates(good, form)) is not None:
            good, per_second = dates, MICRO
            break
    out = np.full(len(ticks), BAD_ID, np.int64)
    out[absent] = NO_ID
    out[fine] = good
    return out, per_second


def read_time_number(value) -> float:
    """A time that is a number; ABSENT, or BAD for dates."""
    if isinstance(value, str) and value.strip() in ABSENT_IDS:
        return ABSENT
    if isinstance(value, bool):
        return BAD
    number = read_number(value, "thousands")
    return number if number >= 0 or number == ABSENT or number == -1 else BAD
