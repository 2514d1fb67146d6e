"""Which tensors of a model are packed, into which shards, and how many bytes that takes: known before any is read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from ssdtune.errors import SSDTuneError
from ssdtune.kernels.affine import Affine
from ssdtune.kernels.formats import Format, Part
from ssdtune.kernels.lossless import Lossless
from ssdtune.kernels.rotated import Rotated
from ssdtune.swap.header import DTYPE_BITS, TensorEntry
from ssdtune.swap.pack_header import PACKED_DTYPES
from ssdtune.swap.packed import PackedEntry
from ssdtune.swap.source import Checkpoint
from ssdtune.visit.blocks import find_points
from ssdtune.visit.build import MetaModel
from ssdtune.visit.draft import group_weights
from ssdtune.visit.placement import place

MIN_ELEMENTS = 4096  # of a tensor worth packing
MIN_ROW = 32  # elements of its last dimension: convolutions of a few taps stay as they are
# Names of a mixture's routers, and how many rows they have at most: an error there sends tokens to other experts, and they
# are less than a thousandth of the weights. A layer's own gate has far more rows, whatever its name.
ROUTERS = ("*.gate.*", "*.router.*", "*.shared_expert_gate.*")
MOST_EXPERTS = 1024
SHARD_BYTES = 4_000_000_000


class PackError(SSDTuneError):
    """A model that can't be packed, a folder that can't be written to, too little room."""


def unpackable(name: str, why: object) -> PackError:
    """What is raised where an encoder refuses a tensor's values."""
    return PackError(
        f"{name} can't be packed: {why}\n"
        f"Mend the model, or leave the tensor as it is: `ssdtune pack --keep '{name}'`."
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Tensors that are read together: a block's, or those outside blocks. formats: of those to be packed, by name."""

    label: str
    tensors: tuple[TensorEntry, ...]
    formats: Mapping[str, Format]

    @property
    def num_bytes(self) -> int:
        """Once written; escapes of what is packed without loss, which are known once it is packed, are not counted."""
        return sum(
            sum(part_bytes(p) for p in file_parts(self.formats[t.name], t.shape))
            if t.name in self.formats
            else t.num_bytes
            for t in self.tensors
        )

    @property
    def most_bytes(self) -> int:
        """The same at most: with many escapes a tensor is stored as it was."""
        known = {n: f for n, f in self.formats.items() if not isinstance(f, Lossless)}
        return dataclasses.replace(self, formats=known).num_bytes


def groups_of(meta: MetaModel, format: Format, *, keep: Sequence[str] = ()) -> list[Group]:
    """The model's file tensors, a group for each block and one for the rest; those of blocks that are worth it packed.

    keep: patterns (`*`, `?`) of names in the files that stay as they are. Raises PackError where nothing is left to be
    packed, for a pattern that keeps nothing, and for a GGUF file.
    """
    entries = _plain(meta.checkpoint)
    left = dict(entries)
    groups: list[Group] = []
    for label, names in tensors_by_block(meta):
        tensors = tuple(left.pop(name) for name in names)
        formats = {t.name: format for t in tensors if is_worth_packing(t, format)}
        groups.append(Group(label, tensors, formats))
    if not any(group.formats for group in groups):
        kinds = ", ".join(sorted({entry.dtype for entry in entries.values()}))
        way_out = "Matrices of F32, BF16 and F16 with 4,096 elements can be."
        if isinstance(format, Lossless):
            way_out = "Matrices of BF16 can be. Others are packed in fewer bits alone: --bits 8, for instance."
        raise PackError(
            f"{meta.folder} holds no tensor that can be packed as {format.label}: its weights are {kinds}.\n{way_out}"
        )
    groups = _without(groups, keep)
    rest = tuple(left.values())
    return [*groups, Group("outside blocks", rest, {})] if rest else groups


def _without(groups: Sequence[Group], keep: Sequence[str]) -> list[Group]:
    """The groups, of which what some pattern fits stays as it is."""
    names = [name for group in groups for name in group.formats]
    for pattern in keep:
        if not any(_fits(name, [pattern]) for name in names):
            raise PackError(
                f"--keep {pattern} fits no tensor that would be packed.\n"
                f"Give names as the files have them, such as {names[-1]}; * stands for anything."
            )
    if all(_fits(name, keep) for name in names):
        raise PackError(f"--keep {' '.join(keep)} leaves nothing to be packed.\nGive fewer names.")
    return [
        dataclasses.replace(
            group, formats={n: f for n, f in group.formats.items() if not _fits(n, keep)}
        )
        for group in groups
    ]


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def tensors_by_block(meta: MetaModel) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields each block's name and its file tensors', packed or not; one of several blocks is the first's."""
    placements = place(meta.model, meta.checkpoint.tensors)
    seen: set[str] = set()
    for block in group_weights(meta.model, find_points(meta.model)):
        placed = [placements[name] for name in block.parameters if name in placements]
        names = dict.fromkeys(piece.source for p in placed for piece in p.pieces)
        own = tuple(name for name in names if name not in seen)
        seen.update(own)
        yield block.label, own


def _plain(checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """The checkpoint's tensors, which must not be packed already."""
    if checkpoint.files[0].suffix == ".gguf":
        raise PackError(
            f"{checkpoint.files[0]} is a GGUF file, without the config.json and the tokenizer that packed weights need "
            "beside them.\nGive the model's folder in Hugging Face format; or a GGUF file of fewer bits, which is read in "
            "place."
        )
    for entry in checkpoint.tensors.values():
        if not isinstance(entry, TensorEntry):
            raise PackError(
                f"{checkpoint.folder} is packed or quantized already ({entry.name}: {entry.format.label}).\n"
                "Give the model that it was made from."
            )
    return {n: e for n, e in checkpoint.tensors.items() if isinstance(e, TensorEntry)}


def is_worth_packing(entry: TensorEntry, format: Format) -> bool:
    """Matrices and stacks of them; not norms, biases and the taps of convolutions, nor routers, where bits are lost."""
    is_lossless = isinstance(format, Lossless)
    return (
        entry.dtype in (("BF16",) if is_lossless else PACKED_DTYPES)
        and len(entry.shape) >= 2
        and entry.shape[-1] >= MIN_ROW
        and math.prod(entry.shape) >= MIN_ELEMENTS
        and (is_lossless or not _is_router(entry))
    )


def _is_router(entry: TensorEntry) -> bool:
    return min(entry.shape) <= MOST_EXPERTS and _fits(entry.name, ROUTERS)


def file_parts(format: Format, shape: tuple[int, ...]) -> list[Part]:
    """All parts that the file holds of a tensor: those of narrower readings too, in the order in which they lie."""
    return [part for stage in stages(format, shape) for part in stage]


def stages(format: Format, shape: tuple[int, ...]) -> list[list[Part]]:
    """The parts by the reading that needs them first, the narrowest first: what k bits need lies before the rest."""
    affine = format.stored if isinstance(format, Rotated) else format
    if not isinstance(affine, Affine):
        return [list(format.parts(shape))]
    made: list[list[Part]] = []
    num_before = 0
    for bits in affine.readings:
        *slices, scales, zeros = dataclasses.replace(affine, bits=bits).parts(shape)
        made.append([scales, zeros, *slices[num_before:]])
        num_before = len(slices)
    return made


def part_bytes(part: Part) -> int:
    """Bytes of a part."""
    return math.prod(part.shape) * DTYPE_BITS[part.dtype] // 8


def shards(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Groups that share a file, in order; one larger than SHARD_BYTES has one of its own."""
    shard: list[Group] = []
    size = 0
    for group in groups:
        num_bytes = group.num_bytes
        if shard and size + num_bytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(group)
        size += num_bytes
    if shard:
        yield shard


def imagined(
    checkpoint: Checkpoint, groups: Sequence[Group], *, bits: int | None = None
) -> Checkpoint:
    """The checkpoint as it would be once packed, for plans: entries of a file that is not there, its tensors in the
    order in which they would lie. bits: to be read of nested codes; None: all."""
    path = checkpoint.folder / "packed.safetensors"
    tensors: dict[str, TensorEntry | PackedEntry] = {}
    end = 0
    for group in groups:
        placed: dict[str, TensorEntry] = {}
        for name, dtype, shape, num_bytes in _written(group):
            placed[name] = TensorEntry(name, path, dtype, shape, end, num_bytes)
            end += num_bytes
        for entry in group.tensors:
            if entry.name not in group.formats:
                tensors[entry.name] = placed[entry.name]
                continue
            format = read_at(group.formats[entry.name], bits)
            parts = tuple(placed[f"{entry.name}.{p.suffix}"] for p in format.parts(entry.shape))
            tensors[entry.name] = PackedEntry(
                entry.name, path, entry.dtype, entry.shape, format, parts
            )
    return dataclasses.replace(checkpoint, tensors=tensors)


def _written(group: Group) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Name, dtype, shape and bytes of all that the file holds of a group, as it lies."""
    for entry in group.tensors:
        if entry.name not in group.formats:
            yield entry.name, entry.dtype, entry.shape, entry.num_bytes
    ordered = [
        (e.name, stages(group.formats[e.name], e.shape))
        for e in group.tensors
        if e.name in group.formats
    ]
    for number in range(max((len(by_stage) for _, by_stage in ordered), default=0)):
        for name, by_stage in ordered:
            for part in by_stage[number] if number < len(by_stage) else ():
                yield f"{name}.{part.suffix}", part.dtype, part.shape, part_bytes(part)


def read_at(format: Format, bits: int | None) -> Format:
    """The format as it is read: the widest of its readings with at most so many bits, the narrowest where all have
    more; None: all."""
    if bits is None or not isinstance(format, Affine):
        return format
    readings = format.readings
    width = max((width for width in readings if width <= bits), default=readings[0])
    return dataclasses.replace(format, bits=width)
