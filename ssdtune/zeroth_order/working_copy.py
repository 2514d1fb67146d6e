"""A working copy of the streamed weights on the drive, so that blocks need not take all steps again at every read.

A block lies in it as it lies in a slot, page-aligned: it is read in place, whatever the user's files looked like, and
written back in place by the visits themselves (`Engine.store`). The user's files are never written. The copy can always
be made again from them and the log, so it is not part of any checkpoint, and goes with the run, however that ends: its
file has no name (`swap/scratch.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ssdtune.errors import SSDTuneError
from ssdtune.schedule.plan import Direction
from ssdtune.swap.recipe import BlockRecipe, Copy
from ssdtune.swap.scratch import lies_in_ram, nameless_file, no_room, path_of, write_all
from ssdtune.swap.storage import MIN_ALIGNMENT, Extent, choose_storage
from ssdtune.visit.streamer import Streamer


class WorkingCopyError(SSDTuneError):
    """A drive without room for it, one that fails, or a folder that is in RAM."""


def check_folder(folder: Path) -> None:
    """Raises WorkingCopyError where a copy in the folder would take memory, not a drive's space."""
    if lies_in_ram(folder):
        raise WorkingCopyError(
            f"{folder} lies in RAM (tmpfs): a working copy of all weights would take there what is not in memory for "
            "want of room.\nSet offload.path to a folder on a drive, or zo_fold_steps: never."
        )


class WorkingCopy:
    """Of one streamed model. folder: on a fast drive."""

    def __init__(self, streamer: Streamer, folder: Path) -> None:
        self._streamer, self._folder = streamer, folder
        self._fd: int | None = None

    @property
    def is_there(self) -> bool:
        """Whether it has been made."""
        return self._fd is not None

    def write(self) -> None:
        """Writes all blocks as the method makes them now; from now on they are read from here. Between steps only.

        Raises WorkingCopyError or ScratchError where the drive has no room or takes no file, PlanError where RAM has none
        for blocks as they lie there; all as it was.
        """
        places = list(_places(self._streamer.engine.recipes))
        self._fd = nameless_file(self._folder)
        try:
            _reserve(self._fd, sum(num_bytes for _, num_bytes in places), self._folder)
            self._fill(self._fd, places)
            self._read_from(path_of(self._fd), places)
        except BaseException:
            self.close()
            raise

    def _read_from(self, path: Path, places: list[tuple[int, int]]) -> None:
        engine = self._streamer.engine
        on_device = engine.slots.device.type != "cpu"
        recipes = [
            _recipe(recipe, path, *place, on_device=on_device)
            for recipe, place in zip(engine.recipes, places, strict=True)
        ]
        self._streamer.read_from(recipes, choose_storage(path).storage)

    def _fill(self, fd: int, places: list[tuple[int, int]]) -> None:
        for block, slot in self._visits():
            offset, num_bytes = places[block]
            memory = self._streamer.engine.slots.memory[slot]
            content = memory[: min(num_bytes, memory.nbytes)].cpu()
            write_all(fd, offset, content.numpy().data)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _visits(self) -> Iterator[tuple[int, int]]:
        """Every block once, with the slot that holds it up to date; in the order of a forward."""
        streamer, engine = self._streamer, self._streamer.engine
        order = [visit.block for visit in engine.plan.sequences["forward"].visits]
        engine.begin_step("forward")
        for block in dict.fromkeys([*order, *range(len(engine.recipes))]):
            slot = engine.enter(block, Direction.FORWARD)
            assert streamer.method is not None
            streamer.method.refresh(block, slot)
            yield block, slot
        engine.leave()

    def close(self) -> None:
        """Gives the drive its space back. The model can't be read afterwards."""
        if self._fd is not None:
            # Not closed: blocks are read and written by a path of the descriptor, which must not become another file's.
            os.ftruncate(self._fd, 0)
            self._fd = None


def _places(recipes: tuple[BlockRecipe, ...]) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of each block in the file, both aligned for direct reads."""
    offset = 0
    for recipe in recipes:
        num_bytes = -(-recipe.slot_bytes // MIN_ALIGNMENT) * MIN_ALIGNMENT
        yield offset, num_bytes
        offset += num_bytes


def _recipe(
    recipe: BlockRecipe, path: Path, offset: int, num_bytes: int, *, on_device: bool
) -> BlockRecipe:
    """How the block is read from its place: straight into a slot, on a device by way of a buffer."""
    copies = (
        [Copy(source=view, target=i) for i, view in enumerate(recipe.tensors)] if on_device else []
    )
    return BlockRecipe(
        name=recipe.name,
        extents=(Extent(path, offset, num_bytes, 0),),
        file_bytes=num_bytes,
        tensors=recipe.tensors,
        copies=tuple(copies),
        slot_bytes=recipe.slot_bytes if on_device else num_bytes,
        is_ours=True,
        unpacking=recipe.unpacking,
    )


def _reserve(fd: int, num_bytes: int, folder: Path) -> None:
    """Gives the file all its room: a full drive is an error before the first block."""
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        why = no_room(num_bytes, "a working copy of the weights", folder, error)
        raise WorkingCopyError(f"{why} or set zo_fold_steps: never.") from error
