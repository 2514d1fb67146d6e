"""Which safetensors files make up a model folder, and where every tensor's bytes lie in them.

The base weights are used in place, from the user's own files, so nothing may be taken on trust that
a later read depends on: each header is validated whole (header.py) before a single tensor is named
to anyone. Never writes, never follows a file name out of the folder, never runs pickle.

    checkpoint = open_checkpoint(folder)                     # TensorEntry by name, or CheckpointError
    layout = merge_extents(entries, alignment=4096, max_gap_bytes=1 << 20)
    pool.submit(layout.extents, buffer, label="layers.7")    # readers.py
    buffer[layout.offsets[name]:][:entry.num_bytes]          # the tensor's bytes, nothing copied
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol

from ssdtune.swap.header import (
    CheckpointError,
    FileState,
    TensorEntry,
    opened,
    parse_json,
    pread_exactly,
    printable,
    quoted,
    read_header,
    read_small,
    refuse,
)
from ssdtune.swap.packed import PackedEntry
from ssdtune.swap.storage import Extent

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"

MAX_TENSORS: Final = 1_000_000
MAX_INDEX_BYTES: Final = 100_000_000
SAMPLES_PER_FILE: Final = 16
SAMPLE_BYTES: Final = 4096
_SHARD_NAME: Final = re.compile(r"(?P<stem>.+)-(?P<idx>\d{1,9})-of-(?P<total>\d{1,9})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a model folder, by name; `files` are those that hold them."""

    folder: Path
    tensors: Mapping[str, TensorEntry | PackedEntry]
    files: tuple[Path, ...]
    states: tuple[FileState, ...] = field(default=(), repr=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data, headers not counted."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file's size or modification time is not what it was at open."""
        for state in self.states:
            try:
                now = os.stat(state.path)
            except OSError as error:
                raise _changed(
                    state.path, f"it can no longer be read ({error.strerror})"
                ) from error
            if now.st_size != state.num_bytes:
                raise _changed(state.path, f"{state.num_bytes:,} bytes then, {now.st_size:,} now")
            if now.st_mtime_ns != state.mtime_ns:
                raise _changed(state.path, "it was written to (its modification time differs)")

    def fingerprint(self) -> str:
        """A hex digest over file names, sizes, headers and 16 samples of 4 KiB from each file.

        Milliseconds, not a read of the model: it tells apart two models of the same shapes unless
        they agree in every sample. For "is this the base that the run started with?", not for
        integrity. Raises CheckpointError if a file is gone or shorter."""
        digest = hashlib.sha256()
        for state in sorted(self.states, key=lambda state: state.path.name):
            digest.update(f"{state.path.name}\0{state.num_bytes}\0{state.header_sha256}\0".encode())
            _update_with_samples(digest, state)
        return digest.hexdigest()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and validate the headers of a model folder; a few KiB are read per file.

    Looked for in this order, as transformers does: model.safetensors; the shards that
    model.safetensors.index.json names; else the other *.safetensors files, if it is plain which
    belong together. A tensor that a shard holds and the index does not name is kept.
    Raises CheckpointError for anything that does not hold together; nothing is then open."""
    folder = Path(folder).absolute()
    try:
        names, weight_map = _find_files(folder, sorted(os.listdir(folder)))
    except OSError as error:
        raise CheckpointError(
            f"no model folder at {printable(folder)}: {error.strerror}.\n"
            "Give a folder that holds config.json and *.safetensors files."
        ) from error
    states: list[FileState] = []
    by_file: dict[str, dict[str, TensorEntry]] = {}
    num_tensors = 0
    for name in names:
        path = folder / name
        _check_inside(folder, path)
        state, by_file[name] = read_header(path)
        states.append(state)
        num_tensors += len(by_file[name])
        if num_tensors > MAX_TENSORS:
            refuse(path, f"more than {MAX_TENSORS:,} tensors so far: no model has as many.")
    tensors = _merge(folder, by_file, weight_map)
    if not tensors:
        refuse(folder / names[0], "no tensor in it.")
    return Checkpoint(folder, tensors, tuple(folder / name for name in names), tuple(states))


# ---------------------------------------------------------------------------- from tensors to reads


class ByteRange(Protocol):
    """A TensorEntry, or anything that names bytes of a file, such as some rows of a tensor."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def start(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


@dataclass(frozen=True)
class ExtentMap:
    """The reads that bring some ranges into one buffer, and where each range then begins."""

    extents: tuple[Extent, ...]
    offsets: Mapping[str, int]  # range name -> byte offset in the buffer
    num_bytes: int  # of the buffer, a multiple of the alignment


def merge_extents(
    ranges: Iterable[ByteRange], *, alignment: int, max_gap_bytes: int = 0
) -> ExtentMap:
    """Cover byte ranges with few aligned extents, laid out in a buffer one after the other.

    Every extent starts and ends on `alignment` (a power of two; the last of a file may pass its
    end) and lands on an aligned buffer offset, so a byte keeps its offset modulo `alignment` and
    direct I/O needs no copy. Ranges less than `max_gap_bytes` apart share an extent: the gap is
    read and not used. Each page is read once, whatever overlaps. Order: by file, then by offset,
    so equal ranges give an equal layout. An empty range takes no bytes; its offset is 0."""
    assert alignment.bit_count() == 1, alignment
    ordered = sorted(ranges, key=lambda item: (str(item.path), item.start, item.num_bytes))
    extents: list[Extent] = []
    offsets: dict[str, int] = {}
    for item in ordered:
        assert item.name not in offsets, f"range {item.name} is asked for twice"
        if item.num_bytes == 0:
            offsets[item.name] = 0
            continue
        first = item.start // alignment * alignment
        last = extents[-1] if extents else None
        if (
            last is not None
            and last.path == item.path
            and first <= last.file_offset + last.num_bytes + max_gap_bytes
        ):
            extent = _extended(last, item.start + item.num_bytes, alignment)
            extents[-1] = extent
        else:
            buffer_offset = last.buffer_offset + last.num_bytes if last else 0
            empty = Extent(item.path, first, 0, buffer_offset, 0)
            extent = _extended(empty, item.start + item.num_bytes, alignment)
            extents.append(extent)
        offsets[item.name] = extent.buffer_offset + item.start - extent.file_offset
    num_bytes = extents[-1].buffer_offset + extents[-1].num_bytes if extents else 0
    return ExtentMap(tuple(extents), offsets, num_bytes)


def _extended(extent: Extent, stop: int, alignment: int) -> Extent:
    """The same extent, long enough to hold the file's bytes up to `stop`."""
    needed = max(extent.needed_bytes or 0, stop - extent.file_offset)
    num_bytes = -(-needed // alignment) * alignment
    return Extent(extent.path, extent.file_offset, num_bytes, extent.buffer_offset, needed)


# ---------------------------------------------------------------------------------- which files


def _find_files(folder: Path, names: Sequence[str]) -> tuple[list[str], Mapping[str, str] | None]:
    """The names of the files to read, and the index's weight_map where there is one.

    A dangling link counts as present: it is a download that was cut short, and must be said."""
    if SINGLE_FILE in names:
        return [SINGLE_FILE], None
    if INDEX_FILE in names:
        _check_inside(folder, folder / INDEX_FILE)
        weight_map = _read_index(folder / INDEX_FILE)
        return sorted(set(weight_map.values())), weight_map
    others = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    if "adapter_config.json" in names:
        others = [name for name in others if not name.startswith("adapter_model")]
    if not others:
        _refuse_other_formats(folder, names)
    return _complete_set(folder, others), None


def _complete_set(folder: Path, names: Sequence[str]) -> list[str]:
    """Of files that no index explains: the one set of numbered shards if there is one, else all."""
    sets: dict[tuple[str, int], dict[int, str]] = {}
    for name in names:
        if match := _SHARD_NAME.fullmatch(name):
            key = match["stem"], int(match["total"])
            sets.setdefault(key, {})[int(match["idx"])] = name
    if len(sets) != 1:
        return list(names)
    [((stem, total), shards)] = sets.items()
    absent = next((idx for idx in range(1, len(shards) + 2) if idx not in shards), 0)
    if absent <= total:
        digits = len(_SHARD_NAME.fullmatch(next(iter(shards.values())))["total"])  # type: ignore[index]
        missing = f"{stem}-{absent:0{digits}}-of-{total:0{digits}}.safetensors"
        raise CheckpointError(
            f"{printable(folder)} has {len(shards)} of {total} shards: "
            f"{printable(missing)} is missing.\n"
            "Nothing was loaded. Download the model again; files that are complete are kept."
        )
    return [shards[idx] for idx in sorted(shards)]


def _refuse_other_formats(folder: Path, names: Sequence[str]) -> NoReturn:
    where = printable(folder)
    by_suffix = {suffix: name for name in reversed(names) if (suffix := Path(name).suffix)}
    for suffix in (".bin", ".pt", ".pth", ".ckpt"):
        if suffix in by_suffix:
            raise CheckpointError(
                f"{where} has only pickle weights ({printable(by_suffix[suffix])}), which can run "
                "code when read.\nIf you trust it, convert it once: AutoModel.from_pretrained"
                "(folder, use_safetensors=False)\n.save_pretrained(new_folder); or take a "
                "safetensors revision of the model."
            )
    if ".gguf" in by_suffix:
        raise CheckpointError(
            f"{where} has only GGUF weights ({printable(by_suffix['.gguf'])}).\n"
            "Give the path of the file itself: it is read in place."
        )
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{where} is an adapter, not a model.\n"
            "Give the model that its adapter_config.json names as base_model_name_or_path."
        )
    raise CheckpointError(
        f"{where} has no *.safetensors file.\n"
        "Give the folder of a model in Hugging Face format, or download it again."
    )


def _check_inside(folder: Path, path: Path) -> None:
    """The file must exist, and be in the folder or, in the Hugging Face cache, among its blobs."""
    try:
        real = path.resolve(strict=True)
        root = folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        if path.is_symlink():
            refuse(path, "it is a link to a file that is not there: the download is incomplete.")
        raise CheckpointError(
            f"{printable(path)} is missing, though the model needs it.\n"
            "Nothing was loaded. Download the model again; files that are complete are kept."
        ) from error
    allowed = [root]
    for parent in (root, *root.parents):
        if parent.parent.name == "snapshots":  # models--owner--name/{blobs,snapshots/<revision>}
            with suppress(OSError):
                allowed.append((parent.parent.parent / "blobs").resolve(strict=True))
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{printable(path)} is a link that leaves the model folder, to {printable(real)}.\n"
            "Only the links of the Hugging Face cache are followed. Move or copy the file into the "
            "folder,\nor link the whole folder instead of the file."
        )


# ------------------------------------------------------------------------------------ the index


def _read_index(path: Path) -> Mapping[str, str]:
    """weight_map of an index: tensor name -> file name in the same folder."""
    raw = read_small(path, MAX_INDEX_BYTES)
    try:
        index = parse_json(raw)
    except ValueError as error:
        refuse(path, f"not valid JSON: {error}.", cause=error)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(path, 'no "weight_map" from tensor names to file names.')
    checked: set[str] = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            refuse(path, "a file name must be text.", tensor=tensor)
        if name not in checked:
            _check_basename(path, tensor, name)
            checked.add(name)
    return weight_map


def _check_basename(path: Path, tensor: str, name: str) -> None:
    is_plain = not set(name) & set('/\\\0:"<>|?*') and name.isprintable()
    if not is_plain or name.startswith(".") or not name.endswith(".safetensors"):
        refuse(
            path,
            f"it is said to be in {quoted(name)}: not the plain name of a .safetensors file "
            "in this folder.",
            tensor=tensor,
            way_out="Nothing outside the model folder is read. Do not use this index.",
        )


def _merge(
    folder: Path,
    by_file: Mapping[str, Mapping[str, TensorEntry]],
    weight_map: Mapping[str, str] | None,
) -> dict[str, TensorEntry]:
    """One entry per tensor name; the index decides between two files, and must tell the truth."""
    tensors: dict[str, TensorEntry] = {}
    absent = [name for name, file in (weight_map or {}).items() if name not in by_file[file]]
    if absent:
        _refuse_absent(folder, by_file, weight_map or {}, absent)
    for name, file in (weight_map or {}).items():
        tensors[name] = by_file[file][name]
    for entries in by_file.values():
        for name, entry in entries.items():
            other = tensors.setdefault(name, entry)
            if other is not entry and (weight_map is None or name not in weight_map):
                refuse(
                    entry.path,
                    f"{printable(other.path.name)} has it too, and no index says which one counts.",
                    tensor=name,
                    way_out="Keep one set of weights in the folder, or add the model's index file.",
                )
    return tensors


def _refuse_absent(
    folder: Path,
    by_file: Mapping[str, Mapping[str, TensorEntry]],
    weight_map: Mapping[str, str],
    absent: Sequence[str],
) -> NoReturn:
    name = absent[0]
    elsewhere = [file for file, entries in by_file.items() if name in entries]
    where = f"it is in {printable(elsewhere[0])}" if elsewhere else "it is in no shard"
    others = f" ({len(absent) - 1:,} more like it)" if len(absent) > 1 else ""
    refuse(
        folder / INDEX_FILE,
        f"it should be in {printable(weight_map[name])}, but {where}{others}.",
        tensor=name,
        way_out="The index and the shards are not of one model: download both again.",
    )


def _update_with_samples(digest: Any, state: FileState) -> None:
    num_bytes = min(SAMPLE_BYTES, state.num_bytes)
    span = state.num_bytes - num_bytes
    with opened(state.path) as fd:
        for sample_idx in range(SAMPLES_PER_FILE):
            offset = span * sample_idx // (SAMPLES_PER_FILE - 1)
            digest.update(pread_exactly(state.path, fd, num_bytes, offset))


def _changed(path: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"{printable(path)} changed while it was in use: {how}.\n"
        "What was computed since may mix two models. Restore the file and resume from the last\n"
        "checkpoint, or begin a new run with the new weights."
    )
