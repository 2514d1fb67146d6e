"""From placements (what goes where) to recipes (how a block's bytes are read and copied)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from ssdtune.swap.header import TensorEntry
from ssdtune.swap.packed import PackedEntry
from ssdtune.swap.recipe import (
    SLOT_ALIGNMENT,
    BlockRecipe,
    Copy,
    PackedView,
    Summed,
    TensorView,
)
from ssdtune.swap.source import ExtentMap, merge_extents
from ssdtune.visit.placement import FILE_DTYPES, Piece, Placement, is_identity

MAX_GAP_BYTES = 256 * 1024  # a read of its own costs about what 256 KiB more cost at 2-7 GB/s
CACHE_LINE = 64


def make_recipe(
    name: str,
    placements: Sequence[Placement],
    entries: Mapping[str, TensorEntry | PackedEntry],
    *,
    alignment: int,
    on_device: bool,
) -> BlockRecipe:
    """How the block of these parameters is read: in place where all of them lie in the files as they are needed.

    On a device the bytes pass a buffer in any case, and every tensor starts on SLOT_ALIGNMENT.
    """
    sources = list(dict.fromkeys(piece.source for p in placements for piece in p.pieces))
    stored = [part for s in sources for part in _stored(entries[s])]
    where = merge_extents(stored, alignment=alignment, max_gap_bytes=MAX_GAP_BYTES)
    summed = tuple(_summed(stored, where))
    in_place = not on_device and all(_is_in_place(p, entries, where) for p in placements)
    if in_place:
        tensors = [_view(p, where.offsets[p.pieces[0].source]) for p in placements]
        return BlockRecipe(
            name=name,
            extents=where.extents,
            file_bytes=where.num_bytes,
            tensors=tuple(tensors),
            copies=(),
            slot_bytes=where.num_bytes,
            summed=summed,
        )
    tensors, slot_bytes = _packed(placements, entries, on_device=on_device)
    copies = [
        _copy(index, piece, entries[piece.source], where)
        for index, placement in enumerate(placements)
        for piece in placement.pieces
    ]
    return BlockRecipe(
        name=name,
        extents=where.extents,
        file_bytes=where.num_bytes,
        tensors=tuple(tensors),
        copies=tuple(copies),
        slot_bytes=slot_bytes,
        summed=summed,
    )


def _summed(stored: Sequence[TensorEntry], where: ExtentMap) -> Iterator[Summed]:
    """What has a checksum, of what is read; nothing is read of an empty tensor."""
    for entry in stored:
        if entry.checksum is not None and entry.num_bytes:
            yield Summed(
                name=entry.name,
                path=entry.path,
                offset=where.offsets[entry.name],
                num_bytes=entry.num_bytes,
                checksum=entry.checksum,
            )


def _stored(entry: TensorEntry | PackedEntry) -> tuple[TensorEntry, ...]:
    """What of it lies in files."""
    return entry.parts if isinstance(entry, PackedEntry) else (entry,)


def _is_in_place(
    placement: Placement, entries: Mapping[str, TensorEntry | PackedEntry], where: ExtentMap
) -> bool:
    if not is_identity(placement, entries):
        return False
    return where.offsets[placement.pieces[0].source] % placement.dtype.itemsize == 0


def _view(placement: Placement, offset: int) -> TensorView:
    return TensorView(
        name=placement.target, dtype=placement.dtype, shape=placement.shape, offset=offset
    )


def _packed(
    placements: Sequence[Placement],
    entries: Mapping[str, TensorEntry | PackedEntry],
    *,
    on_device: bool,
) -> tuple[list[TensorView], int]:
    """The parameters one after the other, aligned; and the bytes they take.

    On a CPU a parameter that is one file tensor keeps the file's offset modulo a cache line, which is where a
    memory-mapped load has it: matrix-vector products (a gate of one row) round differently by alignment.
    """
    tensors, offset = [], 0
    for placement in placements:
        entry = entries[placement.pieces[0].source]
        if not on_device and isinstance(entry, TensorEntry) and is_identity(placement, entries):
            wanted = entry.start % CACHE_LINE
            offset += (wanted - offset) % CACHE_LINE
        else:
            offset += -offset % SLOT_ALIGNMENT
        tensors.append(_view(placement, offset))
        offset += torch.Size(placement.shape).numel() * placement.dtype.itemsize
    return tensors, offset + -offset % SLOT_ALIGNMENT


def _copy(index: int, piece: Piece, entry: TensorEntry | PackedEntry, where: ExtentMap) -> Copy:
    return Copy(
        source=_packed_view(entry, where)
        if isinstance(entry, PackedEntry)
        else file_view(entry, where),
        target=index,
        source_slices=piece.source_slices,
        view=piece.view,
        permute=piece.permute,
        target_slices=piece.target_slices,
    )


def file_view(entry: TensorEntry, where: ExtentMap) -> TensorView:
    """A file tensor in the buffer that it is read into."""
    return TensorView(
        name=entry.name,
        dtype=FILE_DTYPES[entry.dtype],
        shape=tuple(entry.shape),
        offset=where.offsets[entry.name],
    )


def _packed_view(entry: PackedEntry, where: ExtentMap) -> PackedView:
    return PackedView(
        name=entry.name,
        shape=tuple(entry.shape),
        format=entry.format,
        parts=tuple(file_view(part, where) for part in entry.parts),
    )
