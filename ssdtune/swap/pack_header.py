"""What the headers of a folder that `ssdtune pack` wrote say of its tensors.

docs/format.md is the specification. A shard says in its own header, under METADATA_KEY, what its tensors stand for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ssdtune.kernels import nibbles
from ssdtune.kernels.affine import GROUPS, SLICE_WIDTHS, Affine
from ssdtune.kernels.float8 import ScaledBytes
from ssdtune.kernels.formats import Format
from ssdtune.kernels.lossless import Lossless
from ssdtune.kernels.nibbles import Nibbles, Nvfp4
from ssdtune.kernels.rotated import Rotated
from ssdtune.swap.header import FileState, TensorEntry, is_counts, quoted, refuse
from ssdtune.swap.packed import PackedEntry
from ssdtune.swap.source import Checkpoint

METHOD: Final = "ssdtune"  # quantization_config's quant_method in config.json
METADATA_KEY: Final = "ssdtune.packed"
SOURCE_KEY: Final = "ssdtune.source"  # a hash of what a shard was made of, and how
VERSION: Final = 3  # the newest that is read
ROTATED: Final = "rotated affine"
NVFP4: Final = "nvfp4"
FP8: Final = "fp8"
SINCE: Final = {NVFP4: 2, FP8: 3}  # the version that a kind came with, where that is not the first
# The scale of all fills a cache line, so that what lies behind it still begins on one.
OWN_NVFP4: Final = Nvfp4(is_divided=False, num_stored=16)
OWN_FP8: Final = ScaledBytes((128, 128))
PACKED_DTYPES: Final = ("F32", "BF16", "F16")  # of what can be packed
TABLES: Final = {"nf4": nibbles.NF4, "fp4": nibbles.E2M1}


def written_format(format: Format) -> dict[str, Any]:
    """A format as a shard's header has it."""
    if isinstance(format, Affine):
        written = {"kind": "affine", "order": list(format.order), "group": format.group}
        return written if format.is_nested else {**written, "nested": False}
    if isinstance(format, Rotated):
        return {**written_format(format.stored), "kind": ROTATED}
    if format == OWN_NVFP4:
        return {"kind": NVFP4}
    if format == OWN_FP8:
        return {"kind": FP8}
    if isinstance(format, Nibbles):
        kind = next(name for name, table in TABLES.items() if table == format.table)
        return {"kind": kind, "block": format.block, "scale": format.scale}
    if isinstance(format, Lossless):
        return {"kind": "lossless", "bits": format.bits, "escapes": format.num_escapes}
    raise TypeError(format)


def version_of(formats: Iterable[Mapping[str, Any]]) -> int:
    """The least version that a reader must know. formats: as `written_format` has them."""
    return max((SINCE.get(format["kind"], 1) for format in formats), default=1)


def read_format(written: Mapping[str, Any], bits: int | None) -> Format:
    """The format that a header describes. bits: to be read of nested codes; None: all that are there.

    Raises ValueError that says what is wrong.
    """
    if not isinstance(written, Mapping):
        raise ValueError(f"a format is {quoted(written)}")
    kind = written.get("kind")
    if kind in ("affine", ROTATED):
        order, group = tuple(written["order"]), written["group"]
        is_nested = written.get("nested", True)
        if (
            not order
            or not set(order) <= set(SLICE_WIDTHS)
            or sum(order) > 8
            or group not in GROUPS
            or type(is_nested) is not bool
        ):
            raise ValueError(f"affine codes of order {order} in groups of {group}")
        whole = Affine(sum(order), order, group, is_nested)
        affine = dataclasses.replace(whole, bits=_readable(whole, bits))
        return Rotated(affine) if kind == ROTATED else affine
    if kind in TABLES:
        block, scale = written["block"], written["scale"]
        is_block = type(block) is int and 1 <= block <= nibbles.LARGEST_BLOCK
        if not is_block or scale not in nibbles.SCALE_DTYPES:
            raise ValueError(f"{kind} in blocks of {block} with scales {scale}")
        return Nibbles(TABLES[kind], block, is_high_first=False, scale=scale)
    if kind == NVFP4:
        return OWN_NVFP4
    if kind == FP8:
        return OWN_FP8
    if kind == "lossless":
        width, num_escapes = written["bits"], written["escapes"]
        if width not in (3, 4) or type(num_escapes) is not int or not 0 <= num_escapes < 2**31:
            raise ValueError(f"lossless codes of {width} bits with {num_escapes} escapes")
        return Lossless(width, num_escapes)
    raise ValueError(f"unknown kind {quoted(kind)}")


def _readable(whole: Affine, bits: int | None) -> int:
    """The widest reading of at most so many bits; the narrowest there is where all are wider."""
    possible = whole.readings
    if bits is None:
        return possible[-1]
    return max((width for width in possible if width <= bits), default=possible[0])


def unpacked(checkpoint: Checkpoint, *, bits: int | None = None) -> Checkpoint:
    """The tensors that a packed folder stands for. bits: to be read of nested codes, at most; None: all.

    Raises CheckpointError for a newer version, for shards of several packings, and where header and parts contradict each
    other.
    """
    _check_one_packing(checkpoint.states)
    tensors: dict[str, TensorEntry | PackedEntry] = dict(checkpoint.tensors)
    for state in checkpoint.states:
        described = _described(state)
        for name, digits in described["plain"].items():
            tensors[name] = _plain(name, digits, checkpoint.tensors, state)
        for name, written in described["tensors"].items():
            entry = _entry(name, written, described["formats"], checkpoint.tensors, state, bits)
            tensors[name] = entry
            for suffix in written["checksums"]:
                tensors.pop(f"{name}.{suffix}", None)
    return dataclasses.replace(checkpoint, tensors=tensors)


def is_packed(checkpoint: Checkpoint) -> bool:
    """Whether a shard says so in its header, whatever config.json says."""
    return any(METADATA_KEY in state.metadata for state in checkpoint.states)


def _check_one_packing(states: Sequence[FileState]) -> None:
    """Refuses shards of several packings, such as one copied over another: each may be whole, the model is a mixture."""
    first: FileState | None = None
    for state in (s for s in states if SOURCE_KEY in s.metadata):
        first = first or state
        if state.metadata[SOURCE_KEY] != first.metadata[SOURCE_KEY]:
            refuse(
                state.path,
                f"it is of another packing than {quoted(first.path.name)}.",
                way_out="Copy all files of one packing into a folder of their own, or pack the model again.",
            )


def _described(state: FileState) -> Mapping[str, Any]:
    """What a shard's header says of its packed tensors."""
    text = state.metadata.get(METADATA_KEY)
    if text is None:
        return {"tensors": {}, "formats": [], "plain": {}}
    try:
        described = {"plain": {}, **json.loads(text)}  # which older files do not have
        version = described["version"]
        kinds = {"tensors": dict, "formats": list, "plain": dict}
        is_sound = all(isinstance(described[key], kind) for key, kind in kinds.items())
    except (ValueError, KeyError, TypeError) as error:
        refuse(state.path, f"its {METADATA_KEY} says nothing that can be read: {error!r}.")
    check_version(state.path, version)
    if not is_sound:
        refuse(state.path, f"its {METADATA_KEY} does not name tensors and formats.")
    return described


def check_version(path: Path, version: object) -> None:
    """Raises CheckpointError where a file says that it is packed in a version of the format that is not read."""
    if type(version) is not int or not 1 <= version <= VERSION:
        refuse(
            path,
            f"it is packed in version {quoted(version)} of the format; this ssdtune reads 1 to {VERSION}.",
            way_out="Install a newer ssdtune, or pack the model again.",
        )


def _plain(
    name: str,
    digits: object,
    tensors: Mapping[str, TensorEntry | PackedEntry],
    state: FileState,
) -> TensorEntry:
    """A tensor that is stored as it was, with its checksum."""
    found = tensors.get(name)
    if not isinstance(found, TensorEntry):
        refuse(state.path, "its header has a checksum of it, and no tensor.", tensor=name)
    try:
        return dataclasses.replace(found, checksum=int(str(digits), 16))
    except ValueError as error:
        refuse(state.path, f"its checksum makes no sense: {error!r}.", tensor=name)


def _entry(
    name: str,
    written: Mapping[str, Any],
    formats: list[Any],
    tensors: Mapping[str, TensorEntry | PackedEntry],
    state: FileState,
    bits: int | None,
) -> PackedEntry:
    try:
        number, shape, dtype = written["format"], written["shape"], written["dtype"]
        if type(number) is not int or number < 0 or not is_counts(shape):
            raise ValueError(f"format {quoted(number)}, shape {quoted(shape)}")
        if dtype not in PACKED_DTYPES:
            raise ValueError(f"dtype {quoted(dtype)}")
        format, shape = read_format(formats[number], bits), tuple(shape)
        wanted = format.parts(shape)
        checksums = [int(written["checksums"][part.suffix], 16) for part in wanted]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        refuse(state.path, f"its packing makes no sense: {error!r}.", tensor=name)
    parts: list[TensorEntry] = []
    for part, checksum in zip(wanted, checksums, strict=True):
        found = tensors.get(f"{name}.{part.suffix}")
        if not isinstance(found, TensorEntry):
            refuse(state.path, f"its part {part.suffix} is missing.", tensor=name)
        if (found.dtype, found.shape) != (part.dtype, part.shape):
            refuse(
                state.path,
                f"its part {part.suffix} is {found.dtype} {list(found.shape)}; "
                f"{format.label} of shape {list(shape)} needs {part.dtype} {list(part.shape)}.",
                tensor=name,
            )
        parts.append(dataclasses.replace(found, checksum=checksum))
    return PackedEntry(name, parts[0].path, dtype, shape, format, tuple(parts))
