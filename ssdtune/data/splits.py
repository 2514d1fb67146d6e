"""Split expressions: `train`, `train[:98%]`, `train[100:200]`, `train[:10]+train[-10:]`.

The grammar and the rounding are those of `datasets` (percent boundaries go to the closest row), so
that `train[:98%]` and `train[98%:]` share no row and miss none. Parsed here rather than there
because a row must remember its number in the file, and `datasets` does not hand positions out.
One difference: `[:-1%]` of few rows leaves out none of them; there it selects none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ssdtune.data.faults import DataError

_PART = re.compile(r"\s*(\w[\w.-]*)\s*(?:\[\s*(-?\d+%?)?\s*:\s*(-?\d+%?)?\s*\])?\s*")


@dataclass(frozen=True)
class SplitPart:
    """One `name[start:stop]`; start and stop as written ("98%", "100", "-10"), None = open."""

    name: str
    start: str | None
    stop: str | None

    def bounds(self, num_rows: int, where: str) -> tuple[int, int]:
        """(first, last + 1) among `num_rows` rows. Raises DataError if that range is not there."""
        first = _position(self.start, num_rows, default=0)
        end = _position(self.stop, num_rows, default=num_rows)
        if not 0 <= first <= num_rows or not 0 <= end <= num_rows:
            raise DataError(
                f"{where}: split {self.text} reaches past its {num_rows:,} rows\n"
                f"Write bounds between 0 and {num_rows}, or percents: {self.name}[:98%]."
            )
        if first >= end:
            raise DataError(
                f"{where}: split {self.text} selects none of its {num_rows:,} rows\n"
                f"Write a wider one, for instance {self.name}[:90%] and {self.name}[90%:]."
            )
        return first, end

    @property
    def text(self) -> str:
        """The part as a user would write it."""
        if self.start is None and self.stop is None:
            return self.name
        return f"{self.name}[{self.start or ''}:{self.stop or ''}]"


def parse_split(split: str) -> tuple[SplitPart, ...]:
    """The parts of a split expression, in order. Raises DataError on anything else."""
    parts = []
    for text in split.split("+"):
        match = _PART.fullmatch(text)
        if match is None:
            raise DataError(
                f"dataset.split: can't read {split!r}\n"
                "Write a name and, if wanted, a slice of rows or percents: "
                "train, train[:98%], train[98%:], train[100:200]."
            )
        part = SplitPart(*match.groups())
        bounds = [bound for bound in (part.start, part.stop) if bound is not None]
        if len({bound.endswith("%") for bound in bounds}) > 1:
            raise DataError(
                f"dataset.split: {part.text} mixes rows and percents\n"
                "Write both bounds in one unit: train[10%:90%] or train[100:900]."
            )
        parts.append(part)
    return tuple(parts)


def _position(bound: str | None, num_rows: int, *, default: int) -> int:
    if bound is None:
        return default
    if bound.endswith("%"):
        value = round(num_rows * int(bound[:-1]) / 100)
    else:
        value = int(bound)
    return value + num_rows if bound.startswith("-") else value
