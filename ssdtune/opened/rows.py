"""The rows of a source: counted, or estimated from the first ones of each data set."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ssdtune.schedule.job import Rows, in_proportion

if TYPE_CHECKING:
    from ssdtune.data.stats import DataStats
    from ssdtune.data.tokens import Tokenized
    from ssdtune.jobs import Source
    from ssdtune.visit.build import MetaModel

SAMPLE_ROWS = 2000  # of a data set that are tokenized to estimate the rest


def rows_of(source: Source, meta: MetaModel) -> tuple[Rows, list[int], int]:
    """Counted, or estimated from the first SAMPLE_ROWS, their lengths, and the texts that one becomes in a micro-batch;
    without data every row is as long as may be."""
    config = source.config
    if not source.has_data:
        return _without_data(config.max_length), [], 1
    from ssdtune.data import load_dataset_rows, tokenize_rows
    from ssdtune.trainer.rows import load_tokenizer

    opened = [load_dataset_rows(entry) for entry in config.dataset]
    num_rows = sum(len(rows) for rows in opened)
    sample = [rows.first(SAMPLE_ROWS) for rows in opened]
    tokenizer = load_tokenizer(config, meta.folder)
    tokenized = tokenize_rows(
        sample,
        tokenizer,
        max_length=config.max_length,
        overlong=config.overlong,
        train_on=config.train_on,
        chat_template=config.chat_template,
    )
    num_sampled = sum(len(rows) for rows in sample)
    entries = tokenized.entries or (tokenized.stats,)
    # Rows of each data set that would be kept, by those that were looked at.
    nums = [
        stats.num_rows * len(whole) / len(rows)
        for stats, whole, rows in zip(entries, opened, sample, strict=True)
    ]
    lengths = _lengths(tokenized, nums)
    rows = Rows(
        num=round(sum(nums)),
        mean_tokens=statistics.mean(lengths),
        padded_tokens=statistics.mean(lengths),
        longest=tokenized.stats.longest_row,
        trained_share=_trained_share(entries, nums),
        is_estimate=num_sampled < num_rows,
    )
    return rows, lengths, tokenized.sequences_per_row


def _without_data(length: int) -> Rows:
    return Rows(
        num=0,
        mean_tokens=length,
        padded_tokens=length,
        longest=length,
        trained_share=1.0,
        is_estimate=True,
    )


def _lengths(tokenized: Tokenized, nums: Sequence[float]) -> list[int]:
    """Tokens of the rows that were looked at; of several data sets each its share, shuffled as a run shuffles them.
    nums: rows that each has."""
    lengths = tokenized.lengths(len(tokenized))
    if not tokenized.entries:
        return lengths
    counts = [stats.num_rows for stats in tokenized.entries]
    ends = itertools.accumulate(counts)
    each = [lengths[end - num : end] for end, num in zip(ends, counts, strict=True)]
    mixed = in_proportion(each, nums)
    random.Random(0).shuffle(mixed)
    return mixed


def _trained_share(entries: Sequence[DataStats], nums: Sequence[float]) -> float:
    """Of the tokens of so many rows of each data set."""
    weighed = [(num / stats.num_rows, stats) for num, stats in zip(nums, entries, strict=True)]
    trained = sum(weight * stats.num_trained_tokens for weight, stats in weighed)
    return trained / sum(weight * stats.num_tokens for weight, stats in weighed)
