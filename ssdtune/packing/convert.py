"""Packs a model: reads its blocks one after the other, and writes a new folder, shard by shard."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ssdtune.kernels import lossless
from ssdtune.kernels.affine import Affine
from ssdtune.kernels.checksum import checksum
from ssdtune.kernels.formats import Format
from ssdtune.kernels.lossless import Lossless
from ssdtune.kernels.nibbles import Nibbles, Nvfp4
from ssdtune.kernels.quantize import quantize_affine, quantize_nibbles, quantize_nvfp4
from ssdtune.kernels.rotated import Rotated
from ssdtune.packing.layout import Group, PackError, file_parts, shards, stages
from ssdtune.packing.reading import GroupReader
from ssdtune.packing.shards import PARTIAL, ShardWriter, data_offset
from ssdtune.sizes import format_size
from ssdtune.swap.beside import copy_beside
from ssdtune.swap.header import CheckpointError, TensorEntry, read_header
from ssdtune.swap.pack_header import METADATA_KEY, METHOD, version_of, written_format
from ssdtune.swap.readers import ReaderPool
from ssdtune.swap.source import INDEX_FILE, Checkpoint
from ssdtune.swap.storage import Storage
from ssdtune.visit.build import MetaModel

MARKER = ".packing.json"  # in a folder that is not finished
KEY = "ssdtune.source"  # in a shard's header: of what it was made
KEY_DIGITS = 64
MAX_OFFSET = 10**15
Encoded = tuple[Format, Mapping[str, torch.Tensor]]
Encoder = Callable[[str, torch.Tensor, Format], Encoded | None]  # name, values, the format wanted


@dataclasses.dataclass(frozen=True, slots=True)
class Packed:
    """What was written. num_weights: elements of all tensors; num_packed: of those that were packed."""

    num_bytes: int
    source_bytes: int
    num_weights: int
    num_packed: int

    @property
    def bits_per_weight(self) -> float:
        """Over the whole model, scales and headers counted."""
        return 8 * self.num_bytes / max(self.num_weights, 1)


def pack(
    meta: MetaModel,
    groups: Sequence[Group],
    out: Path,
    *,
    storage: Storage,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
    encode: Encoder | None = None,
) -> Packed:
    """Writes the packed model to `out`, a new folder or one that the same packing left unfinished.

    on_progress: told how many bytes of the source are done. encode: makes the parts; the quantizers here by default.
    Memory: two groups, and one as it is written. Raises SSDTuneError, before a byte is written where the disk has no
    room for all.
    """
    files = list(shards(groups))
    key = key_of(meta.checkpoint, groups)
    done = _begin(out, key, files, meta.checkpoint)
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    with ReaderPool(storage) as pool:
        reader = GroupReader(pool, storage.alignment)
        encode = encode or encoded
        for name, shard in zip(names, files, strict=True):
            if name not in done:
                _write_shard(out / name, shard, reader, key, encode, on_progress)
            else:
                on_progress(sum(t.num_bytes for g in shard for t in g.tensors))
    meta.checkpoint.check_unchanged()
    version = version_of(written_format(f) for g in groups for f in g.formats.values())
    _finish(out, names, meta.checkpoint.folder, version)
    entries = [t for g in groups for t in g.tensors]
    return Packed(
        num_bytes=sum((out / name).stat().st_size for name in names),
        source_bytes=sum(t.num_bytes for t in entries),
        num_weights=sum(math.prod(t.shape) for t in entries),
        num_packed=sum(
            math.prod(t.shape) for g in groups for t in g.tensors if t.name in g.formats
        ),
    )


# ------------------------------------------------------------------ the folder


def key_of(checkpoint: Checkpoint, groups: Sequence[Group]) -> str:
    """A hash of what is packed and how. A hex digest."""
    digest = hashlib.sha256(checkpoint.fingerprint().encode())
    for group in groups:
        formats = {name: written_format(f) for name, f in group.formats.items()}
        told = [group.label, [t.name for t in group.tensors], formats]
        digest.update(json.dumps(told, sort_keys=True).encode())
    return digest.hexdigest()


def is_packed_as(out: Path, checkpoint: Checkpoint, groups: Sequence[Group]) -> bool:
    """Whether the folder is the finished packing of these groups."""
    if not (out / "config.json").is_file():
        return False
    key, found = key_of(checkpoint, groups), sorted(out.glob("*.safetensors"))
    return bool(found) and all(_is_whole(path, key) for path in found)


def _begin(out: Path, key: str, files: list[list[Group]], checkpoint: Checkpoint) -> set[str]:
    """Makes the folder, or finds which shards of it are whole. Raises PackError."""
    if out.exists() and not out.is_dir():
        raise PackError(f"{out} is a file.\nGive a folder that is not there yet.")
    present = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if present and _marked(out) != key:
        what = "an unfinished packing of another kind" if MARKER in present else "other files"
        what = "a model already" if "config.json" in present else what
        raise PackError(f"{out} holds {what}.\nGive a folder that is not there yet, or remove it.")
    done = {
        name for name in present if name.endswith(".safetensors") and _is_whole(out / name, key)
    }
    needed = sum(group.num_bytes for shard in files for group in shard)
    needed -= sum((out / name).stat().st_size for name in done)
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if needed > free:
        if not present:
            out.rmdir()
        raise PackError(
            f"{out}: the packed model takes {format_size(needed)} more, {format_size(free)} are free: "
            f"{format_size(needed - free)} are missing. Nothing was written.\n"
            f"Free them, pack to fewer bits, or give --out on another drive."
        )
    (out / MARKER).write_text(json.dumps({"key": key, "source": str(checkpoint.folder)}) + "\n")
    return done


def _marked(out: Path) -> str | None:
    """The key of the packing that was begun in the folder."""
    try:
        return json.loads((out / MARKER).read_text())["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_whole(path: Path, key: str) -> bool:
    try:
        return read_header(path)[0].metadata.get(KEY) == key
    except CheckpointError:
        return False


def _finish(out: Path, names: Sequence[str], source: Path, version: int) -> None:
    """Writes what lies beside the shards; config.json, without which the folder is no model, last. version: the newest
    of the shards'."""
    places: dict[str, str] = {}
    total = 0
    for name in names:
        _, entries = read_header(out / name)
        places |= dict.fromkeys(entries, name)
        total += sum(entry.num_bytes for entry in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (out / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")
    for left in out.glob(f"*{PARTIAL}"):
        left.unlink()
    told = {"quant_method": METHOD, "version": version, "source": str(source.absolute())}
    copy_beside(source, out, quantization=told)
    (out / MARKER).unlink()


# ------------------------------------------------------------------ one shard


def _write_shard(
    path: Path,
    shard: Sequence[Group],
    reader: GroupReader,
    key: str,
    encode: Encoder,
    on_progress: Callable[[int], None],
) -> None:
    described: dict[str, Any] = {}
    formats: list[Any] = []
    with ShardWriter(path, _json_bytes(shard)) as writer:
        for group, values in reader.read(shard):
            described |= _write_group(writer, group, values, formats, encode)
            on_progress(sum(t.num_bytes for t in group.tensors))
        writer.finish(_metadata(key, formats, described))


def _metadata(key: str, formats: list[Any], described: Mapping[str, Any]) -> dict[str, str]:
    told = {"version": version_of(formats), "formats": formats, "tensors": described}
    return {"format": "pt", KEY: key, METADATA_KEY: json.dumps(told, separators=(",", ":"))}


def _write_group(
    writer: ShardWriter,
    group: Group,
    values: Mapping[str, torch.Tensor],
    formats: list[Any],
    encode: Encoder,
) -> dict[str, Any]:
    """Writes a group: what is not packed, then the packed parts, the narrowest reading's first. What the header has to
    say of the packed ones."""
    packed: dict[str, Encoded] = {}
    for entry in group.tensors:
        made = None
        if entry.name in group.formats:
            made = encode(entry.name, values[entry.name], group.formats[entry.name])
        if made is None:
            writer.add(entry.name, entry.dtype, values[entry.name])
        else:
            packed[entry.name] = made
    shapes = {entry.name: entry.shape for entry in group.tensors}
    ordered = {name: stages(f, shapes[name]) for name, (f, _) in packed.items()}
    for number in range(max((len(s) for s in ordered.values()), default=0)):
        for name, by_stage in ordered.items():
            for part in by_stage[number] if number < len(by_stage) else ():
                writer.add(f"{name}.{part.suffix}", part.dtype, packed[name][1][part.suffix])
    return {
        entry.name: _described(entry, *packed[entry.name], formats)
        for entry in group.tensors
        if entry.name in packed
    }


def _described(
    entry: TensorEntry, format: Format, parts: Mapping[str, torch.Tensor], formats: list[Any]
) -> dict[str, Any]:
    """What the header says of a packed tensor. formats: those of the shard, which get its own if it is new."""
    written = written_format(format)
    if written not in formats:
        formats.append(written)
    return {
        "format": formats.index(written),
        "dtype": entry.dtype,
        "shape": list(entry.shape),
        "checksums": {suffix: _sum(part) for suffix, part in parts.items()},
    }


def _sum(part: torch.Tensor) -> str:
    return f"{checksum(part.contiguous().reshape(-1).view(torch.uint8)):016x}"


def encoded(name: str, values: torch.Tensor, format: Format) -> Encoded | None:
    """The parts of a tensor; None where packing it saves nothing. Raises PackError that names it."""
    if isinstance(format, Lossless):
        made = lossless.encode(values, format.bits)
        if made is None:
            return None
        found, parts = made
        suffixes = (part.suffix for part in found.parts(tuple(values.shape)))
        return found, dict(zip(suffixes, parts, strict=True))
    try:
        if isinstance(format, Affine):
            return format, quantize_affine(
                values, format.order, format.group, is_nested=format.is_nested
            )
        if isinstance(format, Rotated):
            stored = format.stored
            return format, quantize_affine(
                values, stored.order, stored.group, is_nested=stored.is_nested, is_rotated=True
            )
        if isinstance(format, Nvfp4):
            return format, quantize_nvfp4(values, format.num_stored)
        assert isinstance(format, Nibbles)
        return format, quantize_nibbles(values, format.table, format.block, format.scale)
    except ValueError as error:
        raise PackError(f"{name} can't be packed: {error}") from error


def header_bytes(shard: Sequence[Group]) -> int:
    """What a shard takes beside its tensors."""
    return data_offset(_json_bytes(shard))


def _json_bytes(shard: Sequence[Group]) -> int:
    """Enough for the header: its length with the longest numbers there can be."""
    tensors: dict[str, Any] = {}
    described: dict[str, Any] = {}
    formats: list[Any] = []
    for group in shard:
        for entry in group.tensors:
            longest = {"shape": list(entry.shape), "data_offsets": [MAX_OFFSET, MAX_OFFSET]}
            if entry.name not in group.formats:
                tensors[entry.name] = {"dtype": entry.dtype, **longest}
                continue
            format = group.formats[entry.name]
            parts = file_parts(format, entry.shape)
            for part in parts:
                shape = {"shape": list(part.shape)}
                tensors[f"{entry.name}.{part.suffix}"] = {"dtype": part.dtype, **longest, **shape}
            formats.append(written_format(format))
            checksums = {part.suffix: "0" * 16 for part in parts}
            described[entry.name] = {"format": len(formats), "checksums": checksums, **longest}
    told = {"__metadata__": _metadata("0" * KEY_DIGITS, formats, described), **tensors}
    return len(json.dumps(told, separators=(",", ":")).encode()) + 4096
