"""Weights that are perturbed and updated on their way to compute.

Streamed weights stay in their files. What training makes of them is a list of changes; a block that comes from its
file takes those that it has missed, in its slot, before anybody reads it, and each variant of the weights is made
from that, in memory of its own, while its micro-batches pass. So every reader sees the weights as they are now:
training, evaluation, generation, `state_dict`. Nothing is added and taken away again, so nothing drifts.

A change is a step, or, where steps are held as matrices of low rank, a whole window of them (`windows.py`). Then what
slots hold is not the weights as they are now: those are made like a variant.

Blocks of a packed base may stay packed in their slots (`packed.py`): then all that compute reads of them is made in the
place for variants. Parameters that lie in memory are `residents.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ssdtune.errors import SSDTuneError
from ssdtune.swap.recipe import TensorView
from ssdtune.swap.storage import aligned_bytes
from ssdtune.visit.streamer import Streamer
from ssdtune.zeroth_order.estimators import Shift
from ssdtune.zeroth_order.masters import hold_masters
from ssdtune.zeroth_order.packed import DECODED, MOVED, At, PackedBlocks, keep_packed
from ssdtune.zeroth_order.residents import Residents
from ssdtune.zeroth_order.rules import Update
from ssdtune.zeroth_order.updates import Directions
from ssdtune.zeroth_order.windows import Windows, sums_bytes


class MovedError(SSDTuneError):
    """Weights that are no longer those of their files, where those are what something begins with."""


class MovingWeights:
    """Of one streamed model; the streamer calls it (`visit.streamer.Weights`).

    Args:
        streamer: the model's.
        resident: parameters that train and lie in memory, by name.
        directions: of the run.
        trains_blocks: whether streamed weights train as well.
        packed: what slots hold of a packed base, one of `packed.WAYS`.
        master: whether slots hold 16-bit weights in float32, and what compute reads is rounded from that.
    """

    def __init__(
        self,
        streamer: Streamer,
        resident: Mapping[str, torch.Tensor],
        directions: Directions,
        *,
        trains_blocks: bool,
        packed: str = DECODED,
        master: bool = False,
    ) -> None:
        # What compute reads of each block, where slots hold something else that is not packed.
        self._read_as = hold_masters(streamer) if master else None
        if packed != DECODED:
            keep_packed(streamer, directions, packed)
        self._packed, self._moves_packed = PackedBlocks(streamer, directions), packed == MOVED
        self.directions, self.trains_blocks = directions, trains_blocks
        self.updates: list[Update] = []  # changes of what is stored
        self.residents = Residents(streamer, resident, directions, has_masters=master)
        self._streamer = streamer
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
        self._num_taken = 0  # steps of the blocks

    @property
    def is_at_work(self) -> bool:
        """Whether streamed weights are others than those of their files by now, or are held otherwise."""
        return self._num_taken > 0 or self._read_as is not None

    def extra_bytes(self, shifts: Sequence[Shift | None]) -> dict[str, int]:
        """Memory that variants take, and steps that are held beside the weights, by what it is for."""
        residents, held = self.residents, 0
        if isinstance(self.directions, Windows):
            streamed = [
                v.shape for b in range(len(self._streamer.blocks)) for v in self._tensors(b)
            ]
            shapes = [*streamed, *residents.shapes()]
            held = sums_bytes(shapes, self.directions.family, self.directions.rule)
        return extra_bytes(
            shifts,
            block=self._variant_bytes + residents.inside_bytes,
            outside=sum(p.nbytes for p in residents.outside.values()),
            held=held + residents.kept_bytes,
        )

    def shapes(self) -> dict[int, list[tuple[int, ...]]]:
        """Of the tensors that move in each block's visits."""
        blocks = range(len(self._streamer.blocks)) if self.trains_blocks else ()
        moved = {block: [v.shape for v in self._tensors(block)] for block in blocks}
        for block, parameters in self.residents.inside.items():
            moved.setdefault(block, []).extend(tuple(p.shape) for p in parameters.values())
        return moved

    @property
    def _variant_bytes(self) -> int:
        """Of the place where variants of blocks are made."""
        if self._read_as is not None:
            return max(recipe.slot_bytes for recipe in self._read_as)
        slots = self._streamer.engine.slots.memory if self.trains_blocks else ()
        return max(self._packed.num_bytes(), *(memory.nbytes for memory in slots), 0)

    def begin(self, step: int, shifts: Sequence[Shift | None]) -> None:
        """A step's variants, numbered as in `shifts`."""
        self._step, self._shifts = step, shifts
        visits = self._streamer.engine.plan.sequences["forward"].visits
        self._returning = {visit.block for visit in visits if visit.is_filled_for}
        self.residents.begin(step, shifts)

    def take(self, update: Update) -> None:
        """One more step for all weights: now for those in memory, when they come next for the others."""
        self._num_taken += self.trains_blocks
        self._change(self.directions.take(update))

    def ended(self, num_steps: int) -> None:
        """So many steps are over, those that were skipped too."""
        changes = self.directions.ended(num_steps)
        if changes:
            self._change(changes)

    def _change(self, changes: Sequence[Update]) -> None:
        self.residents.take(changes)
        if self.trains_blocks:
            self.updates.extend(changes)

    def all_stored(self, period: int) -> None:
        """The drive holds all blocks of ours with all updates so far. From now on each is written back after every
        `period` updates, a like share of them with each."""
        self._taken.clear()
        count, self._period = len(self.updates), period
        for block in range(len(self._streamer.blocks)):
            self._stored[block] = count
            self._due[block] = count + 1 + block % period

    def replay(self, updates: Sequence[Update], num_steps: int) -> None:
        """All weights are the base's, and take these of so many steps: at the start of a run that goes on. Raises
        MovedError where they are not."""
        if self._num_taken:
            raise MovedError(
                f"the model's weights have taken {self._num_taken} steps here, others than those of the checkpoint, and "
                "none is taken back.\nOpen the model anew with ssdtune.stream, and resume with a trainer of that."
            )
        for update in updates:
            self.ended(update.step)
            self.take(update)
        self.ended(num_steps)

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
            self.residents.use_inside(block, shift)
        if not self.trains_blocks:
            shift = None
        if self._packed.has(block):
            return self._decoded(block, tensors[0], shift)
        if shift is None and not self._is_apart:
            return tensors
        made, self._made = self._views_of(block), None
        term = None if shift is None else shift.term(self._step)
        for name, tensor, to in zip(self._names(block), tensors, made, strict=True):
            self.directions.make(to, tensor, name, term)
        return made

    def _decoded(self, block: int, raw: torch.Tensor, shift: Shift | None) -> list[torch.Tensor]:
        """The tensors of a block that stays packed, made in the same place; what lies there already is not made anew."""
        views = self._views_of(block)
        updates = () if self._moves_packed else tuple(self.updates)
        count = len(self.updates), self._num_taken
        key = (block, self._content, count, shift, shift and self._step)
        if key != self._made:
            self._made = None  # Ctrl-C: some of the tensors would be others
            self._packed.make(block, raw, views, At(updates, shift, self._step))
            self._made = key
        return views

    def read(self, block: int, index: int) -> torch.Tensor:
        """A weight as it is now, made from what its file holds."""
        if self._packed.has(block):
            with torch.inference_mode(False), torch.no_grad():
                return self._read_packed(block, index)
        stored, missed = self._read_stored(block, index)
        name = self._names(block)[index]
        self.directions.apply(stored, name, missed)
        if not self._is_apart:
            return stored
        to = torch.empty_like(stored, dtype=self._tensors(block)[index].dtype)
        self.directions.make(to, stored, name, None)
        return to

    def _read_stored(self, block: int, index: int) -> tuple[torch.Tensor, Sequence[Update]]:
        """What the drive has of a tensor, and the updates that it lacks. Asked in this order: the read waits for a
        store under way, which brings some of them there."""
        found = self._streamer.engine.read_stored(block, index)
        return found, self.updates[self._stored.get(block, 0) :]

    def _read_packed(self, block: int, index: int) -> torch.Tensor:
        unpacking = self._streamer.engine.recipes[block].unpacking
        assert unpacking is not None
        (raw, missed), view = self._read_stored(block, 0), unpacking.tensors[index]
        if self._moves_packed:
            self._packed.move_one(block, index, raw, missed)
            missed = ()
        to = torch.empty(view.shape, dtype=view.dtype, device=raw.device)
        self._packed.make_one(block, index, raw, to, At(tuple(missed)))
        return to

    def outside(self, variant: int | None) -> None:
        """Parameters outside of blocks as in a variant; None: all that lie in memory as they are."""
        self.residents.use_outside(variant)

    # ---- inner -------------------------------------------------------------------------------

    def _names(self, block: int) -> list[str]:
        return self._streamer.names(block)

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
            with torch.inference_mode(False):  # they outlive whoever asks first
                self._views[block] = [view.of(self._scratch) for view in self._tensors(block)]
        return self._views[block]

    def _tensors(self, block: int) -> Sequence[TensorView]:
        """What compute reads of a block."""
        recipe = (self._read_as or self._streamer.engine.recipes)[block]
        return recipe.tensors if recipe.unpacking is None else recipe.unpacking.tensors

    @property
    def _is_apart(self) -> bool:
        """Whether what slots hold of weights that are not packed is something else than the weights."""
        return self.directions.is_apart or self._read_as is not None


def extra_bytes(
    shifts: Sequence[Shift | None], *, block: int, outside: int, held: int = 0
) -> dict[str, int]:
    """What variants take: one of the largest block, and all of them of what lies outside of blocks. held: what is kept
    beside them."""
    num_shifted = sum(shift is not None for shift in shifts)
    found = {"a variant of a block": block, "variants outside blocks": num_shifted * outside}
    return found | ({"held beside the weights": held} if held else {})


def check_unmoved(streamer: Streamer) -> None:
    """Raises MovedError where a model's weights are not those of its files, or not held as those are: they have taken
    steps, or have float32 masters. Another method would find residents and a working copy as they are by now, blocks as
    they were, and name neither in its log."""
    method = streamer.method
    if isinstance(method, MovingWeights) and method.is_at_work:
        raise MovedError(
            "the model's weights are no longer those of its files: an earlier method, or a replayed log, works on them.\n"
            "Open the model anew with ssdtune.stream; to begin with the weights as they are now, "
            "model.save_pretrained(folder) first, and open that folder."
        )
