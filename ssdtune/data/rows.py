"""Open a dataset and remember where each of its rows came from.

This module applies the split, recognises the format, and refuses what would otherwise go wrong
later and namelessly: no file, no rows, a column that is missing or null in some row. `sources`
reads the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from ssdtune.data.faults import DataError, missing_field
from ssdtune.data.formats import Format, recognise
from ssdtune.data.options import LabelTemplate
from ssdtune.data.sources import Source, opener
from ssdtune.data.splits import parse_split

if TYPE_CHECKING:
    import datasets
    import numpy as np

SPEC_KEYS = ("path", "format", "split", "template", "label_words", "label_field")


@dataclass(frozen=True)
class Origins:
    """Where rows come from. positions: int64 [num_rows], a row of `sources` laid end to end."""

    sources: tuple[Source, ...]
    positions: np.ndarray

    def where(self, row_idx: int) -> str:
        """File and line (or row number) of row `row_idx`."""
        position = int(self.positions[row_idx])
        for source in self.sources:
            if position < source.num_rows:
                return source.where(position)
            position -= source.num_rows
        raise AssertionError(f"row {row_idx} lies behind the last source")


@dataclass(frozen=True)
class DatasetRows:
    """Rows as they stand in the files (every column), their format, their origins.

    notes: what was decided on the user's behalf, to be printed. template: of rows with a label.
    """

    dataset: datasets.Dataset
    name: str
    format: Format
    notes: tuple[str, ...]
    origins: Origins
    template: LabelTemplate | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def where(self, row_idx: int) -> str:
        """For instance "chats.jsonl line 17"."""
        return self.origins.where(row_idx)

    def shuffled(self, seed: int) -> DatasetRows:
        """The same rows in an order drawn from `seed`."""
        import numpy as np

        order = np.random.default_rng(seed).permutation(len(self))
        origins = replace(self.origins, positions=self.origins.positions[order])
        return replace(self, dataset=self.dataset.select(order), origins=origins)

    def first(self, num: int) -> DatasetRows:
        """The first `num` rows, or all."""
        num = min(num, len(self))
        origins = replace(self.origins, positions=self.origins.positions[:num])
        return replace(self, dataset=self.dataset.select(range(num)), origins=origins)


def load_dataset_rows(spec: Any, *, seed: int | None = None) -> DatasetRows:
    """Open one entry of `dataset:` or `eval_dataset:`.

    spec: a mapping or dataclass with `path` (a JSONL, JSON, CSV, TSV or Parquet file, a pattern
    such as `data/*.jsonl`, a folder, a hub id), `format` (default "auto") and `split` (default
    "train"; slices allowed), for rows with a label `template`, `label_words` and `label_field`
    (default "label"); a bare string is a path. seed: None keeps the order of the file, a number
    shuffles the rows of the split by it. Raises DataError, naming file and line.
    """
    read = _read_spec(spec)
    path, template = str(read["path"]), _template_of(read)
    dataset, origins = _take_split(path, read.get("split") or "train")
    row_format, notes = recognise(
        read.get("format") or "auto",
        columns=dataset.column_names,
        row=dataset[0],
        where=origins.where(0),
        labelled=None if template is None else template.format,
    )
    source_notes = tuple(source.note for source in origins.sources if source.note)
    rows = DatasetRows(dataset, path, row_format, notes + source_notes, origins, template)
    _refuse_missing_fields(rows)
    return rows if seed is None else rows.shuffled(seed)


def _template_of(spec: Mapping[str, Any]) -> LabelTemplate | None:
    """How the rows' labels are put into words, where they are."""
    template, words = spec.get("template"), spec.get("label_words")
    if bool(template) != bool(words):
        missing = "label_words" if template else "template"
        raise DataError(
            f"dataset: template and label_words go together, and {missing} is not given\n"
            'Write both, for instance template: "{text} It was {label}", label_words: {0: terrible, 1: great}.'
        )
    if not template or not words:
        return None
    return LabelTemplate.of(template, words, spec.get("label_field") or "label")


def _read_spec(spec: Any) -> Mapping[str, Any]:
    """An entry as a mapping, its keys known and its path there."""
    if isinstance(spec, str):
        spec = {"path": spec}
    elif is_dataclass(spec) and not isinstance(spec, type):
        spec = {field.name: getattr(spec, field.name) for field in fields(spec)}
    if not isinstance(spec, Mapping) or not spec.get("path"):
        raise DataError(f"dataset: an entry needs a path, got {spec!r}")
    for key in spec:
        if key not in SPEC_KEYS:
            near = get_close_matches(str(key), SPEC_KEYS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise DataError(f"dataset: unknown key {key!r}; known: {', '.join(SPEC_KEYS)}.{hint}")
    return spec


def _take_split(path: str, split: str) -> tuple[datasets.Dataset, Origins]:
    """The rows of a split expression, in its order."""
    import datasets
    import numpy as np

    open_split = opener(path)
    opened: dict[str, tuple[int, datasets.Dataset]] = {}  # split name -> (first position, rows)
    sources: list[Source] = []
    taken, positions = [], []
    for part in parse_split(split):
        if part.name not in opened:
            offset = sum(len(rows) for _, rows in opened.values())
            rows, its_sources = open_split(part.name)
            opened[part.name] = (offset, rows)
            sources += its_sources
        offset, rows = opened[part.name]
        first, end = part.bounds(len(rows), path)
        taken.append(rows.select(range(first, end)))
        positions.append(np.arange(offset + first, offset + end))
    dataset = taken[0] if len(taken) == 1 else datasets.concatenate_datasets(taken)
    return dataset, Origins(tuple(sources), np.concatenate(positions))


def _refuse_missing_fields(rows: DatasetRows) -> None:
    """Arrow keeps null counts, so a whole column is checked without reading its values."""
    for name in rows.format.required:
        column = rows.dataset.data.column(name)
        if column.null_count:
            row_idx = column.is_null().index(True).as_py()
            raise missing_field(rows.where(row_idx), name, rows.dataset[row_idx])
