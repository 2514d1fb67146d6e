"""In how many bits a model may be read, for `quantization: auto`: what blocks are then, from headers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from ssdtune.kernels.affine import Affine
from ssdtune.kernels.formats import Format
from ssdtune.packing.layout import PackError, groups_of
from ssdtune.packing.once import NONE, folder_of, planned
from ssdtune.packing.wanted import Wanted, bits_of
from ssdtune.schedule.job import Reading
from ssdtune.swap.header import DTYPE_BITS
from ssdtune.swap.packed import PackedEntry
from ssdtune.visit.build import MetaModel
from ssdtune.visit.draft import Options, draft

# The widths that two nested files can be read at; the first file serves five of them.
PACKINGS = ("8", "6/8", "5/8", "4/8", "3/8", "2/8")


def readings_of(
    meta: MetaModel, options: Options, beside: Path | None, reopen: Callable[[int], MetaModel]
) -> tuple[Reading, ...]:
    """The possible ones, the most bits first: as stored, and packed; or the widths that packed files have.

    beside: as for `build_packed`. reopen: the model, which is packed, read at so many bits. What others quantized is
    read as it is.
    """
    entries = meta.checkpoint.tensors.values()
    formats = {e.format for e in entries if isinstance(e, PackedEntry)}
    if formats:
        return _of_packed(meta, options, formats, reopen)
    largest = max(entries, key=lambda entry: entry.num_bytes)
    stored = _reading(meta, options, NONE, DTYPE_BITS[largest.dtype])
    try:
        return stored, *(_of_plain(meta, options, each, beside) for each in PACKINGS)
    except PackError:  # nothing in it can be packed
        return (stored,)


def _of_plain(meta: MetaModel, options: Options, quantization: str, beside: Path | None) -> Reading:
    groups = groups_of(meta, Wanted.of(quantization).chosen())
    bits = bits_of(quantization)
    assert bits is not None
    return dataclasses.replace(
        _reading(planned(meta, quantization), options, quantization, bits),
        packed_bytes=sum(group.num_bytes for group in groups),
        folder=str(folder_of(meta, quantization, beside)),
    )


def _of_packed(
    meta: MetaModel,
    options: Options,
    formats: set[Format],
    reopen: Callable[[int], MetaModel],
) -> tuple[Reading, ...]:
    """A packed model's own widths; as it is where it has none to choose from."""
    widths = {bits for f in formats if isinstance(f, Affine) for bits in f.readings}
    is_nested = all(isinstance(f, Affine) and f.is_nested for f in formats)
    if not is_nested or len(widths) < 2:
        return (_reading(meta, options, NONE, max(widths, default=4)),)
    return tuple(
        dataclasses.replace(
            _reading(reopen(bits), options, str(bits), bits), folder=str(meta.folder)
        )
        for bits in sorted(widths, reverse=True)
    )


def _reading(meta: MetaModel, options: Options, quantization: str, bits: int) -> Reading:
    blocks = draft(meta, options).replanner.request.blocks
    return Reading(quantization=quantization, bits=bits, blocks=blocks)
