"""Packs a model: reads its blocks one after the other, and writes a new folder, shard by shard."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ssdtune.durable import (
    LOCK_NAME,
    DurableError,
    lock_folder,
    make_folder,
    remove_abandoned,
    write_file_atomically,
)
from ssdtune.kernels.checksum import checksum
from ssdtune.kernels.formats import Format
from ssdtune.kernels.quantize_affine import encoder_of
from ssdtune.memory import nearest_folder
from ssdtune.packing.encoding import Encoder, all_encoded, encoded
from ssdtune.packing.layout import Group, PackError, file_parts, shards, stages
from ssdtune.packing.reading import GroupReader
from ssdtune.packing.shards import PARTIAL, ShardError, ShardWriter, data_offset
from ssdtune.sizes import format_size
from ssdtune.swap.beside import bytes_beside, copy_beside
from ssdtune.swap.header import CheckpointError, TensorEntry, read_header
from ssdtune.swap.pack_header import (
    METADATA_KEY,
    METHOD,
    SOURCE_KEY,
    version_of,
    written_format,
)
from ssdtune.swap.readers import ReaderPool
from ssdtune.swap.source import INDEX_FILE, Checkpoint
from ssdtune.swap.storage import Storage
from ssdtune.visit.build import MetaModel

MARKER = ".packing.json"  # in a folder that is not finished
KEY_DIGITS = 64
MAX_OFFSET = 10**15
FULL = (errno.ENOSPC, errno.EDQUOT)
Note = Mapping[str, Any]  # JSON


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


def pack(  # noqa: PLR0913 - the last three have their defaults, and stand alone
    meta: MetaModel,
    groups: Sequence[Group],
    out: Path,
    *,
    storage: Storage,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
    encode: Encoder | None = None,
    note: Note | None = None,
) -> Packed:
    """Writes the packed model to `out`, a new folder or one that the same packing left unfinished.

    on_progress: told how many bytes of the source are done. encode: makes the parts; the quantizers here by default.
    note: what `noted` tells of the folder until it is finished. encode may be called on several threads, and the tensors
    of a group in any order. Memory: two groups, one as it is written, and the encoder's, 32 MB for each thread. Raises
    SSDTuneError, before a byte is written where the drive has no room for all,
    and where another process packs into the folder.
    """
    parted = list(shards(groups))
    files = {f"model-{i:05d}-of-{len(parted):05d}.safetensors": s for i, s in enumerate(parted, 1)}
    key = key_of(meta.checkpoint, groups)
    with _begun(out, key, files, meta.checkpoint, note or {}) as done:
        with ReaderPool(storage) as pool, _saying_what_is_missing(out, files):
            reader = GroupReader(pool, storage.alignment)
            encode = encode or encoded
            for name, shard in files.items():
                if name not in done:
                    _write_shard(out / name, shard, reader, key, encode, on_progress)
                else:
                    on_progress(sum(t.num_bytes for g in shard for t in g.tensors))
        meta.checkpoint.check_unchanged()
        version = version_of(written_format(f) for g in groups for f in g.formats.values())
        _finish(out, list(files), meta.checkpoint.folder, version)
    entries = [t for g in groups for t in g.tensors]
    return Packed(
        num_bytes=sum((out / name).stat().st_size for name in files),
        source_bytes=sum(t.num_bytes for t in entries),
        num_weights=sum(math.prod(t.shape) for t in entries),
        num_packed=sum(
            math.prod(t.shape) for g in groups for t in g.tensors if t.name in g.formats
        ),
    )


# ------------------------------------------------------------------ the folder


def key_of(checkpoint: Checkpoint, groups: Sequence[Group]) -> str:
    """A hash of what is packed and how, by which encoders too. A hex digest."""
    digest = hashlib.sha256(checkpoint.fingerprint().encode())
    for group in groups:
        formats = {name: _encoding(f) for name, f in group.formats.items()}
        told = [group.label, [t.name for t in group.tensors], formats]
        digest.update(json.dumps(told, sort_keys=True).encode())
    return digest.hexdigest()


def _encoding(format: Format) -> dict[str, Any]:
    """A format and, where it is not the first, its encoder's number."""
    number = encoder_of(format)
    return {**written_format(format), **({"encoder": number} if number > 1 else {})}


def is_packed_as(out: Path, checkpoint: Checkpoint, groups: Sequence[Group]) -> bool:
    """Whether the folder is the finished packing of these groups."""
    if not (out / "config.json").is_file():
        return False
    key, found = key_of(checkpoint, groups), sorted(out.glob("*.safetensors"))
    return bool(found) and all(_is_whole(path, key) for path in found)


@contextlib.contextmanager
def _begun(
    out: Path,
    key: str,
    files: Mapping[str, Sequence[Group]],
    checkpoint: Checkpoint,
    note: Note,
) -> Iterator[set[str]]:
    """Makes the folder, or finds which shards of it are whole; held against other processes, which would write under
    the same names. Raises PackError, and DurableError where nothing can be written there."""
    if out.exists() and not out.is_dir():
        raise PackError(f"{out} is a file.\nGive a folder that is not there yet.")
    is_new = not out.exists()
    if is_new:
        _check_room(out, files.values(), checkpoint)
        make_folder(out)
    _present(out, key)  # nothing is put into a folder of others
    with lock_folder(out):
        present = _present(out, key)  # another process may have had it until now
        _clear(out)
        done = {name for name in present if name in files and _is_whole(out / name, key)}
        if not is_new:
            missing = (shard for name, shard in files.items() if name not in done)
            _check_room(out, missing, checkpoint)
        told = {"key": key, "source": str(checkpoint.folder), "note": note}
        try:
            write_file_atomically(out / MARKER, (json.dumps(told) + "\n").encode())
        except DurableError:
            if is_new:  # what could be written of it is gone again
                with contextlib.suppress(OSError):
                    (out / LOCK_NAME).unlink()
                    out.rmdir()
            raise
        yield done


def _present(out: Path, key: str) -> set[str]:
    """Names of what a packing has left in the folder. Raises PackError where there is anything but this packing."""
    present = {path.name for path in out.iterdir()} - {LOCK_NAME}
    if present and _marker(out).get("key") != key:
        what = "other files"
        if MARKER in present:
            what = "an unfinished packing of another kind, or begun by another version of ssdtune"
        what = "a model already" if "config.json" in present else what
        raise PackError(f"{out} holds {what}.\nGive a folder that is not there yet, or remove it.")
    return present


def _check_room(out: Path, missing: Iterable[Sequence[Group]], checkpoint: Checkpoint) -> None:
    """Raises PackError where the drive has none for these shards and what lies beside them."""
    needed, free = most_bytes(missing) + bytes_beside(checkpoint.folder), _free(out)
    if needed > free:
        raise PackError(
            f"{out}: {_room(needed, free)}. Nothing was written.\n"
            f"Free them, pack to fewer bits, or give --out on another drive."
        )


def _clear(out: Path) -> None:
    """Removes what a packing that was killed has left half-written: it takes room."""
    for left in out.glob(f"*{PARTIAL}"):
        left.unlink()
    remove_abandoned(out)


def most_bytes(files: Iterable[Sequence[Group]]) -> int:
    """What such shards take at most, headers and their part of the index counted: its lines are shorter than theirs."""
    return sum(2 * header_bytes(shard) + sum(g.most_bytes for g in shard) for shard in files)


def _free(out: Path) -> int:
    """Bytes that are free where the folder is, or would be."""
    return shutil.disk_usage(nearest_folder(out)).free


def _room(needed: int, free: int) -> str:
    """In words."""
    told = f"the packed model takes up to {format_size(needed)} more, {format_size(free)} are free"
    return told + (f": {format_size(needed - free)} are missing" if needed > free else " now")


@contextlib.contextmanager
def _saying_what_is_missing(out: Path, files: Mapping[str, Sequence[Group]]) -> Iterator[None]:
    """Where the drive fills meanwhile, the ShardError says how much room the rest takes."""
    try:
        yield
    except ShardError as error:
        if getattr(error.__cause__, "errno", None) not in FULL:
            raise
        needed = most_bytes(shard for name, shard in files.items() if not (out / name).exists())
        raise ShardError(f"{error}\n{out}: {_room(needed, _free(out))}.") from error


def noted(out: Path) -> Note:
    """The note with which an unfinished packing of the folder was begun; empty where there is none."""
    found = _marker(out).get("note")
    return found if isinstance(found, dict) else {}


def _marker(out: Path) -> Mapping[str, Any]:
    """What was begun in the folder; empty where nothing was, or nobody can read it."""
    try:
        told = json.loads((out / MARKER).read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _is_whole(path: Path, key: str) -> bool:
    try:
        return read_header(path)[0].metadata.get(SOURCE_KEY) == key
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
    write_file_atomically(out / INDEX_FILE, (json.dumps(index, indent=1) + "\n").encode())
    told = {"quant_method": METHOD, "version": version, "source": str(source.absolute())}
    copy_beside(source, out, quantization=told)
    (out / MARKER).unlink()
    (out / LOCK_NAME).unlink()  # whoever has opened it meanwhile finds a model, and leaves it alone


# ------------------------------------------------------------------ one shard


def _write_shard(
    path: Path,
    shard: Sequence[Group],
    reader: GroupReader,
    key: str,
    encode: Encoder,
    on_progress: Callable[[int], None],
) -> None:
    told = _nothing_told()
    with ShardWriter(path, _json_bytes(shard)) as writer:
        for group, values in reader.read(shard):
            _write_group(writer, group, values, told, encode)
            on_progress(sum(t.num_bytes for t in group.tensors))
        writer.finish(_metadata(key, told))


def _nothing_told() -> dict[str, Any]:
    """What a shard's header says of no tensor yet."""
    return {"formats": [], "tensors": {}, "plain": {}}


def _metadata(key: str, told: Mapping[str, Any]) -> dict[str, str]:
    told = {"version": version_of(told["formats"]), **told}
    return {"format": "pt", SOURCE_KEY: key, METADATA_KEY: json.dumps(told, separators=(",", ":"))}


def _write_group(
    writer: ShardWriter,
    group: Group,
    values: Mapping[str, torch.Tensor],
    told: dict[str, Any],
    encode: Encoder,
) -> None:
    """Writes a group: what is not packed, then the packed parts, the narrowest reading's first. told: what the shard's
    header has to say, to which the group's tensors are added."""
    packed = all_encoded(group, values, encode)
    for entry in group.tensors:
        if entry.name not in packed:
            writer.add(entry.name, entry.dtype, values[entry.name])
            told["plain"][entry.name] = _sum(values[entry.name])
    shapes = {entry.name: entry.shape for entry in group.tensors}
    ordered = {name: stages(f, shapes[name]) for name, (f, _) in packed.items()}
    for number in range(max((len(s) for s in ordered.values()), default=0)):
        for name, by_stage in ordered.items():
            for part in by_stage[number] if number < len(by_stage) else ():
                writer.add(f"{name}.{part.suffix}", part.dtype, packed[name][1][part.suffix])
    for entry in group.tensors:
        if entry.name in packed:
            described = _described(entry, *packed[entry.name], told["formats"])
            told["tensors"][entry.name] = described


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


def header_bytes(shard: Sequence[Group]) -> int:
    """What a shard takes beside its tensors."""
    return data_offset(_json_bytes(shard))


def _json_bytes(shard: Sequence[Group]) -> int:
    """Enough for the header: its length with the longest numbers there can be."""
    tensors: dict[str, Any] = {}
    told = _nothing_told()
    for group in shard:
        for entry in group.tensors:
            longest = {"shape": list(entry.shape), "data_offsets": [MAX_OFFSET, MAX_OFFSET]}
            if entry.name not in group.formats:
                tensors[entry.name] = {"dtype": entry.dtype, **longest}
                told["plain"][entry.name] = "0" * 16
                continue
            format = group.formats[entry.name]
            parts = file_parts(format, entry.shape)
            for part in parts:
                shape = {"shape": list(part.shape)}
                tensors[f"{entry.name}.{part.suffix}"] = {"dtype": part.dtype, **longest, **shape}
            told["formats"].append(written_format(format))
            described = {"format": len(told["formats"]), **longest}
            described["checksums"] = {part.suffix: "0" * 16 for part in parts}
            told["tensors"][entry.name] = described
    header = {"__metadata__": _metadata("0" * KEY_DIGITS, told), **tensors}
    return len(json.dumps(header, separators=(",", ":")).encode()) + 4096
