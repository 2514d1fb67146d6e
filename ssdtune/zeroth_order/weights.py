"""Weights that are perturbed and updated on their way to compute.

Streamed weights stay in their files. What training makes of them is a list of updates; a block that comes from its
file takes the steps that it has missed, in its slot, before anybody reads it, and each variant of the weights is made
from that, in memory of its own, while its micro-batches pass. So every reader sees the weights as they are now:
training, evaluation, generation, `state_dict`. Nothing is added and taken away again, so nothing drifts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ssdtune.swap.storage import aligned_bytes
from ssdtune.visit.streamer import Streamer
from ssdtune.zeroth_order.estimators import Shift
from ssdtune.zeroth_order.updates import Directions, Update


class MovingWeights:
    """Of one streamed model; the streamer calls it (`visit.streamer.Weights`).

    Args:
        streamer: the model's.
        resident: parameters that train and lie in memory, by name.
        directions: of the run.
        trains_blocks: whether streamed weights train as well.
    """

    def __init__(
        self,
        streamer: Streamer,
        resident: Mapping[str, torch.Tensor],
        directions: Directions,
        *,
        trains_blocks: bool,
    ) -> None:
        self.directions, self.trains_blocks = directions, trains_blocks
        self.updates: list[Update] = []
        self._streamer = streamer
        self._resident = dict(resident)
        self._shifts: Sequence[Shift | None] = ()
        self._step = 0
        # First tensor's address in a slot -> the content that has taken so many updates.
        self._taken: dict[int, tuple[object, int]] = {}
        self._scratch: torch.Tensor | None = None  # where variants of blocks are made
        self._views: dict[int, list[torch.Tensor]] = {}
        self._shifted: dict[int, dict[str, torch.Tensor]] = {}  # of resident parameters, by variant
        self._plain: dict[str, torch.Tensor] = {}

    @property
    def resident_bytes(self) -> int:
        """Of the parameters in memory that train."""
        return sum(p.nbytes for p in self._resident.values())

    @property
    def variant_bytes(self) -> int:
        """Of the place where variants of blocks are made."""
        if not self.trains_blocks:
            return 0
        return max(memory.nbytes for memory in self._streamer.engine.slots.memory)

    def begin(self, step: int, shifts: Sequence[Shift | None]) -> None:
        """A step's variants, numbered as in `shifts`."""
        self._step, self._shifts = step, shifts
        self._shifted.clear()
        self._plain = {name: p.data for name, p in self._resident.items()}
        for variant, shift in enumerate(shifts):
            if shift is not None:
                made = {name: torch.empty_like(base) for name, base in self._plain.items()}
                for name, base in self._plain.items():
                    self._shift(made[name], base, name, shift)
                self._shifted[variant] = made

    def take(self, update: Update) -> None:
        """One more step for all weights: now for those in memory, when they come next for the others."""
        self._shifted.clear()
        for name, parameter in self._resident.items():
            self.directions.apply(parameter.data, name, [update])
        if self.trains_blocks:
            self.updates.append(update)

    def forget_stored(self) -> None:
        """What the drive holds has taken all steps so far."""
        self.updates.clear()
        self._taken.clear()

    def replay(self, updates: Sequence[Update]) -> None:
        """All weights are the base's, and take these steps: at the start of a run that goes on."""
        assert not self.updates
        for update in updates:
            self.take(update)

    # ---- what the streamer asks for ----------------------------------------------------------

    def refresh(self, block: int, tensors: Sequence[torch.Tensor], content: object) -> None:
        """The updates that this content of a slot has missed."""
        if not tensors:
            return
        key = tensors[0].data_ptr()
        known, taken = self._taken.get(key, (None, 0))
        missed = self.updates[taken if known is content else 0 :]
        if missed:
            for name, tensor in zip(self._names(block), tensors, strict=True):
                self.directions.apply(tensor, name, missed)
        self._taken[key] = (content, len(self.updates))

    def stand_in(
        self, block: int, tensors: Sequence[torch.Tensor], variant: int
    ) -> Sequence[torch.Tensor]:
        """A variant of the block, made in the one place for it: gone with the next one."""
        shift = self._shifts[variant]
        if shift is None or not self.trains_blocks:
            return tensors
        made = self._views_of(block)
        for name, tensor, to in zip(self._names(block), tensors, made, strict=True):
            self._shift(to, tensor, name, shift)
        return made

    def read(self, block: int, index: int, stored: torch.Tensor) -> torch.Tensor:
        """A weight as it is now, from what its file holds."""
        self.directions.apply(stored, self._names(block)[index], self.updates)
        return stored

    def outside(self, variant: int | None) -> None:
        """Resident parameters as in a variant; None: as they are."""
        made = self._plain if variant is None else self._shifted.get(variant, self._plain)
        for name, parameter in self._resident.items():
            parameter.data = made[name]

    # ---- inner -------------------------------------------------------------------------------

    def _names(self, block: int) -> list[str]:
        return self._streamer.names(block)

    def _shift(self, to: torch.Tensor, base: torch.Tensor, name: str, shift: Shift) -> None:
        self.directions.shift(to, base, name, step=self._step, j=shift.direction, scale=shift.scale)

    def _views_of(self, block: int) -> list[torch.Tensor]:
        """Tensors laid out as in a slot, alignment included: kernels choose by it."""
        if block not in self._views:
            slots = self._streamer.engine.slots
            if self._scratch is None:
                self._scratch = (
                    aligned_bytes(self.variant_bytes)
                    if slots.device.type == "cpu"
                    else torch.empty(self.variant_bytes, dtype=torch.uint8, device=slots.device)
                )
            views = self._streamer.engine.recipes[block].tensors
            self._views[block] = [view.of(self._scratch) for view in views]
        return self._views[block]
