"""Blocks of a packed base that stay packed in their slots.

A slot then holds a block as its files have it, a fraction of the decoded size, and what compute reads is made from that
in one place for all blocks: decoded, moved and rounded in one pass (`kernels/unpack_add.py`). Three ways to have a
packed base:

    decoded   slots hold decoded weights; variants are made from them.
    kept      slots hold packed bytes, which never change; what they stand for takes all steps so far each time that a
              variant is made. The bits of `decoded`. For adapters, whose base takes no steps, and for few steps.
    moved     the packed weights themselves train: their codes take each step in place, rounded at random
              (`kernels/requantize.py`), and are written back packed. Other weights than those of `decoded`, whose steps
              are rounded to the parameters' dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ssdtune.errors import SSDTuneError
from ssdtune.kernels.affine import Affine
from ssdtune.kernels.requantize import requantize
from ssdtune.kernels.unpack_add import unpack_add
from ssdtune.swap.recipe import Copy, PackedView, TensorView, Unpacking, kept_packed
from ssdtune.visit.streamer import Streamer
from ssdtune.zeroth_order.estimators import Shift
from ssdtune.zeroth_order.rules import Term, Update
from ssdtune.zeroth_order.updates import Directions

DECODED, KEPT, MOVED = "decoded", "kept", "moved"
WAYS = (DECODED, KEPT, MOVED)


class PackedError(SSDTuneError):
    """A base that is not packed, or packed so that it can't be moved."""


@dataclasses.dataclass(frozen=True, slots=True)
class At:
    """Which weights are wanted: what is stored after these updates, shifted where there is a shift, in this step."""

    updates: tuple[Update, ...] = ()
    shift: Shift | None = None
    step: int = 0

    @property
    def term(self) -> Term | None:
        """What the shift adds."""
        return None if self.shift is None else self.shift.term(self.step)


class PackedBlocks:
    """Makes tensors of blocks that stay packed, and moves their bytes. streamer: whose recipes say how they lie."""

    def __init__(self, streamer: Streamer, directions: Directions) -> None:
        self._streamer, self._directions = streamer, directions

    def has(self, block: int) -> bool:
        """Whether the block stays packed in its slot."""
        return self._streamer.engine.recipes[block].unpacking is not None

    def num_bytes(self) -> int:
        """Of the largest of them, decoded."""
        recipes = self._streamer.engine.recipes
        return max((r.unpacking.num_bytes for r in recipes if r.unpacking is not None), default=0)

    def make(self, block: int, raw: torch.Tensor, to: Sequence[torch.Tensor], at: At) -> None:
        """All tensors of the block. raw: what its slot holds. to: the tensors, laid out as `Unpacking` says."""
        for index in range(len(to)):
            self.make_one(block, index, raw, to[index], at)

    def make_one(self, block: int, index: int, raw: torch.Tensor, to: torch.Tensor, at: At) -> None:
        """One of them: in one pass, where it is one packed tensor as it lies."""
        name, copies = self._streamer.names(block)[index], self._unpacking(block).of(index)
        source = copies[0].source if is_one(copies) else None
        if isinstance(source, PackedView) and self._directions.has_moves(to.dim()):
            self._unpack_moved(source, raw, to, name, at)
            return
        for copy in copies:
            dataclasses.replace(copy, target=0).run(raw, [to])
        self._directions.apply(to, name, at.updates)
        if at.term is not None or self._directions.is_apart:
            self._directions.make(to, to, name, at.term)

    def _unpack_moved(
        self, source: PackedView, raw: torch.Tensor, to: torch.Tensor, name: str, at: At
    ) -> None:
        moves = [self._directions.update_move(name, to.dim(), update) for update in at.updates]
        if at.shift is not None:
            moves.append(
                self._directions.shift_move(
                    name, step=at.step, j=at.shift.direction, scale=at.shift.scale
                )
            )
        unpack_add(source.format, source.values(raw), to, moves)

    def move(self, block: int, raw: torch.Tensor, updates: Sequence[Update]) -> None:
        """The slot's bytes take these steps."""
        for index in range(len(self._unpacking(block).tensors)):
            self.move_one(block, index, raw, updates)

    def move_one(
        self, block: int, index: int, raw: torch.Tensor, updates: Sequence[Update]
    ) -> None:
        """Those of one tensor: codes rounded at random, or what is not packed as ever."""
        unpacking, name = self._unpacking(block), self._streamer.names(block)[index]
        (copy,) = unpacking.of(index)
        dim = len(unpacking.tensors[index].shape)
        if isinstance(copy.source, TensorView):
            found = copy.source.values(raw)
            self._directions.apply(found.view(unpacking.tensors[index].shape), name, updates)
            copy.source.put(raw, found)
            return
        format = copy.source.format
        assert isinstance(format, Affine), "movable() has looked"
        for update in updates:
            move = self._directions.update_move(name, dim, update)
            requantize(format, copy.source.values(raw), copy.source.shape, move)

    def _unpacking(self, block: int) -> Unpacking:
        unpacking = self._streamer.engine.recipes[block].unpacking
        assert unpacking is not None
        return unpacking


def is_one(copies: Sequence[Copy]) -> bool:
    """Whether a tensor is one file tensor as it lies."""
    return len(copies) == 1 and copies[0].is_whole and copies[0].target_slices is None


def keep_packed(streamer: Streamer, directions: Directions, way: str) -> None:
    """From now on blocks with packed weights stay packed in their slots; between steps. way: KEPT or MOVED.

    Raises PackedError, all as it was, where nothing is packed, or something can't be moved as it is packed.
    """
    on_device = streamer.engine.slots.device.type != "cpu"
    before = streamer.engine.recipes
    recipes = [kept_packed(r, on_device=on_device) if r.packed else r for r in before]
    if all(recipe.unpacking is None for recipe in recipes):
        raise PackedError(
            f"packed: {way} is for a packed base, and nothing of this one is packed.\n"
            "Pack it (ssdtune pack), or leave it at decoded."
        )
    if way == MOVED:
        for block, recipe in enumerate(recipes):
            if recipe.unpacking is not None:
                _check_movable(recipe.unpacking, streamer.names(block), directions)
    streamer.read_from(recipes, streamer.open_engine.storage)


def _check_movable(unpacking: Unpacking, names: Sequence[str], directions: Directions) -> None:
    for index, (name, tensor) in enumerate(zip(names, unpacking.tensors, strict=True)):
        copies = unpacking.of(index)
        why = _why_not(copies, tensor)
        if why is None and not directions.has_moves(len(tensor.shape)):
            why = "its steps are no plain sums of random directions"
        if why is not None:
            raise PackedError(
                f"packed: moved can't move {name}: {why}.\n"
                "Leave it at decoded, or pack the model by `ssdtune pack --bits` and take mezo or fzoo, "
                "without a mask, and the rule sgd or momentum."
            )


def _why_not(copies: Sequence[Copy], tensor: TensorView) -> str | None:
    """Why the bytes that a tensor is made of can't take a step in place; None where they can."""
    if not is_one(copies):
        return f"it is put together from {len(copies)} pieces of file tensors"
    source = copies[0].source
    if isinstance(source, PackedView):
        is_affine = isinstance(source.format, Affine)
        return None if is_affine else f"codes of {source.format.label} are not written back"
    is_same = source.dtype == tensor.dtype
    return None if is_same else f"its file has it in {source.dtype}, the model in {tensor.dtype}"
