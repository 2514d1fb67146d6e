"""Rows to a dataset of `input_ids` and `labels`, cut to length and counted.

The mapping runs through `datasets.map` (progress bar, Arrow file in its cache) under a fingerprint
of our own: the library's hash of a tokenizer changes when the tokenizer is used, so that a second
run would tokenise everything again. What became of each row is a column of the mapped file, so
that counts and notes of a cached result are those of the first run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune.data.collate import IGNORED_LABEL, CausalCollator, OptionsCollator
from ssdtune.data.faults import DataError, RowError, shorten
from ssdtune.data.formats import TRAIN_ON, Format, to_sample
from ssdtune.data.labels import Encoder
from ssdtune.data.notes import encoding_notes
from ssdtune.data.options import LabelTemplate, encode_options
from ssdtune.data.rows import DatasetRows
from ssdtune.data.stats import DataStats, merge_stats, say_rows
from ssdtune.data.template import ChatTemplate

if TYPE_CHECKING:
    import datasets
    import numpy as np

UNSET = '"truncation":null,"padding":null,'  # as a tokenizer without these writes itself
OVERLONG = ("truncate", "drop", "error")


class Fate(IntEnum):
    """What became of a row. All but KEPT are dropped."""

    KEPT = 0
    EMPTY = 1
    NO_ANSWER = 2
    ANSWER_CUT = 3
    TOO_LONG = 4


@dataclass(frozen=True)
class Tokenized:
    """dataset: `input_ids` and `labels` (lists of int32, labels -100 where not trained).

    num_options: 0; of rows with a label, how many each has. Such rows have further columns: `options` (ids of the
    whole text with each option), `option_lengths` (tokens of each that are the option) and `label` (the right one's
    number); `input_ids` and `labels` are those of the right one. entries: counts of each dataset, where several were
    laid end to end.
    """

    dataset: datasets.Dataset
    stats: DataStats
    num_options: int = 0
    entries: tuple[DataStats, ...] = ()

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def sequences_per_row(self) -> int:
        """Texts that a row becomes in a micro-batch: 1, also where all options are of one token; else its options."""
        if not self.num_options or not any(
            num > 1 for nums in self.dataset["option_lengths"] for num in nums
        ):
            return 1
        return self.num_options

    def collator(self, pad_token_id: int) -> CausalCollator | OptionsCollator:
        """What makes micro-batches of these rows."""
        if not self.num_options:
            return CausalCollator(pad_token_id)
        return OptionsCollator(pad_token_id, self.num_options, self.sequences_per_row)

    def lengths(self, most: int = 2000) -> list[int]:
        """Tokens of each row; where there are more than `most`, of so many, spread evenly over all datasets."""
        num = len(self.dataset)
        rows = [i * num // most for i in range(most)] if num > most else range(num)
        return [len(ids) for ids in self.dataset[rows]["input_ids"]]


def tokenize_rows(
    rows: DatasetRows | Sequence[DatasetRows],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    overlong: str = "truncate",
    train_on: str | None = None,
    chat_template: str | None = "auto",
) -> Tokenized:
    """Tokenise, label, cut and count.

    rows: one dataset or several, laid end to end. max_length: in tokens, None for no limit.
    overlong: what becomes of longer rows: "truncate" keeps the start, "drop", "error". train_on:
    "assistant" (every answer), "completion", "last" (answer), "all"; None or "auto" for the
    format's own. chat_template: "auto" or the path of a Jinja file. A row of which no trained
    token is left is dropped and counted. Raises DataError: for a bad row with file and line, and
    where nothing is left.
    """
    import datasets

    if overlong not in OVERLONG:
        raise DataError(f"overlong: {overlong!r} is not one of {', '.join(OVERLONG)}")
    if max_length is not None and max_length < 2:
        raise DataError(
            f"max_length: {max_length} is below 2, the shortest row that can be trained"
        )
    template = ChatTemplate.of(tokenizer, chat_template)
    parts = []
    for group in [rows] if isinstance(rows, DatasetRows) else rows:
        encoder = Encoder(tokenizer, template, resolve_train_on(train_on, group.format))
        parts.append(_tokenize_one(group, encoder, max_length, overlong))
    if not parts:
        raise DataError("dataset: no entry, so there is nothing to train on")
    if len({part.num_options for part in parts}) > 1:
        raise DataError(
            "dataset: its entries have different numbers of label_words, or some have none\n"
            "Give all of them a template and as many labels, or none."
        )
    stats, num_options = merge_stats([part.stats for part in parts]), parts[0].num_options
    if len(parts) == 1:
        return Tokenized(parts[0].dataset, stats, num_options)
    whole = datasets.concatenate_datasets([part.dataset for part in parts])
    return Tokenized(whole, stats, num_options, tuple(part.stats for part in parts))


def resolve_train_on(train_on: str | None, row_format: Format) -> str:
    """The rule for one format; raises DataError where the format has no such part."""
    if train_on is None or train_on == "auto":
        return row_format.train_on
    if train_on not in TRAIN_ON:
        raise DataError(f"train_on: {train_on!r} is not one of {', '.join(TRAIN_ON)}")
    if row_format.name == "text" and train_on != "all":
        raise DataError(
            f"train_on: {train_on} has no meaning for rows of `text`, which have no answer\n"
            "Set train_on: all, or give rows of prompt + completion or messages."
        )
    if row_format.name == "labelled":
        raise DataError(
            f"train_on: {train_on} has no meaning for rows with a template: their label is trained\n"
            "Leave train_on out."
        )
    return train_on


def preview(
    tokenized: Tokenized, tokenizer: Any, *, row_idx: int = 0, max_chars: int | None = 600
) -> str:
    """One row as the model sees it, the trained parts in 【】. max_chars: None for all of it, as is;
    else about that many, on one line."""
    row = tokenized.dataset[row_idx]
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    runs = [
        (is_trained, [token_id for token_id, _ in run])
        for is_trained, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED_LABEL)
    ]
    pieces, ids, before = [], [], ""
    for is_trained, run_ids in runs:
        # Decoded with all that stands before it: many decoders drop a space at the start.
        ids += run_ids
        text = tokenizer.decode(ids, skip_special_tokens=False)
        piece = text[len(before) :] if text.startswith(before) else tokenizer.decode(run_ids)
        before = text
        if max_chars is not None:
            piece = shorten(piece, max(20, max_chars // len(runs)))
        pieces.append(f"【{piece}】" if is_trained else piece)
    return "".join(pieces)


def _tokenize_one(
    rows: DatasetRows, encoder: Encoder, max_length: int | None, overlong: str
) -> Tokenized:
    import datasets

    wanted = {*rows.format.required, *rows.format.optional}
    columns = [name for name in rows.dataset.column_names if name in wanted]

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        if rows.template is not None:
            return _encode_labelled(row, rows.template, encoder, max_length, overlong)
        return _encode_row(row, rows.format, encoder, max_length, overlong)

    def encode_batch(batch: dict[str, list[Any]], row_idxs: list[int]) -> dict[str, list[Any]]:
        encoded = []
        for k, row_idx in enumerate(row_idxs):
            row = {name: batch[name][k] for name in columns}
            try:
                encoded.append(encode(row))
            except RowError as error:
                raise error.at(rows.where(row_idx)) from error
        return {name: [row[name] for row in encoded] for name in encoded[0]}

    int32 = datasets.Value("int32")
    kept_columns = {"input_ids": datasets.List(int32), "labels": datasets.List(int32)}
    if rows.template is not None:
        lists = datasets.List(datasets.List(int32))
        kept_columns |= {"options": lists, "option_lengths": datasets.List(int32), "label": int32}
    counts = ("num_source_tokens", "num_tokens", "num_trained", "fate", "remarks")
    mapped = rows.dataset.select_columns(columns).map(
        encode_batch,
        batched=True,
        batch_size=256,
        with_indices=True,
        remove_columns=columns,
        features=datasets.Features(kept_columns | dict.fromkeys(counts, int32)),
        new_fingerprint=_fingerprint(rows, encoder, max_length, overlong),
        desc=f"tokenize {shorten(rows.name, 40)}",
    )
    table = {name: mapped.data.column(name).to_numpy() for name in counts}
    kept = _check_fates(table, rows, max_length, overlong)
    stats = _count(table, kept, rows=rows, encoder=encoder, max_length=max_length)
    dataset = mapped.select_columns(list(kept_columns))
    if len(kept) < len(mapped):
        dataset = dataset.select(kept)
    return Tokenized(dataset, stats, 0 if rows.template is None else len(rows.template.words))


def _encode_row(
    row: dict[str, Any], row_format: Format, encoder: Encoder, max_length: int | None, overlong: str
) -> dict[str, Any]:
    import numpy as np

    sample = to_sample(row, row_format, has_template=encoder.template.text is not None)
    encoded = encoder.encode(sample)
    num_source_tokens = len(encoded.input_ids)
    ids, is_trained = encoded.input_ids[:max_length], encoded.is_trained[:max_length]
    fate = Fate.KEPT
    if not num_source_tokens:
        fate = Fate.EMPTY
    elif not encoded.is_trained.any():
        fate = Fate.NO_ANSWER
    elif overlong == "drop" and len(ids) < num_source_tokens:
        fate = Fate.TOO_LONG
    elif not is_trained.any():
        fate = Fate.ANSWER_CUT
    return {
        "input_ids": ids,
        "labels": np.where(is_trained, ids, IGNORED_LABEL).astype(np.int32),
        "num_source_tokens": num_source_tokens,
        "num_tokens": len(ids),
        "num_trained": int(is_trained.sum()),
        "fate": int(fate),
        "remarks": int(encoded.remarks),
    }


def _encode_labelled(
    row: dict[str, Any],
    template: LabelTemplate,
    encoder: Encoder,
    max_length: int | None,
    overlong: str,
) -> dict[str, Any]:
    import numpy as np

    found = encode_options(row, template, encoder, max_length)
    ids, num_trained = found.options[found.label], found.lengths[found.label]
    is_dropped = overlong == "drop" and found.is_cut
    return {
        "input_ids": ids,
        "labels": np.append(np.full(len(ids) - num_trained, IGNORED_LABEL), ids[-num_trained:]),
        "options": found.options,
        "option_lengths": found.lengths,
        "label": found.label,
        "num_source_tokens": found.num_source_tokens if found.is_cut else len(ids),
        "num_tokens": len(ids),
        "num_trained": num_trained,
        "fate": int(Fate.TOO_LONG if is_dropped else Fate.KEPT),
        "remarks": 0,
    }


def _fingerprint(rows: DatasetRows, encoder: Encoder, max_length: int | None, overlong: str) -> str:
    """All that the result depends on: rows, tokenizer, template, rules, and this code."""
    import transformers

    tokenizer = encoder.tokenizer
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    rules = [
        rows.dataset._fingerprint,
        [rows.format.name, rows.template],
        _vocabulary(tokenizer),
        tokenizer.special_tokens_map,
        encoder.template.text,
        encoder.train_on,
        [max_length, overlong],
        transformers.__version__,
    ]
    digest.update(json.dumps(rules, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:32]


def _vocabulary(tokenizer: Any) -> Any:
    """All that it makes ids from; not the padding and truncation of its last call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    text: str = backend.to_str()
    if UNSET in text[:100]:  # a tokenizer that was just loaded: a vocabulary need not be parsed
        return text
    unset = {**json.loads(text), "truncation": None, "padding": None}
    return json.dumps(unset, separators=(",", ":"), ensure_ascii=False)  # as it writes itself


def _check_fates(
    table: dict[str, np.ndarray], rows: DatasetRows, max_length: int | None, overlong: str
) -> np.ndarray:
    """Indices of the kept rows. Raises DataError for overlong: error and where none is kept."""
    import numpy as np

    lengths = table["num_source_tokens"]
    if overlong == "error" and max_length is not None and lengths.max() > max_length:
        longest = int(lengths.argmax())
        raise DataError(
            f"{int((lengths > max_length).sum()):,} of {say_rows(len(rows))} are longer than "
            f"max_length {max_length:,}; the longest, {rows.where(longest)}, "
            f"has {lengths[longest]:,} tokens\n"
            f"Set max_length: {lengths[longest]}, or overlong: truncate or drop."
        )
    kept = np.flatnonzero(table["fate"] == Fate.KEPT)
    if len(kept):
        return kept
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in _dropped(table).items())
    fates = set(table["fate"].tolist())
    remedy = "Check that the rows hold an answer: a completion, or a message of role assistant."
    if fates & {Fate.ANSWER_CUT, Fate.TOO_LONG}:
        remedy = (
            f"Raise max_length ({max_length:,}; rows have up to {lengths.max():,} tokens), "
            "or put less before the answers."
        )
    raise DataError(
        f"{rows.name}: every label is masked: of {say_rows(len(rows))} none has a token to train "
        f"on ({reasons}); the first is {rows.where(0)}\n{remedy}"
    )


def _dropped(table: dict[str, np.ndarray]) -> dict[str, int]:
    reasons = {
        Fate.EMPTY: "without a token",
        Fate.NO_ANSWER: "without an answer to train on",
        Fate.ANSWER_CUT: "whose answer lies behind max_length",
        Fate.TOO_LONG: "longer than max_length",
    }
    counts = {words: int((table["fate"] == fate).sum()) for fate, words in reasons.items()}
    return {words: count for words, count in counts.items() if count}


def _count(
    table: dict[str, np.ndarray],
    kept: np.ndarray,
    *,
    rows: DatasetRows,
    encoder: Encoder,
    max_length: int | None,
) -> DataStats:
    lengths, source_lengths = table["num_tokens"][kept], table["num_source_tokens"][kept]
    longest = int(lengths.argmax())
    return DataStats(
        num_rows=len(kept),
        num_tokens=int(lengths.sum(dtype="int64")),
        num_trained_tokens=int(table["num_trained"][kept].sum(dtype="int64")),
        num_cut=int((source_lengths > lengths).sum()),
        tokens_cut=int((source_lengths - lengths).sum(dtype="int64")),
        tokens_dropped=int(
            table["num_source_tokens"].sum(dtype="int64") - source_lengths.sum(dtype="int64")
        ),
        dropped=_dropped(table),
        longest_row=int(lengths[longest]),
        longest_row_idx=longest,
        longest_source_row=int(table["num_source_tokens"].max()),
        max_length=max_length,
        format=rows.format.name,
        noun=rows.format.noun,
        notes=(*rows.notes, *encoding_notes(table["remarks"][kept], rows, encoder)),
    )
