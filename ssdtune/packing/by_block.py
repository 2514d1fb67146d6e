"""Another width for each block of one bit-nested file: which widths are best, and the model read so.

Chosen are the widths with the least sum of the tensors' relative squared errors, each weighted by its number of weights
(as `mixed.py` does, which says why), within the average. A block is the smallest unit, since it is read as one. Errors
are those of a sample: of the source's weights, encoded as packing would; of a packed file, against all its bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

from ssdtune.kernels.affine import Affine
from ssdtune.kernels.nibbles import Nibbles
from ssdtune.packing.choice import Option, choose
from ssdtune.packing.errors import errors_by_width, rounded, widths_read
from ssdtune.packing.layout import PackError, groups_of, imagined, tensors_by_block
from ssdtune.packing.sample import sample_of
from ssdtune.packing.squares import Squares
from ssdtune.packing.wanted import Wanted
from ssdtune.packing.widths import widths_of, written
from ssdtune.schedule.job import ALL_BITS, WEIGHTS
from ssdtune.swap import pack_header
from ssdtune.swap.packed import PackedEntry, affine_of
from ssdtune.swap.source import Checkpoint, open_checkpoint
from ssdtune.visit.build import MetaModel

# ------------------------------------------------------------------ a file that can be read at several widths


@dataclasses.dataclass(frozen=True)
class NestedFile:
    """A packed model of nested codes, or one that would be packed, of one width too.

    Attributes:
        at: the model's tensors, read at so many bits.
        widths: that all of it can be read at, ascending.
        reference: what errors are to. errors: of tensors, by their names, each: width -> relative squared error, by a
            sample. None: there are headers alone.
    """

    at: Callable[[int], Checkpoint]
    widths: tuple[int, ...]
    reference: str
    errors: Callable[[Sequence[str]], Sequence[Mapping[int, float]]] | None


def packed_file(meta: MetaModel) -> NestedFile:
    """That of a packed model. Raises PackError where its codes have one width alone, or tensors have different ones."""
    entries = meta.checkpoint.tensors.values()
    formats = {affine_of(e.format) for e in entries if isinstance(e, PackedEntry)}
    readings = {() if f is None else f.readings for f in formats}
    if len(readings) != 1 or len(widths := readings.pop()) < 2:
        raise PackError(
            f"{meta.folder} is not packed in nested codes of one kind: blocks can't be read in widths of their own.\n"
            "Pack the model by `ssdtune pack --bits 8 --order 4,1,1,2`, or give the one that it was made from."
        )
    raw = open_checkpoint(meta.folder)

    @functools.cache
    def at(bits: int) -> Checkpoint:
        return pack_header.unpacked(raw, bits=bits)

    def errors(names: Sequence[str]) -> list[dict[int, float]]:
        return [_stored_errors({bits: at(bits) for bits in widths}, name) for name in names]

    return NestedFile(at, widths, ALL_BITS, errors)


def file_to_be(meta: MetaModel, quantization: str) -> NestedFile:
    """What packing a plain model for this value of the key would make."""
    format = Wanted.of(quantization).chosen()
    assert isinstance(format, Affine | Nibbles)
    groups = groups_of(meta, format)

    @functools.cache
    def at(bits: int) -> Checkpoint:
        return imagined(meta.checkpoint, groups, bits=bits)

    def errors(names: Sequence[str]) -> list[dict[int, float]]:
        samples = [sample_of(meta.checkpoint.tensors[name]) for name in names]
        try:
            return errors_by_width(samples, format)
        except ValueError as error:
            raise PackError(f"a weight of {names[0]}, … can't be packed: {error}") from error

    return NestedFile(at, widths_read(format), WEIGHTS, errors)


def _stored_errors(read: Mapping[int, Checkpoint], name: str) -> dict[int, float]:
    """To what all bits say: the weights that were packed are not there."""
    samples = {bits: sample_of(checkpoint.tensors[name]) for bits, checkpoint in read.items()}
    whole = samples[max(samples)]
    return {bits: Squares.of(found, whole).relative for bits, found in samples.items()}


# ------------------------------------------------------------------ which block is read in how many bits


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A block that holds nested weights.

    Attributes:
        place: among all blocks of the model. names: of its nested tensors.
        numel: of their weights. lost: width -> sum over tensors of numel times relative squared error; empty where
            errors are not known.
    """

    place: int
    names: tuple[str, ...]
    numel: int
    lost: Mapping[int, float]


def blocks_of(meta: MetaModel, file: NestedFile) -> list[Block]:
    """The model's blocks that hold nested weights, in order. meta: the model, plain or packed. Where errors are to be
    had, a sample of every tensor is read, and encoded where the file is yet to be made."""
    tensors = file.at(file.widths[-1]).tensors
    blocks: list[Block] = []
    for place, (_, names) in enumerate(tensors_by_block(meta)):
        nested = tuple(name for name in names if isinstance(tensors[name], PackedEntry))
        if nested:
            sizes = {name: math.prod(tensors[name].shape) for name in nested}
            blocks.append(Block(place, nested, sum(sizes.values()), _lost(file, sizes)))
    return blocks


def _lost(file: NestedFile, sizes: Mapping[str, int]) -> dict[int, float]:
    """As `Block` has it. sizes: weights of each of its tensors."""
    lost = dict.fromkeys(file.widths, 0.0)
    if file.errors is None:
        return {}
    for numel, errors in zip(sizes.values(), file.errors([*sizes]), strict=True):
        for bits in file.widths:
            lost[bits] += numel * rounded(errors[bits])
    return lost


def best_widths(blocks: Sequence[Block], mean: float) -> list[int]:
    """Of each block, those with the least error whose average over weights is `mean` at most. Raises PackError for an
    average below the narrowest."""
    widths = sorted(blocks[0].lost)
    if mean < widths[0]:
        raise PackError(
            f"quantization: {mean:g}/8: {widths[0]} bits are the least that all blocks can be read in.\n"
            f"Give {widths[0]} to {widths[-1]} bits, with /8 behind."
        )
    options = [[Option(b.numel * bits, b.lost[bits]) for bits in widths] for b in blocks]
    if not any(option.error for each in options for option in each):
        # Weights that are zeros are those of a header alone (`visit/outline.py`): what is planned for has the average.
        options = [
            [Option(b.numel * bits, b.numel * 4.0**-bits) for bits in widths] for b in blocks
        ]
    budget = int(mean * sum(block.numel for block in blocks))
    return [widths[i] for i in choose(options, budget)]


def mean_bits(blocks: Sequence[Block], widths: Sequence[int]) -> float:
    """Bits a weight, scales left out."""
    total = sum(block.numel for block in blocks)
    return sum(b.numel * bits for b, bits in zip(blocks, widths, strict=True)) / total


def error_of(blocks: Sequence[Block], widths: Sequence[int]) -> float:
    """The tensors' relative squared error, on average over weights."""
    lost = sum(block.lost[bits] for block, bits in zip(blocks, widths, strict=True))
    return lost / sum(block.numel for block in blocks)


# ------------------------------------------------------------------ the model read so


@dataclasses.dataclass(frozen=True, slots=True)
class Listed:
    """An average, kept by widths of blocks. quantization: the key's value that lists them. error: as `error_of` has it, to
    `reference`. alike: the same of all blocks at one width, by width."""

    quantization: str
    error: float
    alike: Mapping[float, float]
    reference: str


def listed_best(meta: MetaModel, file: NestedFile, mean: float) -> Listed:
    """The best widths with that average at most. Raises PackError as `best_widths` does."""
    blocks = blocks_of(meta, file)
    widths = best_widths(blocks, mean)
    alike: dict[float, float] = {
        bits: error_of(blocks, [bits] * len(blocks)) for bits in file.widths
    }
    return Listed(written(widths), error_of(blocks, widths), alike, file.reference)


def read_by_block(meta: MetaModel, file: NestedFile, quantization: str) -> MetaModel:
    """The model with each block's tensors read in the bits that are listed for it. Raises PackError for another number
    of blocks, and for bits that the file can't be read at."""
    blocks = blocks_of(meta, dataclasses.replace(file, errors=None))
    widths = widths_of(quantization)
    if len(widths) != len(blocks):
        raise PackError(
            f"quantization: {quantization} lists {len(widths)} blocks; {meta.folder} has {len(blocks)} that hold packed "
            "weights.\nList bits for each of them, or give an average such as 4.5/8."
        )
    impossible = sorted(set(widths) - set(file.widths))
    if impossible:
        raise PackError(
            f"quantization: {quantization}: the file can't be read at {impossible[0]} bits, only at "
            f"{', '.join(map(str, file.widths))}.\nList some of these."
        )
    whole = file.at(file.widths[-1])
    tensors = dict(whole.tensors)
    for block, bits in zip(blocks, widths, strict=True):
        read = file.at(bits).tensors
        tensors |= {name: read[name] for name in block.names}
    return dataclasses.replace(meta, checkpoint=dataclasses.replace(whole, tensors=tensors))
