"""What became of the rows, in numbers and in words. No row is cut or dropped uncounted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class DataStats:
    """Counts over one tokenised dataset. Tokens are those that remain, unless the name says else.

    num_trained_tokens: labels that enter the loss. num_cut: kept rows that lost their tail, and
    tokens_cut the tokens they lost. dropped: reason -> rows. longest_row: in tokens, after the
    cut; longest_source_row: before it. longest_row_idx: its place in the dataset.
    """

    num_rows: int
    num_tokens: int
    num_trained_tokens: int
    num_cut: int = 0
    tokens_cut: int = 0
    tokens_dropped: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    longest_row: int = 0
    longest_row_idx: int = 0
    longest_source_row: int = 0
    max_length: int | None = None
    format: str = "text"
    noun: str = "rows"
    notes: tuple[str, ...] = ()

    @property
    def num_dropped(self) -> int:
        """Rows of the source that are not in the dataset, whatever the reason."""
        return sum(self.dropped.values())

    @property
    def trained_share(self) -> float:
        """Of the remaining tokens, those that enter the loss."""
        return self.num_trained_tokens / self.num_tokens if self.num_tokens else 0.0

    @property
    def cut_share(self) -> float:
        """Of the tokens that all rows had, those that were cut off kept rows."""
        num_source_tokens = self.num_tokens + self.tokens_cut + self.tokens_dropped
        return self.tokens_cut / num_source_tokens if num_source_tokens else 0.0

    def lines(self) -> list[str]:
        """What to print before training: one line of counts, one per kind of loss, the notes."""
        counts = [
            f"data      {self.num_rows:,} {self.noun} → {say_tokens(self.num_tokens)}",
            f"trained on {say_share(self.trained_share)}",
        ]
        if self.num_cut:
            counts.append(
                f"{say_rows(self.num_cut)} over {self.max_length:,} cut "
                f"({say_share(self.cut_share)} of tokens)"
            )
        lines = [" · ".join(counts)]
        if self.num_dropped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
            lines.append(f"dropped   {say_rows(self.num_dropped)}: {reasons}")
        return [*lines, *(f"          {note}" for note in self.notes)]


def merge_stats(parts: Sequence[DataStats]) -> DataStats:
    """The counts of several datasets laid end to end."""
    if len(parts) == 1:
        return parts[0]
    dropped: Counter[str] = Counter()
    for part in parts:
        dropped.update(part.dropped)
    longest = max(range(len(parts)), key=lambda k: parts[k].longest_row)
    rows_before = sum(part.num_rows for part in parts[:longest])
    nouns = {part.noun for part in parts}
    return DataStats(
        num_rows=sum(part.num_rows for part in parts),
        num_tokens=sum(part.num_tokens for part in parts),
        num_trained_tokens=sum(part.num_trained_tokens for part in parts),
        num_cut=sum(part.num_cut for part in parts),
        tokens_cut=sum(part.tokens_cut for part in parts),
        tokens_dropped=sum(part.tokens_dropped for part in parts),
        dropped=dict(dropped),
        longest_row=parts[longest].longest_row,
        longest_row_idx=rows_before + parts[longest].longest_row_idx,
        longest_source_row=max(part.longest_source_row for part in parts),
        max_length=parts[0].max_length,
        format=" + ".join(dict.fromkeys(part.format for part in parts)),
        noun=nouns.pop() if len(nouns) == 1 else "rows",
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def say_tokens(count: int) -> str:
    """9_200_000 -> "9.20 M tokens"."""
    for unit, scale in (("B", 10**9), ("M", 10**6)):
        if count >= scale:
            return f"{count / scale:.2f} {unit} tokens"
    return f"{count:,} tokens"


def say_share(share: float) -> str:
    """0.004 -> "0.4 %", 0.61 -> "61 %"; never a rounded "0 %" or "100 %" that isn't true."""
    percent = 100 * share
    if percent in (0.0, 100.0):
        return f"{percent:.0f} %"
    if percent < 0.1:
        return "< 0.1 %"
    digits = 1 if percent < 10 or percent > 99 else 0
    return f"{min(percent, 99.9):.{digits}f} %"


def say_rows(count: int) -> str:
    """ "1 row", "37 rows"."""
    return f"{count:,} row" + ("" if count == 1 else "s")
