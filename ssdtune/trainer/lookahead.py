"""A data loader that says which batches come next, so that they can be evaluated together.

Trainer's evaluation loop calls the model once per batch, and every call of a streamed model reads
all its weights. This loader fetches a group of batches, announces it, and then yields them one by
one: whoever listens runs them all with the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class LookAhead:
    """Yields what `loader` yields, in its order; `announce(group)` comes before a group's first.

    loader: has a length. Anything else one asks of it is the loader's own.
    """

    def __init__(self, loader: Any, group_size: int, announce: Callable[[list[Any]], None]) -> None:
        self.loader, self.group_size, self.announce = loader, group_size, announce

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        left = len(self.loader)
        batches = iter(self.loader)
        while left > 0:
            numbers = range(min(self.group_size, left))  # first in zip: takes no batch too many
            group = [batch for _, batch in zip(numbers, batches, strict=False)]
            if not group:
                return
            left -= len(group)
            # accelerate sets this before it yields its last batch, and cuts what is gathered then
            # to the rows that are left: not before that batch's turn.
            is_at_end = getattr(self.loader, "end_of_dataloader", False)
            self.announce(list(group))
            for k, batch in enumerate(group):
                if is_at_end:
                    self.loader.end_of_dataloader = k == len(group) - 1
                yield batch
        for _ in batches:  # lets the loader finish
            raise AssertionError("the loader yields more batches than its length says")
