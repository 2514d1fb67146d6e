"""In how many bits a model may be read, for `quantization: auto`: what blocks are then, from headers alone; and, where a
file can be read at several widths, from a sample of its weights, which blocks are best read in more. All bits in fewer
bytes, `lossless`, are one of the ways, and `nf4` for 4 bits, where that is better."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ssdtune.kernels.affine import Affine
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
from ssdtune.packing.once import NONE, folder_of, planned
from ssdtune.packing.wanted import LOSSLESS, Wanted
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
TABLE: Mapping[int, str] = {4: "nf4"}
# Of the loss that a squared error of affine codes costs, what one of the table's does: .59 on SmolLM2, .69 on MiniLM
# (`benchmarks/README.md`, "Packed weights").
TABLE_WORTH = 0.6
BETWEEN = (0.75, 0.5, 0.25)  # of the way from one width to the next, for blocks of different ones
LOSSLESS_BITS = 12.0  # without escapes, of which trained weights have few
LEAST_GAIN = 1.05  # of bytes over those without loss: less is nothing to pack for


def readings_of(
    meta: MetaModel,
    options: Options,
    beside: Path | None,
    *,
    has_weights: bool,
    formats: Collection[str] = (),
    ratio: float | None = None,
) -> tuple[Reading, ...]:
    """The possible ones, the most bits first: as stored, and packed; or the widths that packed files have.

    beside: as for `build_packed`. has_weights: whether the files are more than headers: else no block gets a width of
    its own, since nobody knows what it costs. formats: that may be packed besides affine codes. ratio: bytes of the
    weights over those of a lossless packing, measured; None: it was not. What others quantized is read as it is.
    """
    entries = meta.checkpoint.tensors.values()
    stored_as = {e.format for e in entries if isinstance(e, PackedEntry)}
    if stored_as:
        return _of_packed(meta, options, stored_as, has_weights=has_weights)
    largest = max(entries, key=lambda entry: entry.num_bytes)
    stored = _as_it_is(meta, options, DTYPE_BITS[largest.dtype])
    try:
        found = [r for words in FILES for r in _of_plain(meta, options, words, beside, has_weights)]
    except PackError:  # nothing in it can be packed
        return (stored,)
    if LOSSLESS in formats and largest.dtype == "BF16":
        found += _lossless(meta, options, beside, ratio)
    # Of both files' 4 bits those of the first.
    by_bits = {r.bits: r for r in reversed(found)}
    if TABLE[4] in formats:
        (table,) = _of_plain(meta, options, TABLE, beside, has_weights)
        if _loses_less(meta, table, by_bits[4]):
            by_bits[4] = table
    return stored, *_widest_first(_undominated([*by_bits.values()]))


def _undominated(readings: Sequence[Reading]) -> Iterator[Reading]:
    """Without mixed widths that lose no less than another reading and take no fewer bytes: a nested file has scales for
    each width, and those of narrower ones than a block's are read along."""
    for one in readings:
        is_worse = one.is_mixed and any(
            _cost(other) <= _cost(one) and _file_bytes(other) <= _file_bytes(one)
            for other in readings
            if other is not one
        )
        if not is_worse:
            yield one


def _cost(reading: Reading) -> float:
    """Its error, as one of affine codes."""
    if reading.error is None:
        return math.inf
    return reading.error * (TABLE_WORTH if reading.quantization in TABLE.values() else 1.0)


def _loses_less(meta: MetaModel, one: Reading, other: Reading) -> bool:
    """Whether it loses less for its bytes: a bit a weight more takes three quarters of an error away. Where errors are not
    known a table does than affine codes, as on both models that were measured (`benchmarks/README.md`)."""
    if one.error is None or other.error is None:
        return True
    bits, other_bits = (_stored_bits(planned(meta, r.quantization)) for r in (one, other))
    return _cost(one) * 4**bits < _cost(other) * 4**other_bits


def _stored_bits(meta: MetaModel) -> float:
    """That a packed weight takes, on average, scales counted."""
    packed = [e for e in meta.checkpoint.tensors.values() if isinstance(e, PackedEntry)]
    return 8 * sum(e.num_bytes for e in packed) / sum(math.prod(e.shape) for e in packed)


def _file_bytes(reading: Reading) -> int:
    return sum(block.file_bytes for block in reading.blocks)


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
    file = dataclasses.replace(file_to_be(meta, narrowest), widths=tuple(sorted(words)))
    like = _to_be(meta, narrowest, beside)
    yield from _of_file(meta, options, _known(file, has_weights), words, like)


def _to_be(meta: MetaModel, quantization: str, beside: Path | None) -> Reading:
    """What readings of a file that would be packed for this value of the key have in common."""
    format = Wanted.of(quantization).chosen()
    groups = groups_of(meta, format)
    return Reading(
        quantization=quantization,
        bits=0,
        blocks=(),
        packed_bytes=sum(group.num_bytes for group in groups),
        folder=str(folder_of(meta, quantization, beside)),
        label="" if isinstance(format, Affine) else format.label,
    )


def _lossless(
    meta: MetaModel, options: Options, beside: Path | None, ratio: float | None
) -> Iterator[Reading]:
    """All bits in fewer bytes, as many as `ratio` says; nothing where that is no gain."""
    bits = LOSSLESS_BITS if ratio is None else round(16 / ratio, 2)
    if LEAST_GAIN * bits > 16:
        return
    like, more = _to_be(meta, LOSSLESS, beside), bits / LOSSLESS_BITS
    yield dataclasses.replace(
        like,
        bits=bits,
        blocks=tuple(
            dataclasses.replace(block, file_bytes=round(more * block.file_bytes))
            for block in _shapes(planned(meta, LOSSLESS), options)
        ),
        packed_bytes=round(more * like.packed_bytes),
        is_exact=True,
    )


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
