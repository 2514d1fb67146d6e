"""Streamed parameters: a placeholder outside their block's visits, a slot's tensor during one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ssdtune.visit.placeholder import Placeholder

if TYPE_CHECKING:
    from ssdtune.visit.streamer import Streamer

Place = tuple[int, int, int | None]  # block, slot, variant of the weights


@dataclasses.dataclass(eq=False)
class Weight:
    """A streamed parameter: where it is held, by every module that holds it (tied ones have several owners)."""

    name: str
    block: int
    index: int  # in the block's recipe
    owners: list[tuple[nn.Module, str]]
    streamer: Streamer
    placeholder: Placeholder | None = None
    is_resident: bool = False  # became trainable: a real parameter for good

    def read(self) -> torch.Tensor:
        """The values, in fresh memory."""
        streamer = self.streamer
        if streamer.method is None:
            return streamer.engine.read(self.block, self.index)
        return streamer.method.read(self.block, self.index)

    def make_trainable(self) -> None:
        """From now on a real, trainable parameter in every owner."""
        if self.is_resident:
            return
        parameter = nn.Parameter(self.read())
        self.put_in(parameter)
        self.is_resident = True

    def put_in(self, parameter: torch.Tensor | None) -> None:
        """The parameter, or the placeholder, in every owner; of no effect once it is resident."""
        if not self.is_resident:
            for owner, name in self.owners:
                owner._parameters[name] = parameter  # type: ignore[assignment]


class Installed:
    """Which block's weights are in their modules: one's at most; all others are placeholders.

    blocks: the weights of each, in its recipe's order. place: what is there; None: nothing.
    """

    def __init__(self) -> None:
        self.blocks: list[list[Weight]] = []
        self.place: Place | None = None
        self._parameters: dict[tuple[int, int | None], list[nn.Parameter]] = {}

    def put_in(self, place: Place, tensors: Sequence[torch.Tensor], *, are_in_slot: bool) -> None:
        """A block's tensors in the place of its placeholders, where no block's are; the same parameters at every visit.

        are_in_slot: whether they are the slot's own; else what a method has instead, the same for all slots.
        """
        assert self.place is None
        block, slot, _ = place
        key = (block, slot if are_in_slot else None)
        if key not in self._parameters:
            self._parameters[key] = [nn.Parameter(t, requires_grad=False) for t in tensors]
        for weight, parameter in zip(self.blocks[block], self._parameters[key], strict=True):
            weight.put_in(parameter)
        self.place = place

    def take_out(self) -> None:
        """Placeholders again: what is read outside a visit must not see a slot's next content."""
        if self.place is None:
            return
        for weight in self.blocks[self.place[0]]:
            weight.put_in(weight.placeholder)
        self.place = None

    def forget(self) -> None:
        """The slots are others from now on; nothing is in the modules."""
        assert self.place is None
        self._parameters.clear()
