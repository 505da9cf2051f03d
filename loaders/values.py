"""What one value of a user's table means: numbers and times however they are written,
marks of absence, scales.

A value is a number or a time, ABSENT (left empty, NULL, ...: counted and said, never an error) or
NaN (not understood: a bad line). Columns come CHUNK values at a time; the usual case goes through
`float` alone."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

import numpy as np

ABSENT = -math.inf  # no value
BAD = math.nan  # a value, but not what the column should hold

ABSENT_TEXTS = frozenset(
    ("", "\\N", "NA", "N/A", "#N/A", "<NA>", "NaN", "nan", "NaT", "null", "Null", "NULL", "None")
)
ABSENT_IDS = ABSENT_TEXTS | {"-1"}
ABSENT_TITLES = ABSENT_IDS | {"0"}  # fillna(0)

WORDS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0, "t": 1.0, "f": 0.0, "y": 1.0, "n": 0.0}

# the year 5138; larger times are in milliseconds (from 1973 on) or smaller units
MAX_SECONDS = 1e11


# ------------------------------------------------------------------------------------------ numbers
_SPACES = re.compile(r"(?<=\d)[\s\u00a0\u202f'’](?=\d{3}(?:\D|$))")  # 1 234, 1'234
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")  # 1,234.5
_DECIMAL_COMMA = re.compile(r"[-+]?\d*,\d+|[-+]?\d{1,3}(?:\.\d{3})+(?:,\d+)?")  # 3,5 and 1.234,5


@dataclass
class NumberStyle:
    """How a column writes its numbers: "" with a point,
    "thousands" as 1,234.5 or "decimal" as 1.234,5."""

    delimiter: str = ","  # of the file: where it is a semicolon, a comma is decimal
    comma: str = ""

    def look(self, values: Sequence) -> None:
        """Settle what a comma means, at the first values that have one;
        it holds for the rest of the column."""
        texts = [v.strip() for v in values if isinstance(v, str) and "," in v]
        if self.comma or not texts:
            return
        in_thousands = all(_THOUSANDS.fullmatch(text) for text in texts)
        self.comma = "thousands" if in_thousands and self.delimiter != ";" else "decimal"

    def number(self, value) -> float:
        """A number, ABSENT or BAD."""
        if value is None:
            return ABSENT
        if not isinstance(value, str):
            return _float(value)
        text = value.strip()
        if text in ABSENT_TEXTS:
            return ABSENT
        if text.lower() in WORDS:
            return WORDS[text.lower()]
        text = _SPACES.sub("", text)
        if self.comma == "thousands" and _THOUSANDS.fullmatch(text):
            text = text.replace(",", "")
        elif self.comma == "decimal" and _DECIMAL_COMMA.fullmatch(text):
            text = text.replace(".", "").replace(",", ".")
        return _float(text)

    def numbers(self, values: Sequence) -> np.ndarray:
        """(n,) float64 of numbers, ABSENT and BAD."""
        if not self.comma:
            try:
                found = np.array(list(map(float, values)), np.float64)
            except (ValueError, TypeError, OverflowError):
                self.look(values)
            else:
                absent = np.isnan(found)
                found[np.isinf(found)] = BAD
                found[absent] = ABSENT
                return found
        return np.array([self.number(value) for value in values], np.float64)


def _float(value) -> float:
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError):
        return BAD
    if math.isnan(number):
        return ABSENT
    return BAD if math.isinf(number) else number


# ------------------------------------------------------------------------------------------- scales
def parse_scale(text: str) -> tuple[float, float] | None:
    """ "0,100" -> (0, 100), "binary" -> (0, 1), "" -> None; ValueError if it is no scale."""
    if not text:
        return None
    if text == "binary":
        return 0.0, 1.0
    low, comma, high = text.partition(",")
    ends = _float(low), _float(high)
    if not comma or not all(map(math.isfinite, ends)) or ends[0] >= ends[1]:
        raise ValueError(
            f"--scale {text!r}: expected the lowest and the highest rating, "
            "such as 0,100, or binary"
        )
    return ends


@dataclass
class Span:
    """Which values a column has."""

    lowest: float = math.inf
    least: float = math.inf  # of those above 0
    highest: float = -math.inf
    zeros: bool = False
    fractions: bool = False

    def add(self, x: np.ndarray) -> None:
        self.lowest = min(self.lowest, float(x.min(initial=math.inf)))
        self.highest = max(self.highest, float(x.max(initial=-math.inf)))
        self.zeros = self.zeros or not x.all()
        self.fractions = self.fractions or bool((x != np.floor(x)).any())
        self.least = min(self.least, float(x[x > 0].min(initial=math.inf)))

    def scale(self) -> str:
        """The options that say what these ratings are; "" if they look like 1 to 5."""
        low, high = self.lowest, self.highest
        if high == -math.inf:
            return ""
        if low < 0 and (low != -1 or high <= 1):
            end = round_up(max(-low, high))
            return f"--scale {-end:g},{end:g}"
        if high > 10:
            return f"--scale 0,{round_up(high):g}; hours, plays or prices: --percentile item"
        if high > 5:
            zero = "--scale 0,10, or if 0 means none: " if self.zeros else ""
            return f"{zero}--scale 1,10; hours, plays or prices: --percentile item"
        if high <= 1:
            return "--scale 0,1" if self.fractions else "--scale binary"
        if high < 4 or (high == 4 and self.zeros and not self.fractions):
            start = 0 if self.zeros or self.least < 1 else 1
            end = max(start + 1, math.ceil(high))
            return f"--scale {start},{end}; if they are 1 to 5 all the same: --scale 1,5"
        return ""


class Ratings:
    """The rating column: what a scale maps linearly to 1 to 5, or amounts as they are;
    remembers which values there were."""

    def __init__(self, scale: str, amounts: bool, style: NumberStyle):
        self.scale, self.binary, self.amounts = parse_scale(scale), scale == "binary", amounts
        self.style = style
        self.seen, self.kept = Span(), Span()
        self.marks: Counter[str] = Counter()  # "0", "-1": values that mean none
        self.mapped = 0
        self.highest = self.scale[1] if self.scale else 5.0

    def __call__(self, values: Sequence) -> np.ndarray:
        """(n,) float32: ratings of 1 to 5 (without --scale, above 0 and up to 5) or amounts from 0
        on, ABSENT or BAD."""
        x = self.style.numbers(values)
        number = np.isfinite(x)
        low, high = self.scale or ((0.0, math.inf) if self.amounts else (1e-9, 5.0))
        inside = number & (x >= low) & (x <= high)
        if self.binary:
            inside &= (x == 0) | (x == 1)
        marks = {f"{mark:g}": x == mark for mark in (0.0, -1.0) if not low <= mark <= high}
        self.seen.add(x[number])
        none = np.zeros_like(number)
        if marks:
            none = np.any(list(marks.values()), axis=0)
        self.marks.update({name: int(rows.sum()) for name, rows in marks.items()})
        self.kept.add(x[inside | none])
        x[number & ~inside] = BAD
        x[none] = ABSENT
        if self.scale:
            self.mapped += int(inside.sum())
            x = 1 + 4 * (x - low) / (high - low)
        return x.astype(np.float32)

    def doubt(self, span: Span) -> str:
        """Why the ratings do not look like those of a scale from 1 to 5, and the way out;
        "" if they do."""
        found = f"ratings from {span.lowest:g} to {span.highest:g}"
        if self.amounts:
            return ""
        if self.scale:
            low, high = self.scale
            outside = span.lowest < low or span.highest > high
            what = "values other than 0 and 1" if self.binary else "ratings outside --scale"
            return f"{what} {low:g},{high:g}: {found}" if outside or self.binary else ""
        advice = span.scale()
        return advice and (
            f"{found} are not those of a scale from 1 to 5; "
            f"say which scale it is, and they are mapped: {advice}"
        )


def round_up(high: float) -> float:
    """The end of the scale that a highest rating suggests: 9.4 -> 10, 87 -> 100."""
    for end in (1, 2, 3, 4, 5, 10, 20, 100):
        if high <= end:
            return end
    return 10.0 ** math.ceil(math.log10(high))


# -------------------------------------------------------------------------------------------- times
# 2017/07/14 20:09, 2017-07-14 20:09:44.5 UTC, 2017-07-14 20:09:44 +0000
_TIME = re.compile(
    r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})"
    r"(?:[T\s]+(\d{1,2}):(\d{2})(?::(\d{2})(?:[.,](\d+))?)?)?"
    r"\s*(?:Z|UTC|GMT|([-+])(\d{2}):?(\d{2})?)?(?:\s*UTC)?",
    re.IGNORECASE,
)

TIME_ADVICE = "write times as 2024-12-31 or 2024-12-31 23:59:59, or in seconds since 1970"


def parse_times(values: Sequence) -> np.ndarray:
    """float64 seconds of times given as seconds (also milli-, micro- or nanoseconds) or as dates
    with the year first, UTC where no zone is named.

    ValueError where one is neither, or lies before 1970."""
    try:
        times = _seconds(np.array(list(map(float, values))))
    except (ValueError, TypeError):
        times = np.array([_one_time(value) for value in values])
    if not ((times >= 0) & (times < np.inf)).all():
        raise ValueError("a time that is not finite, or before 1970")
    return times


def read_times(values: Sequence) -> np.ndarray:
    """As parse_times, but ABSENT or BAD where a value is no time."""
    try:
        return parse_times(values)
    except (ValueError, TypeError, AttributeError, OverflowError):
        return np.array([_time_or_mark(value) for value in values], np.float64)


def _time_or_mark(value) -> float:
    if value is None or (value.strip() in ABSENT_IDS if isinstance(value, str) else value == -1):
        return ABSENT
    try:
        time = _one_time(value)
    except (ValueError, TypeError, AttributeError, OverflowError):
        return BAD
    return time if 0 <= time < math.inf else BAD


def _seconds(times: np.ndarray) -> np.ndarray:
    if not (times < 1e20).all():
        raise ValueError("a time beyond all units")
    while (large := times >= MAX_SECONDS).any():
        times[large] /= 1000
    return times


def _one_time(value) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(_seconds(np.array([float(value)]))[0])
    text = value.strip()
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    try:
        return float(_seconds(np.array([float(text)]))[0])
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text[:-1] + "+00:00" if text.endswith(("Z", "z")) else text)
    except ValueError:
        moment = _moment(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def _moment(text: str) -> datetime:
    """A date with the year first that fromisoformat does not take; ValueError if it is none."""
    match = _TIME.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is no time")
    *parts, fraction, sign, hours, minutes = match.groups()
    moment = datetime(*(int(part or 0) for part in parts), tzinfo=timezone.utc)
    offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
    second = timedelta(seconds=float(f"0.{fraction or 0}"))
    return moment + second - (offset if sign == "+" else -offset)
