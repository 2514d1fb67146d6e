"""A model's tensors from its files, a group at a time, the next one read while one is worked on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ssdtune.packing.layout import Group
from ssdtune.swap.readers import ReaderPool, Ticket
from ssdtune.swap.source import ExtentMap, merge_extents
from ssdtune.swap.storage import aligned_bytes
from ssdtune.visit.recipes import file_view

READ_TIMEOUT_S = 600.0


class GroupReader:
    """Reads groups, the next one while this one is worked on."""

    def __init__(self, pool: ReaderPool, alignment: int) -> None:
        self._pool, self._alignment = pool, alignment

    def read(self, groups: Sequence[Group]) -> Iterator[tuple[Group, dict[str, torch.Tensor]]]:
        """Each group with its tensors by name, on the CPU: the caller's until the next group is asked for. Memory: two
        groups."""
        begun = [self._begin(group) for group in groups[:1]]
        for number, group in enumerate(groups):
            memory, where, ticket = begun.pop()
            ticket.wait(READ_TIMEOUT_S)
            if number + 1 < len(groups):
                begun.append(self._begin(groups[number + 1]))
            values = {t.name: file_view(t, where).values(memory) for t in group.tensors}
            yield group, values
            values.clear()  # the caller still has it, while memory for the group after the next is made
            del memory

    def _begin(self, group: Group) -> tuple[torch.Tensor, ExtentMap, Ticket]:
        where = merge_extents(group.tensors, alignment=self._alignment)
        memory = aligned_bytes(max(where.num_bytes, 1))
        return memory, where, self._pool.submit(where.extents, memory, label=group.label)
