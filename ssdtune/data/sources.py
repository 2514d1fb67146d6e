"""Read files through `datasets`, one reader per kind, guarded against what they do in silence.

Two silent changes were measured (datasets 5.2) and are undone here:
* JSON: a column (or a 10 MB chunk of one) whose strings all look like dates is parsed as
  timestamps: the answer "2024-05-01" comes back as "2024-05-01 00:00:00". Such a file is read
  again, value by value.
* CSV: "007" becomes 7, and "NA", "null" or "None" become nothing. Every column is read as text.
"""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune.data.faults import (
    DataError,
    first_bad_line,
    json_lines,
    missing_file,
    shorten,
    unreadable_file,
)

if TYPE_CHECKING:
    import datasets

KIND_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
BUILDER_OF_KIND = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}


@dataclass(frozen=True)
class Source:
    """One file, or one split of a hub dataset or folder.

    kind: jsonl, json, csv, parquet, or hub (then path is None). note: what its user should know.
    """

    name: str
    kind: str
    path: Path | None
    num_rows: int
    note: str | None = None

    def where(self, row_idx: int) -> str:
        """ "chats.jsonl line 17", the line an editor shows; else "x.parquet row 17", 1-based."""
        if self.kind == "jsonl" and self.path is not None:
            for k, (line, _) in enumerate(json_lines(self.path)):
                if k == row_idx:
                    return f"{self.name} line {line}"
        header = " (header not counted)" if self.kind == "csv" else ""
        return f"{self.name} row {row_idx + 1}{header}"


SplitOpener = Callable[[str], "tuple[datasets.Dataset, list[Source]]"]


def opener(path: str) -> SplitOpener:
    """How to open the splits of `path`: a function from split name to (all its rows, sources).

    Raises DataError for a file that is not there or of no known kind.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return lambda name: _open_files([local], path, name)
    if local.is_dir():
        return lambda name: _open_by_name(str(local), name)
    if glob.has_magic(path):
        files = sorted(Path(found) for found in glob.glob(str(local), recursive=True))
        if not files:
            raise DataError(
                f"dataset: no file matches {path}\nPatterns start at the working folder {Path.cwd()}."
            )
        return lambda name: _open_files(files, path, name)
    if local.suffix.lower() in KIND_OF_SUFFIX or path.startswith(("/", "./", "../", "~")):
        raise missing_file(local)
    return lambda name: _open_by_name(path, name)


def _open_files(
    files: list[Path], path: str, split_name: str
) -> tuple[datasets.Dataset, list[Source]]:
    import datasets

    if split_name != "train":
        raise DataError(
            f"{path}: no split {split_name!r}: a file has one split, named train\n"
            "Cut it with slices: split: train[:98%] to train on, train[98%:] to evaluate."
        )
    parts, sources = [], []
    for file in files:
        kind = _kind_of(file)
        rows = _open_file(file, kind)
        parts.append(rows)
        note = _note_on_lines(file, len(rows)) if kind == "csv" else None
        sources.append(Source(str(file), kind, file, len(rows), note))
    if len(parts) == 1:
        return parts[0], sources
    try:
        return datasets.concatenate_datasets(parts), sources
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path}: its {len(files)} files have different fields: {shorten(str(error), 120)}\n"
            "Give them as separate entries of `dataset:`."
        ) from error


def _note_on_lines(file: Path, num_rows: int) -> str | None:
    """A stray quote mark swallows line ends, and the rows behind them: lines and rows must add up."""
    with file.open("rb") as lines:
        num_lines = sum(1 for line in lines if line.strip()) - 1
    if num_lines == num_rows:
        return None
    return (
        f"{file}: {num_lines:,} lines hold {num_rows:,} rows, as line breaks within quote marks do "
        "not end a row; if that is not meant, a quote mark is left open"
    )


def _kind_of(file: Path) -> str:
    kind = KIND_OF_SUFFIX.get(file.suffix.lower())
    if kind is None:
        raise DataError(
            f"dataset: {file} is of no known kind: {file.suffix or 'no ending'}\n"
            f"Known endings: {', '.join(KIND_OF_SUFFIX)}."
        )
    return kind


def _open_file(file: Path, kind: str) -> datasets.Dataset:
    """Every row of one file. Raises DataError for an empty or unreadable one."""
    if not file.stat().st_size:
        raise DataError(f"dataset: {file} is empty (0 bytes)\nWas the export cut short?")
    if kind == "jsonl" and next(json_lines(file), None) is None:
        raise DataError(f"dataset: {file} has no rows, only blank lines")
    try:
        with _quiet_datasets():
            rows = _read(file, kind)
            rows.data.validate(full=True)  # the JSON reader lets bytes through that are no UTF-8
    except DataError:
        raise
    # Readers raise whatever their C libraries do (ArrowInvalid, ParserError, StopIteration …).
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise DataError(f"dataset: {file} has no rows") from error
        raise unreadable_file(file, kind, error) from error
    if not len(rows):
        raise DataError(f"dataset: {file} has no rows")
    return rows


def _read(file: Path, kind: str) -> datasets.Dataset:
    import datasets

    options = _csv_options(file) if kind == "csv" else {}
    rows = datasets.load_dataset(
        BUILDER_OF_KIND[kind], data_files={"train": str(file)}, split="train", **options
    )
    assert isinstance(rows, datasets.Dataset)
    if kind in ("jsonl", "json") and _has_parsed_dates(rows):
        return _read_json_as_written(file, rows.features)
    return rows


def _csv_options(file: Path) -> dict[str, Any]:
    """Every column as text, an empty cell as "", the separator by the file's ending."""
    import datasets

    separator = "\t" if file.suffix.lower() == ".tsv" else ","
    with file.open(encoding="utf-8-sig", newline="") as lines:
        header = next(csv.reader(lines, delimiter=separator), [])
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {"sep": separator, "features": features, "keep_default_na": False}


def _has_parsed_dates(rows: datasets.Dataset) -> bool:
    """Whether some string was parsed as a time: by its column's type, or by its look.

    The look: a later chunk is parsed as timestamps and cast back to text when the first chunk was
    text. False alarms only cost a second read.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if any(pa.types.is_temporal(leaf) for leaf in _leaf_types(rows.data.schema)):
        return True
    look = pc.MatchSubstringOptions(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
    for column in rows.data.columns:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            looks = pc.call_function("match_substring_regex", [column], look)
            if pc.call_function("any", [looks]).as_py():
                return True
    return False


def _leaf_types(schema: Any) -> Iterator[Any]:
    import pyarrow as pa

    pending = [field.type for field in schema]
    while pending:
        kind = pending.pop()
        if pa.types.is_struct(kind):
            pending += [field.type for field in kind]
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            pending.append(kind.value_type)
        else:
            yield kind


def _read_json_as_written(file: Path, features: Any) -> datasets.Dataset:
    """The same columns with Python's own parser, which leaves strings alone."""
    import datasets

    stat = file.stat()
    rows = datasets.Dataset.from_generator(
        _json_rows,
        features=_dates_as_text(features),
        # Size and time are part of the cache key: a changed file must be read anew.
        gen_kwargs={
            "path": str(file),
            "columns": tuple(features),
            "stamp": (stat.st_size, stat.st_mtime_ns),
        },
    )
    assert isinstance(rows, datasets.Dataset)
    return rows


def _json_rows(
    path: str, columns: tuple[str, ...], stamp: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    del stamp
    for row in _parsed_json(Path(path)):
        yield {name: row.get(name) for name in columns}


def _parsed_json(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON list, or of one object per line."""
    if file.suffix.lower() == ".json":
        try:
            whole = json.loads(file.read_bytes().decode("utf-8-sig"))
        except json.JSONDecodeError:
            pass  # one object per line
        else:
            yield from whole if isinstance(whole, list) else [whole]
            return
    for _, raw in json_lines(file):
        yield json.loads(raw.decode("utf-8-sig"))


def _dates_as_text(feature: Any) -> Any:
    import datasets

    if isinstance(feature, dict):
        kinds = {name: _dates_as_text(inner) for name, inner in feature.items()}
        return datasets.Features(kinds) if isinstance(feature, datasets.Features) else kinds
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return type(feature)(_dates_as_text(feature.feature))
    if isinstance(feature, datasets.Value) and feature.dtype.startswith(
        ("timestamp", "date", "time")
    ):
        return datasets.Value("string")
    return feature


def _open_by_name(path: str, split_name: str) -> tuple[datasets.Dataset, list[Source]]:
    """A hub dataset, or a folder that `datasets` knows how to read."""
    import datasets

    try:
        rows = datasets.load_dataset(path, split=split_name)
    except Exception as error:
        for file in sorted(Path(path).glob("*.jsonl")):
            if first_bad_line(file) is not None:
                raise unreadable_file(file, "jsonl", error) from error
        raise DataError(
            f"dataset: can't open {path} (split {split_name}): {shorten(str(error), 160)}\n"
            "A path must be a file, a folder or a pattern that exists here, or a dataset's id on "
            "the Hugging Face hub."
        ) from error
    if not isinstance(rows, datasets.Dataset) or not len(rows):
        raise DataError(f"dataset: {path} has no rows in split {split_name}")
    return rows, [Source(f"{path} ({split_name})", "hub", None, len(rows))]


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Its own error lines would stand before ours and say less; and a file of the user's is nobody's download to be
    counted, which it would ask a server to do, waiting for it where there is no way out."""
    import datasets
    import datasets.config as settings

    level, counts = datasets.logging.get_verbosity(), settings.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    settings.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        settings.HF_UPDATE_DOWNLOAD_COUNTS = counts
        datasets.logging.set_verbosity(level)
