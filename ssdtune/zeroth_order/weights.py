"""Weights that are perturbed and updated on their way to compute.

Streamed weights stay in their files. What training makes of them is a list of updates; a block that comes from its
file takes the steps that it has missed, in its slot, before anybody reads it, and each variant of the weights is made
from that, in memory of its own, while its micro-batches pass. So every reader sees the weights as they are now:
training, evaluation, generation, `state_dict`. Nothing is added and taken away again, so nothing drifts.

Of parameters that lie in memory, those inside a block (adapters) are shifted like the block, when it is visited and in
one place for all blocks; of the few outside of blocks all variants are kept for the step.

Blocks of a packed base may stay packed in their slots (`packed.py`): then all that compute reads of them is made in the
place for variants.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from ssdtune.swap.storage import aligned_bytes
from ssdtune.visit.streamer import Streamer
from ssdtune.zeroth_order.estimators import Shift
from ssdtune.zeroth_order.packed import DECODED, MOVED, At, PackedBlocks, keep_packed
from ssdtune.zeroth_order.rules import Update
from ssdtune.zeroth_order.updates import Directions


class MovingWeights:
    """Of one streamed model; the streamer calls it (`visit.streamer.Weights`).

    Args:
        streamer: the model's.
        resident: parameters that train and lie in memory, by name.
        directions: of the run.
        trains_blocks: whether streamed weights train as well.
        packed: what slots hold of a packed base, one of `packed.WAYS`.
    """

    def __init__(
        self,
        streamer: Streamer,
        resident: Mapping[str, torch.Tensor],
        directions: Directions,
        *,
        trains_blocks: bool,
        packed: str = DECODED,
    ) -> None:
        if packed != DECODED:
            keep_packed(streamer, directions, packed)
        self._packed, self._moves_packed = PackedBlocks(streamer, directions), packed == MOVED
        self.directions, self.trains_blocks = directions, trains_blocks
        self.updates: list[Update] = []
        self._streamer = streamer
        self._resident = dict(resident)
        self._inside, self._outside = by_place(streamer, resident)
        self._shifts: Sequence[Shift | None] = ()
        self._step = 0
        # First tensor's address in a slot -> the content that has taken so many updates.
        self._taken: dict[int, tuple[object, int]] = {}
        self._stored: dict[int, int] = {}  # block -> updates that the drive has; else 0
        self._due: dict[int, int] = {}  # block -> with how many updates it is to be written
        self._period = 0
        self._returning: set[int] = set()  # blocks that a step reads from the drive
        self._scratch: torch.Tensor | None = None  # where variants of blocks are made
        self._views: dict[int, list[torch.Tensor]] = {}
        self._content: object = None  # of the slot that was refreshed last
        self._made: object = None  # what tells what of a packed block lies there
        self._inside_scratch: torch.Tensor | None = None
        self._shifted: dict[
            int, dict[str, torch.Tensor]
        ] = {}  # of those outside of blocks, by variant
        self._plain: dict[str, torch.Tensor] = {}

    def extra_bytes(self, shifts: Sequence[Shift | None]) -> dict[str, int]:
        """Memory that variants take, by what it is for."""
        inside = max((inside_bytes(p.values()) for p in self._inside.values()), default=0)
        return extra_bytes(
            shifts,
            block=self._variant_bytes + inside,
            outside=sum(p.nbytes for p in self._outside.values()),
        )

    def shapes(self) -> dict[int, list[tuple[int, ...]]]:
        """Of the tensors that move in each block's visits."""
        recipes = self._streamer.engine.recipes if self.trains_blocks else ()
        moved = {
            block: [view.shape for view in recipe.tensors] for block, recipe in enumerate(recipes)
        }
        for block, parameters in self._inside.items():
            moved.setdefault(block, []).extend(tuple(p.shape) for p in parameters.values())
        return moved

    @property
    def _variant_bytes(self) -> int:
        """Of the place where variants of blocks are made."""
        slots = self._streamer.engine.slots.memory if self.trains_blocks else ()
        return max(self._packed.num_bytes(), *(memory.nbytes for memory in slots), 0)

    def begin(self, step: int, shifts: Sequence[Shift | None]) -> None:
        """A step's variants, numbered as in `shifts`."""
        self._step, self._shifts = step, shifts
        visits = self._streamer.engine.plan.sequences["forward"].visits
        self._returning = {visit.block for visit in visits if visit.is_filled_for}
        self._shifted.clear()
        self._plain = {name: p.data for name, p in self._resident.items()}
        for variant, shift in enumerate(shifts):
            if shift is not None:
                made = {name: torch.empty_like(self._plain[name]) for name in self._outside}
                for name, to in made.items():
                    self._shift(to, self._plain[name], name, shift)
                self._shifted[variant] = made

    def take(self, update: Update) -> None:
        """One more step for all weights: now for those in memory, when they come next for the others."""
        self._shifted.clear()
        for name, parameter in self._resident.items():
            self.directions.apply(parameter.data, name, [update])
        if self.trains_blocks:
            self.updates.append(update)

    def all_stored(self, period: int) -> None:
        """The drive holds all blocks of ours with all steps so far. From now on each is written back after every
        `period` steps, a like share of them in each step."""
        self._taken.clear()
        count, self._period = len(self.updates), period
        for block in range(len(self._streamer.blocks)):
            self._stored[block] = count
            self._due[block] = count + 1 + block % period

    def replay(self, updates: Sequence[Update]) -> None:
        """All weights are the base's, and take these steps: at the start of a run that goes on."""
        assert not self.updates
        for update in updates:
            self.take(update)

    # ---- what the streamer asks for ----------------------------------------------------------

    def refresh(self, block: int, slot: int) -> None:
        """The updates that this content of a slot has missed; then, where it is due, the block goes back to the drive
        as it is now, while it is computed with."""
        engine = self._streamer.engine
        tensors, content = engine.slots.tensors(block, slot), engine.content(slot)
        if not tensors:
            return
        self._content = content
        key = tensors[0].data_ptr()
        known, taken = self._taken.get(key, (None, 0))
        if known is not content and self._packed.has(block):
            self._packed.check(block, tensors[0])
        missed = self.updates[taken if known is content else self._stored.get(block, 0) :]
        if missed:
            engine.await_stored(block)
            try:
                self._apply(block, tensors, missed)
            except BaseException:  # Ctrl-C: some tensors have taken the steps, others have not
                engine.discard(slot)
                raise
        self._taken[key] = (content, len(self.updates))
        if block in self._returning and len(self.updates) >= self._due.get(block, math.inf):
            self._store(block, slot)

    def _apply(self, block: int, tensors: Sequence[torch.Tensor], missed: Sequence[Update]) -> None:
        """What the slot holds takes these steps; packed bytes that are kept do so when they are decoded."""
        if not self._packed.has(block):
            for name, tensor in zip(self._names(block), tensors, strict=True):
                self.directions.apply(tensor, name, missed)
        elif self._moves_packed:
            self._packed.move(block, tensors[0], missed)

    def _store(self, block: int, slot: int) -> None:
        count = len(self.updates)

        def done() -> None:
            self._stored[block] = count

        if self._streamer.engine.store(block, slot, done):
            self._due[block] = count + self._period

    def stand_in(
        self, block: int, tensors: Sequence[torch.Tensor], variant: int | None
    ) -> Sequence[torch.Tensor]:
        """A variant of the block, made in the one place for it: gone with the next one."""
        shift = None
        if variant is not None:
            shift = self._shifts[variant]
            self._shift_inside(block, shift)
        if not self.trains_blocks:
            shift = None
        if self._packed.has(block):
            return self._decoded(block, tensors[0], shift)
        if shift is None:
            return tensors
        made, self._made = self._views_of(block), None
        for name, tensor, to in zip(self._names(block), tensors, made, strict=True):
            self._shift(to, tensor, name, shift)
        return made

    def _decoded(self, block: int, raw: torch.Tensor, shift: Shift | None) -> list[torch.Tensor]:
        """The tensors of a block that stays packed, made in the same place; what lies there already is not made anew."""
        views = self._views_of(block)
        updates = () if self._moves_packed else tuple(self.updates)
        key = (block, self._content, len(self.updates), shift, shift and self._step)
        if key != self._made:
            self._made = None  # Ctrl-C: some of the tensors would be others
            self._packed.make(block, raw, views, At(updates, shift, self._step))
            self._made = key
        return views

    def read(self, block: int, index: int) -> torch.Tensor:
        """A weight as it is now, made from what its file holds."""
        engine = self._streamer.engine
        missed = self.updates[self._stored.get(block, 0) :]
        if self._packed.has(block):
            with torch.inference_mode(False), torch.no_grad():
                return self._read_packed(block, index, missed)
        stored = engine.read_stored(block, index)
        self.directions.apply(stored, self._names(block)[index], missed)
        return stored

    def _read_packed(self, block: int, index: int, missed: Sequence[Update]) -> torch.Tensor:
        engine, unpacking = self._streamer.engine, self._streamer.engine.recipes[block].unpacking
        assert unpacking is not None
        raw, view = engine.read_stored(block, 0), unpacking.tensors[index]
        self._packed.check(block, raw)
        if self._moves_packed:
            self._packed.move_one(block, index, raw, missed)
            missed = ()
        to = torch.empty(view.shape, dtype=view.dtype, device=raw.device)
        self._packed.make_one(block, index, raw, to, At(tuple(missed)))
        return to

    def outside(self, variant: int | None) -> None:
        """Parameters outside of blocks as in a variant; None: all that lie in memory as they are."""
        if variant is None:
            for name, parameter in self._resident.items():
                parameter.data = self._plain[name]
            return
        made = self._shifted.get(variant, self._plain)
        for name, parameter in self._outside.items():
            parameter.data = made[name]

    # ---- inner -------------------------------------------------------------------------------

    def _names(self, block: int) -> list[str]:
        return self._streamer.names(block)

    def _shift(self, to: torch.Tensor, base: torch.Tensor, name: str, shift: Shift) -> None:
        self.directions.shift(to, base, name, step=self._step, j=shift.direction, scale=shift.scale)

    def _shift_inside(self, block: int, shift: Shift | None) -> None:
        """The block's parameters in memory as in a variant; what is left in those of another block is never read."""
        parameters = self._inside.get(block, {})
        if shift is None:
            for name, parameter in parameters.items():
                parameter.data = self._plain[name]
            return
        at = 0
        for name, parameter in parameters.items():
            base = self._plain[name]
            to = self._inside_memory(base.device)[at : at + base.nbytes].view(base.dtype)
            to = to.view(base.shape)
            self._shift(to, base, name, shift)
            parameter.data = to
            at += _padded(base.nbytes)

    def _inside_memory(self, device: torch.device) -> torch.Tensor:
        if self._inside_scratch is None:
            num_bytes = max(inside_bytes(p.values()) for p in self._inside.values())
            self._inside_scratch = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return self._inside_scratch

    def _views_of(self, block: int) -> list[torch.Tensor]:
        """Tensors laid out as in a slot, alignment included: kernels choose by it."""
        if block not in self._views:
            slots = self._streamer.engine.slots
            if self._scratch is None:
                self._scratch = (
                    aligned_bytes(self._variant_bytes)
                    if slots.device.type == "cpu"
                    else torch.empty(self._variant_bytes, dtype=torch.uint8, device=slots.device)
                )
            recipe = self._streamer.engine.recipes[block]
            views = recipe.tensors if recipe.unpacking is None else recipe.unpacking.tensors
            with torch.inference_mode(False):  # they outlive whoever asks first
                self._views[block] = [view.of(self._scratch) for view in views]
        return self._views[block]


ALIGNMENT = 256  # of tensors beside each other, as slots have it on a device


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def inside_bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Of the place where a block's parameters in memory are shifted."""
    return sum(_padded(p.nbytes) for p in parameters)


def extra_bytes(shifts: Sequence[Shift | None], *, block: int, outside: int) -> dict[str, int]:
    """What variants take: one of the largest block, and all of them of what lies outside of blocks."""
    num_shifted = sum(shift is not None for shift in shifts)
    return {"a variant of a block": block, "variants outside blocks": num_shifted * outside}


def by_place(
    streamer: Streamer, parameters: Mapping[str, torch.Tensor]
) -> tuple[dict[int, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Parameters by the block whose modules hold them, and those outside of blocks."""
    block_of = {id(p): m.block for m in streamer.meetings for p in m.module.parameters()}
    inside: dict[int, dict[str, torch.Tensor]] = {}
    outside: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        block = block_of.get(id(parameter))
        (outside if block is None else inside.setdefault(block, {}))[name] = parameter
    return inside, outside
