"""In how many bits a model may be read, for `quantization: auto`: what blocks are then, from headers alone; and, where a
file can be read at several widths, from a sample of its weights, which blocks are best read in more."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ssdtune.kernels.formats import Format
from ssdtune.packing.by_block import (
    Block,
    NestedFile,
    best_widths,
    blocks_of,
    error_of,
    file_to_be,
    mean_bits,
    packed_file,
)
from ssdtune.packing.layout import PackError, groups_of
from ssdtune.packing.once import NONE, folder_of
from ssdtune.packing.wanted import Wanted
from ssdtune.packing.widths import written
from ssdtune.schedule.job import Reading
from ssdtune.schedule.plan import BlockShape
from ssdtune.swap.header import DTYPE_BITS
from ssdtune.swap.packed import PackedEntry, affine_of
from ssdtune.visit.build import MetaModel
from ssdtune.visit.draft import Options, draft

# Two nested files, and the values of the key that read all of each at one width; 4 bits of all are the first's.
FILES: tuple[Mapping[int, str], ...] = (
    {8: "8", 6: "6/8", 5: "5/8", 4: "4/8"},
    {4: "4/8", 3: "3/8", 2: "2/8"},
)
BETWEEN = (0.75, 0.5, 0.25)  # of the way from one width to the next, for blocks of different ones


def readings_of(
    meta: MetaModel, options: Options, beside: Path | None, *, has_weights: bool
) -> tuple[Reading, ...]:
    """The possible ones, the most bits first: as stored, and packed; or the widths that packed files have.

    beside: as for `build_packed`. has_weights: whether the files are more than headers: else no block gets a width of
    its own, since nobody knows what it costs. What others quantized is read as it is.
    """
    entries = meta.checkpoint.tensors.values()
    formats = {e.format for e in entries if isinstance(e, PackedEntry)}
    if formats:
        return _of_packed(meta, options, formats, has_weights=has_weights)
    largest = max(entries, key=lambda entry: entry.num_bytes)
    stored = _as_it_is(meta, options, DTYPE_BITS[largest.dtype])
    try:
        found = [r for words in FILES for r in _of_plain(meta, options, words, beside, has_weights)]
    except PackError:  # nothing in it can be packed
        return (stored,)
    # Of both files' 4 bits those of the first.
    return stored, *_widest_first({r.bits: r for r in reversed(found)}.values())


def _widest_first(readings: Iterable[Reading]) -> list[Reading]:
    return sorted(readings, key=lambda reading: -reading.bits)


def _of_plain(
    meta: MetaModel,
    options: Options,
    words: Mapping[int, str],
    beside: Path | None,
    has_weights: bool,
) -> Iterator[Reading]:
    """Those of a file that would be packed. words: by bits, what the key calls them."""
    narrowest = words[min(words)]
    groups = groups_of(meta, Wanted.of(narrowest).chosen())
    like = Reading(
        quantization=NONE,
        bits=0,
        blocks=(),
        packed_bytes=sum(group.num_bytes for group in groups),
        folder=str(folder_of(meta, narrowest, beside)),
    )
    file = dataclasses.replace(file_to_be(meta, narrowest), widths=tuple(sorted(words)))
    yield from _of_file(meta, options, _known(file, has_weights), words, like)


def _of_packed(
    meta: MetaModel, options: Options, formats: set[Format], *, has_weights: bool
) -> tuple[Reading, ...]:
    """A packed model's own widths; as it is where it has none to choose from."""
    codes = [affine_of(format) for format in formats]
    widths = {() if affine is None else affine.readings for affine in codes}
    readings = widths.pop() if len(widths) == 1 else ()
    if len(readings) < 2:
        most = max((affine.bits for affine in codes if affine is not None), default=4)
        return (_as_it_is(meta, options, most),)
    like = Reading(quantization=NONE, bits=0, blocks=(), folder=str(meta.folder))
    words = {bits: str(bits) for bits in readings}
    file = _known(packed_file(meta), has_weights)
    return tuple(_widest_first(_of_file(meta, options, file, words, like)))


def _known(file: NestedFile, has_weights: bool) -> NestedFile:
    return file if has_weights else dataclasses.replace(file, errors=None)


def _of_file(
    meta: MetaModel, options: Options, file: NestedFile, words: Mapping[int, str], like: Reading
) -> Iterator[Reading]:
    """Readings of a nested file: all blocks at one width, then, where errors are known, blocks at several. like: what
    they have in common."""
    blocks = blocks_of(meta, file)
    alike: dict[int, Reading] = {}
    for bits in file.widths:
        read = dataclasses.replace(meta, checkpoint=file.at(bits))
        alike[bits] = dataclasses.replace(
            like,
            quantization=words[bits],
            bits=bits,
            blocks=_shapes(read, options),
            error=None if file.errors is None else error_of(blocks, [bits] * len(blocks)),
        )
        yield alike[bits]
    if file.errors is not None:
        yield from _mixed(blocks, alike, like)


def _mixed(
    blocks: Sequence[Block], alike: Mapping[int, Reading], like: Reading
) -> Iterator[Reading]:
    """Those between two widths. A block is read as it is where all have its width."""
    for low, high in itertools.pairwise(sorted(alike)):
        for share in BETWEEN:
            widths = best_widths(blocks, low + share * (high - low))
            if len(set(widths)) == 1:
                continue  # too few blocks to choose among
            shapes = list(alike[low].blocks)
            for block, bits in zip(blocks, widths, strict=True):
                shapes[block.place] = alike[bits].blocks[block.place]
            yield dataclasses.replace(
                like,
                quantization=written(widths),
                bits=round(mean_bits(blocks, widths), 3),
                blocks=tuple(shapes),
                error=error_of(blocks, widths),
                is_mixed=True,
            )


def _as_it_is(meta: MetaModel, options: Options, bits: int) -> Reading:
    return Reading(quantization=NONE, bits=bits, blocks=_shapes(meta, options))


def _shapes(meta: MetaModel, options: Options) -> tuple[BlockShape, ...]:
    return draft(meta, options).replanner.request.blocks
