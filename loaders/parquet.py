"""Columns of a Parquet file, or of the folder of parts that Spark, BigQuery or DuckDB write,
in the form of a table's chunks.

    python train.py --dataset parquet --data_dir log.parquet \\
        --columns user=uid,item=sku,rating=stars,timestamp=when

Only the named columns are read, BATCH rows at a time: memory does not grow with the file. Ids are
whole numbers, texts, decimals without fraction or UUIDs; ratings any numbers; times timestamps with
or without a zone (then UTC), dates, or what a CSV may hold. Values may be dictionary-encoded, and
null. In a folder, `key=value` parts of a path are columns (Hive). Needs the package pyarrow. Left
out: nested columns, and the folders of Delta Lake and Iceberg, which keep removed rows, too."""

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from loaders.files import Chunk, natural_key

BATCH = 1 << 16  # rows


SUFFIXES = (".parquet", ".parq", ".pq")


def is_parquet(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def column_names(path: Path) -> list[str]:
    """Names of the columns that all parts have."""
    parts = find_parts(path)
    names = [[*_open(part).schema_arrow.names, *_folder_values(path, part)] for part in parts]
    common = set(names[0]).intersection(*names[1:])
    return [name for name in names[0] if name in common]


def read_chunks(path: Path, fields: dict[str, str]) -> Iterator[Chunk]:
    """The rows of all parts, numbered through; `fields`: field -> column.
    ValueError names the part and the column."""
    first = 1
    for part in find_parts(path):
        constant = _folder_values(path, part)
        columns = {field: name for field, name in fields.items() if name not in constant}
        for batch in _batches(part, list(columns.values())):
            numbers = range(first, first + len(batch))
            first += len(batch)
            values = {field: [constant.get(name)] * len(batch) for field, name in fields.items()}
            for field, name in columns.items():
                with _reading(part, f"column {name}"):
                    values[field] = READERS[field](batch.column(name))
            yield numbers, values, []


# -------------------------------------------------------------------------------------------- files
def find_parts(path: Path) -> list[Path]:
    """The file, or the files of a folder;
    what begins with a dot or an underscore is none of them."""
    if path.is_file():
        return [path]
    if (path / "_delta_log").is_dir() or list(path.glob("metadata/*.metadata.json")):
        raise ValueError(
            f"{path}: a table of Delta Lake or Iceberg, whose folder keeps removed rows, too: "
            "export it, with COPY ... TO 'log.parquet' in DuckDB or df.write.parquet in Spark"
        )
    found = [f for f in path.rglob("*") if f.is_file() and is_parquet(f)]
    found = [f for f in found if not _hidden(f.relative_to(path))]
    if not found:
        inside = [f.name for f in sorted(path.iterdir())][:8] if path.is_dir() else "nothing"
        raise ValueError(f"{path}: no .parquet file or folder of such files; there is {inside}")
    return sorted(found, key=lambda f: natural_key(str(f.relative_to(path))))


def _hidden(path: Path) -> bool:
    return any(name.startswith((".", "_")) for name in path.parts)


def _folder_values(path: Path, part: Path) -> dict[str, str | None]:
    """Columns that the names of folders hold:
    {"date": "2024-01-01"} of .../date=2024-01-01/part-0.parquet."""
    folders = part.relative_to(path).parts[:-1] if path.is_dir() else ()
    pairs = (folder.partition("=") for folder in folders)
    values = {key: unquote(value) for key, equals, value in pairs if equals and key}
    hive_null = "__HIVE_DEFAULT_PARTITION__"
    return {key: None if value == hive_null else value for key, value in values.items()}


def _arrow():
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "the package pyarrow is needed to read Parquet: pip install pyarrow"
        ) from None
    return pyarrow


@contextlib.contextmanager
def _reading(part: Path, what: str = ""):
    """Whatever Arrow finds wrong is one ValueError with the name of the file."""
    pa = _arrow()
    try:
        yield
    except (pa.ArrowException, OSError, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300]
        where = f"{part}: {what}" if what else str(part)
        raise ValueError(f"{where}: cannot be read as Parquet ({reason})") from None
    except ValueError as error:
        raise ValueError(f"{part}: {what}: {error}") from None


def _open(part: Path):
    pa = _arrow()
    with _reading(part):
        return pa.parquet.ParquetFile(part, pre_buffer=False, coerce_int96_timestamp_unit="us")


def _batches(part: Path, names: list[str]) -> Iterator:
    """Record batches of these columns; texts as dictionaries,
    of which each value is made but once."""
    pa = _arrow()
    schema = _open(part).schema_arrow
    if missing := [name for name in names if name not in schema.names]:
        raise ValueError(f"{part}: no column {missing[0]}; there are {schema.names[:20]}")
    texts = [n for n in names if schema.types[schema.names.index(n)] in (pa.string(), pa.binary())]
    with _reading(part):
        file = pa.parquet.ParquetFile(
            part, pre_buffer=False, coerce_int96_timestamp_unit="us", read_dictionary=texts
        )
        batches = file.iter_batches(BATCH, columns=names, use_threads=True)
    while True:
        with _reading(part):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


# ------------------------------------------------------------------------------------------- values
def texts_or_ids(column) -> list:
    """Texts, whole numbers, or None: what an id or a title may be."""
    pa = _arrow()
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        column, kind = column.storage, column.storage.type
    if pa.types.is_dictionary(kind):
        return _through_dictionary(column)
    if pa.types.is_integer(kind):
        return _plain(column)
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return [_whole(value) for value in column.to_pylist()]
    if pa.types.is_fixed_size_binary(kind) and kind.byte_width == 16:
        return [None if v is None else str(uuid.UUID(bytes=v)) for v in column.to_pylist()]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        column, kind = column.cast(pa.large_string()), pa.large_string()
    if _is_text(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return column.to_pylist()
    raise ValueError(f"{kind} is neither a text nor a whole number; cast it in the query")


def numbers(column) -> list:
    """Numbers, texts, or None: what a rating may be."""
    pa = _arrow()
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _through_dictionary(column, numbers)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _plain(column)
    if pa.types.is_decimal(kind):
        return _plain(column.cast(pa.float64()))
    if pa.types.is_boolean(kind) or pa.types.is_null(kind) or _is_text(kind):
        return column.to_pylist()
    raise ValueError(f"{kind} is no number; cast it in the query")


def times(column) -> list:
    """Seconds since 1970 of timestamps and dates; other numbers and texts as they are; None."""
    pa = _arrow()
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _through_dictionary(column, times)
    if pa.types.is_date32(kind):
        return [None if v is None else v * 86_400 for v in _plain(column.cast(pa.int32()))]
    if pa.types.is_timestamp(kind) or pa.types.is_date64(kind):
        unit = "ms" if pa.types.is_date64(kind) else kind.unit
        per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
        ticks = _plain(column.cast(pa.int64()))
        return [None if tick is None else tick / per_second for tick in ticks]
    if pa.types.is_time(kind) or pa.types.is_duration(kind):
        raise ValueError(f"{kind} is no moment in time; cast it to a timestamp in the query")
    return numbers(column)


READERS = {
    "user": texts_or_ids,
    "item": texts_or_ids,
    "title": texts_or_ids,
    "rating": numbers,
    "timestamp": times,
}


def _is_text(kind) -> bool:
    types = _arrow().types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _plain(column) -> list:
    """The numbers of a column; by numpy where there is no null, which takes a tenth of the time."""
    if column.null_count:
        return column.to_pylist()
    return column.to_numpy(zero_copy_only=False).tolist()


def _whole(value) -> int | float | None:
    """7.0 and Decimal("7") are 7; a fraction stays, and is refused as an id."""
    if value is None or value != value:
        return None
    if value == value // 1 and abs(value) < 1e38:
        return int(value)
    return float(value)


def _through_dictionary(column, read=texts_or_ids) -> list:
    """Each value in use is made once: a dictionary may hold more of them than a batch has rows."""
    used, which = np.unique(column.indices.fill_null(-1).to_numpy(), return_inverse=True)
    values: Sequence = read(column.dictionary.take(_arrow().array(used[used >= 0])))
    values = ([None] if len(used) and used[0] < 0 else []) + list(values)
    return np.array([*values, None], object)[which].tolist()
