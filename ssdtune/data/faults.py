"""Errors about data: which file, which line, what is wrong with it, what to do.

The readers underneath (pyarrow, pandas) say "row 1" of some block of 10 MB, or nothing at all.
When one of them fails, the file is read again here, line by line, and the first bad line named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ssdtune.errors import SSDTuneError


class DataError(SSDTuneError):
    """Something in the user's data that only the user can mend."""


class RowError(Exception):
    """What is wrong with one row, told by code that does not know where the row came from.

    `tokens` adds file and line and raises a `DataError`; this one never reaches a user.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason, remedy)
        self.reason = reason
        self.remedy = remedy

    def at(self, where: str) -> DataError:
        """The error for the user. where: for instance "chats.jsonl line 17"."""
        return DataError(f"{where}: {self.reason}\n{self.remedy}")


def shorten(text: str, max_chars: int = 60) -> str:
    """One line of at most max_chars characters, cut in the middle."""
    line = text.replace("\r", "").replace("\n", "↵")
    if len(line) <= max_chars:
        return line
    head = (max_chars - 1) * 2 // 3
    tail = max_chars - 1 - head
    return f"{line[:head]}…{line[len(line) - tail :]}"


def field_list(names: Any) -> str:
    """Field names for an error message: at most 8, each shortened."""
    names = [shorten(str(name), 30) for name in names]
    more = f", and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) + more) or "no field with a value"


def missing_field(where: str, field: str, row: dict[str, Any]) -> DataError:
    """A row lacks `field`, or holds null there."""
    present = [name for name, value in row.items() if value is not None]
    return DataError(
        f"{where}: no field {field!r}. The row has: {field_list(present)}\n"
        f"Add {field!r} to that row or remove the row."
    )


def missing_file(path: Path) -> DataError:
    """No such file; names the most similar one of the same folder."""
    near: list[str] = []
    if path.parent.is_dir():
        names = [entry.name for entry in path.parent.iterdir()]
        near = get_close_matches(path.name, names, n=1)
        hint = (
            f"Did you mean {path.parent / near[0]}?" if near else f"{path.parent} has no such name."
        )
    else:
        hint = f"The folder {path.parent} does not exist either (working folder: {Path.cwd()})."
    return DataError(f"dataset: there is no file {path}\n{hint}")


def unreadable_file(path: Path, kind: str, error: BaseException) -> DataError:
    """Words for a file that `datasets` could not read. kind: jsonl, json, csv or parquet."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, UnicodeDecodeError) and kind != "jsonl":
        return DataError(f"{path}: {_not_utf8(cause)}\nSave the file as UTF-8.")
    said = shorten(str(cause).strip() or type(cause).__name__, 200)
    if kind == "jsonl":
        fault = first_bad_line(path)
        if fault is not None:
            line, reason = fault
            return DataError(
                f"{path} line {line}: {reason}\n"
                "Each line must be one JSON object in UTF-8. Mend or remove that line."
            )
    if kind == "json":
        try:
            json.loads(path.read_bytes().decode("utf-8-sig"))
        except json.JSONDecodeError as fault:
            return DataError(
                f"{path} line {fault.lineno}: {fault.msg} (column {fault.colno})\n"
                "The file must be one JSON list of objects, or one object per line."
            )
        except UnicodeDecodeError as fault:
            return DataError(f"{path}: {_not_utf8(fault)}\nSave the file as UTF-8.")
    remedy = {
        "csv": "The first line names the columns; quote a value that holds the separator.",
        "parquet": "The file is damaged or no Parquet file: copy or export it again.",
    }.get(kind, "Check that every row has the same fields with the same types.")
    return DataError(f"{path}: can't be read as {kind}: {said}\n{remedy}")


def first_bad_line(path: Path) -> tuple[int, str] | None:
    """(1-based line, reason) of the first line that is no JSON object in good UTF-8."""
    for line, raw in json_lines(path):
        reason = _fault_of_line(raw, is_first=line == 1)
        if reason is not None:
            return line, reason
    return None


def json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(1-based line number, bytes) of every line that is not blank: row k of `datasets` is item k."""
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if raw.strip():
                yield line, raw


def _fault_of_line(raw: bytes, *, is_first: bool) -> str | None:
    try:
        row = json.loads(
            # Without the line's end: a fault there would be told as one in the next line's first column.
            raw.rstrip(b"\r\n").decode("utf-8-sig" if is_first else "utf-8"),
            object_pairs_hook=_unique_keys,
        )
        # A lone half of a surrogate pair passes json and cannot be written as UTF-8.
        json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as fault:
        return f"{fault.msg} (column {fault.colno})"
    except UnicodeDecodeError as fault:
        return _not_utf8(fault)
    except UnicodeEncodeError as fault:
        return f"holds \\u{ord(fault.object[fault.start]):04x}, half of a surrogate pair"
    except RecursionError:
        return "lists or objects nested too deeply"
    except _DuplicateKeyError as fault:
        return f"the key {shorten(str(fault.args[0]), 30)!r} stands twice in one object"
    return None if isinstance(row, dict) else f"a {_json_type(row)} where an object belongs"


class _DuplicateKeyError(Exception):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKeyError(next(name for name in names if names.count(name) > 1))
    return row


def _not_utf8(fault: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{fault.object[fault.start]:02x} at position {fault.start + 1})"


def _json_type(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
