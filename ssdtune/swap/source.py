"""Reads the headers of a model folder's safetensors files and says where every tensor's bytes lie.

The base weights are used in place, from the user's own files, so nothing may be taken on trust that
a later read depends on: each header is validated whole (format: huggingface/safetensors README,
"Format") before a single tensor is named to anyone. Only headers are read here; no tensor data, no
mmap (a file that shrinks under an mmap is a SIGBUS, not an error). Never writes, never follows a
file name out of the folder, never runs pickle.

    checkpoint = open_checkpoint(folder)                     # TensorEntry by name, or CheckpointError
    layout = merge_extents(entries, alignment=4096, max_gap_bytes=1 << 20)
    pool.submit(layout.extents, buffer, label="layers.7")    # storage.py
    buffer[layout.offsets[name]:][:entry.num_bytes]          # the tensor's bytes, nothing copied
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NoReturn, Protocol

from ssdtune.errors import SSDTuneError
from ssdtune.swap.storage import Extent

# Bits per value of each dtype name; the sub-byte ones are packed without gaps.
_NAMES_BY_BITS: Final = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "I16 U16 F16 BF16",
    32: "I32 U32 F32",
    64: "I64 U64 F64 C64",
}
DTYPE_BITS: Final[Mapping[str, int]] = MappingProxyType(
    {name: bits for bits, names in _NAMES_BY_BITS.items() for name in names.split()}
)
SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"

MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit
# JSON values become Python objects of 30-300 bytes each. The largest published checkpoints hold
# about 200,000 tensors in all, 8-9 brackets and commas each, spread over dozens of files.
MAX_STRUCTURE: Final = 1_000_000
MAX_TENSORS: Final = 1_000_000
MAX_RANK: Final = 64  # of a torch tensor
MAX_NUMEL: Final = 2**63 - 1
MAX_INDEX_BYTES: Final = 100_000_000
SAMPLES_PER_FILE: Final = 16
SAMPLE_BYTES: Final = 4096
_SHARD_NAME: Final = re.compile(r"(?P<stem>.+)-(?P<idx>\d{1,9})-of-(?P<total>\d{1,9})\.safetensors")


class CheckpointError(SSDTuneError):
    """A model folder that cannot be used as it is; names the file, the tensor and the way out."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor's bytes lie: C order, little endian, [start, start + num_bytes) of `path`."""

    name: str
    path: Path
    dtype: str  # a key of DTYPE_BITS
    shape: tuple[int, ...]
    start: int  # absolute byte offset in the file; any value, even odd ones
    num_bytes: int

    @property
    def stop(self) -> int:
        return self.start + self.num_bytes

    @property
    def is_element_aligned(self) -> bool:
        """Whether a page-aligned buffer that keeps file alignment can be viewed as this dtype.

        False for a header of odd length: such a tensor needs a copy to an aligned place."""
        return self.start % max(1, DTYPE_BITS[self.dtype] // 8) == 0


@dataclass(frozen=True, slots=True)
class FileState:
    """What a file was when its header was read."""

    path: Path
    num_bytes: int
    mtime_ns: int
    header_sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a model folder, by name; `files` are those that hold them."""

    folder: Path
    tensors: Mapping[str, TensorEntry]
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
            f"no model folder at {_printable(folder)}: {error.strerror}.\n"
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
            _refuse(path, f"more than {MAX_TENSORS:,} tensors so far: no model has as many.")
    tensors = _merge(folder, by_file, weight_map)
    if not tensors:
        _refuse(folder / names[0], "no tensor in it.")
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
            f"{_printable(folder)} has {len(shards)} of {total} shards: "
            f"{_printable(missing)} is missing.\n"
            "Nothing was loaded. Download the model again; files that are complete are kept."
        )
    return [shards[idx] for idx in sorted(shards)]


def _refuse_other_formats(folder: Path, names: Sequence[str]) -> NoReturn:
    where = _printable(folder)
    by_suffix = {suffix: name for name in reversed(names) if (suffix := Path(name).suffix)}
    for suffix in (".bin", ".pt", ".pth", ".ckpt"):
        if suffix in by_suffix:
            raise CheckpointError(
                f"{where} has only pickle weights ({_printable(by_suffix[suffix])}), which can run "
                "code when read.\nIf you trust it, convert it once: AutoModel.from_pretrained"
                "(folder, use_safetensors=False)\n.save_pretrained(new_folder); or take a "
                "safetensors revision of the model."
            )
    if ".gguf" in by_suffix:
        raise CheckpointError(
            f"{where} has only GGUF weights ({_printable(by_suffix['.gguf'])}).\n"
            "Convert them once: AutoModelForCausalLM.from_pretrained(folder, gguf_file=...)\n"
            ".save_pretrained(new_folder)."
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
            _refuse(path, "it is a link to a file that is not there: the download is incomplete.")
        raise CheckpointError(
            f"{_printable(path)} is missing, though the model needs it.\n"
            "Nothing was loaded. Download the model again; files that are complete are kept."
        ) from error
    allowed = [root]
    for parent in (root, *root.parents):
        if parent.parent.name == "snapshots":  # models--owner--name/{blobs,snapshots/<revision>}
            with suppress(OSError):
                allowed.append((parent.parent.parent / "blobs").resolve(strict=True))
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{_printable(path)} is a link that leaves the model folder, to {_printable(real)}.\n"
            "Only the links of the Hugging Face cache are followed. Move or copy the file into the "
            "folder,\nor link the whole folder instead of the file."
        )


# ------------------------------------------------------------------------------------ the index


def _read_index(path: Path) -> Mapping[str, str]:
    """weight_map of an index: tensor name -> file name in the same folder."""
    raw = _read_small(path, MAX_INDEX_BYTES)
    try:
        index = _parse_json(raw)
    except ValueError as error:
        _refuse(path, f"not valid JSON: {error}.", cause=error)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        _refuse(path, 'no "weight_map" from tensor names to file names.')
    checked: set[str] = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            _refuse(path, "a file name must be text.", tensor=tensor)
        if name not in checked:
            _check_basename(path, tensor, name)
            checked.add(name)
    return weight_map


def _check_basename(path: Path, tensor: str, name: str) -> None:
    is_plain = not set(name) & set('/\\\0:"<>|?*') and name.isprintable()
    if not is_plain or name.startswith(".") or not name.endswith(".safetensors"):
        _refuse(
            path,
            f"it is said to be in {_quoted(name)}: not the plain name of a .safetensors file "
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
                _refuse(
                    entry.path,
                    f"{_printable(other.path.name)} has it too, and no index says which one counts.",
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
    where = f"it is in {_printable(elsewhere[0])}" if elsewhere else "it is in no shard"
    others = f" ({len(absent) - 1:,} more like it)" if len(absent) > 1 else ""
    _refuse(
        folder / INDEX_FILE,
        f"it should be in {_printable(weight_map[name])}, but {where}{others}.",
        tensor=name,
        way_out="The index and the shards are not of one model: download both again.",
    )


# ------------------------------------------------------------------------------------ one header


def read_header(path: Path) -> tuple[FileState, dict[str, TensorEntry]]:
    """Read and validate the header of one safetensors file; entries are in order of offset.

    Holds afterwards: the tensors lie one behind the other without overlap or hole and end where the
    file ends; each one's bytes are what its dtype and shape need. Raises CheckpointError."""
    info, raw = _read_header_bytes(path)
    num_structure = sum(raw.count(mark) for mark in (b"{", b"[", b","))
    if num_structure > MAX_STRUCTURE:
        _refuse(path, f"{num_structure:,} values in its header; {MAX_STRUCTURE:,} is the limit.")
    try:
        header = _parse_json(raw)
    except ValueError as error:
        _refuse(path, f"its header is not valid JSON: {error}.", cause=error)
    if not isinstance(header, dict):
        _refuse(path, "its header is not a JSON object.")
    _check_metadata(path, header.pop("__metadata__", {}))
    data_start = 8 + len(raw)
    entries = [_entry(path, name, described, data_start) for name, described in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.num_bytes))
    _check_layout(path, entries, data_start, info.st_size)
    state = FileState(path, info.st_size, info.st_mtime_ns, hashlib.sha256(raw).hexdigest())
    return state, {entry.name: entry for entry in entries}


def _read_header_bytes(path: Path) -> tuple[os.stat_result, bytes]:
    with _opened(path) as fd:
        info = os.fstat(fd)
        if info.st_size < 10:  # 8 bytes of length and at least "{}"
            _refuse(path, f"{info.st_size} bytes is too short for a safetensors file.")
        prefix = os.pread(fd, 64, 0)
        if prefix.startswith(b"version https://git-lfs"):
            _refuse(
                path,
                "it is a git-lfs pointer, not the weights.",
                way_out="Run `git lfs pull` in the model folder, or download the model again.",
            )
        num_bytes = int.from_bytes(prefix[:8], "little")
        if num_bytes > MAX_HEADER_BYTES:
            _refuse(
                path,
                f"its header claims {num_bytes:,} bytes; {MAX_HEADER_BYTES:,} is the format's limit.",
            )
        if num_bytes > info.st_size - 8:
            _refuse(
                path,
                f"its header claims {num_bytes:,} bytes, the whole file has {info.st_size:,}: "
                "cut short.",
            )
        if prefix[8:9] != b"{":
            _refuse(path, 'its header does not begin with "{".')
        return info, _pread_exactly(path, fd, num_bytes, 8)


def _check_metadata(path: Path, metadata: Any) -> None:
    is_text = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not is_text:
        _refuse(path, '"__metadata__" must map text to text.')


def _entry(path: Path, name: str, described: Any, data_start: int) -> TensorEntry:
    """One tensor's description, checked by itself; offsets made absolute."""
    if not isinstance(described, dict) or described.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, "its description is not dtype, shape and data_offsets.", tensor=name)
    dtype, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _refuse(path, f"unknown dtype {_quoted(dtype)}.", tensor=name)
    if not _is_counts(shape) or len(shape) > MAX_RANK:
        _refuse(path, f"shape {_quoted(shape)} is not a list of counts.", tensor=name)
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(path, f"data_offsets {_quoted(offsets)} are not [begin, end].", tensor=name)
    # Zeros are left out first, so that [2**62, 2**62, 0] overflows in any order of multiplication.
    if math.prod(dim for dim in shape if dim) > MAX_NUMEL:
        _refuse(path, f"shape {_quoted(shape)} overflows 64 bits.", tensor=name)
    num_bits = math.prod(shape) * DTYPE_BITS[dtype]
    begin, end = offsets
    if num_bits % 8 or num_bits // 8 != end - begin:
        needs = f"{num_bits / 8:,.1f}" if num_bits % 8 else f"{num_bits // 8:,}"
        _refuse(
            path,
            f"{dtype} of shape {_quoted(shape)} needs {needs} bytes, its data_offsets "
            f"give {end - begin:,}.",
            tensor=name,
        )
    return TensorEntry(name, path, dtype, tuple(shape), data_start + begin, end - begin)


def _is_counts(value: Any) -> bool:
    """A list of non-negative 64-bit integers; True is no integer here."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= MAX_NUMEL for v in value)


def _check_layout(path: Path, entries: Sequence[TensorEntry], data_start: int, size: int) -> None:
    """Sorted entries must tile [data_start, size) exactly; empty ones may share an offset."""
    end = data_start
    for entry in entries:
        if entry.start < end:
            _refuse(
                path,
                f"it overlaps the tensor before it by {end - entry.start:,} bytes.",
                tensor=entry.name,
            )
        if entry.start > end:
            _refuse(
                path,
                f"{entry.start - end:,} bytes before it belong to no tensor.",
                tensor=entry.name,
            )
        if entry.stop > size:
            _refuse(
                path,
                f"it ends at byte {entry.stop:,}, the file has {size:,}: cut short.",
                tensor=entry.name,
            )
        end = entry.stop
    if end != size:
        _refuse(path, f"{size - end:,} bytes after the last tensor belong to none.")


# ------------------------------------------------------------------------------ files, JSON, text


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The descriptor of a regular file; a fifo named like a shard must not hang, so O_NONBLOCK."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        _refuse(path, f"it cannot be opened: {error.strerror}.", cause=error)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            _refuse(path, "it is not a regular file.")
        yield fd
    finally:
        os.close(fd)


def _pread_exactly(path: Path, fd: int, num_bytes: int, offset: int) -> bytes:
    try:
        raw = os.pread(fd, num_bytes, offset)
    except OSError as error:
        _refuse(path, f"reading it failed: {error.strerror}.", cause=error)
    if len(raw) != num_bytes:
        _refuse(path, f"{len(raw):,} of {num_bytes:,} bytes at offset {offset:,}: cut short.")
    return raw


def _read_small(path: Path, max_bytes: int) -> bytes:
    with _opened(path) as fd:
        num_bytes = os.fstat(fd).st_size
        if num_bytes > max_bytes:
            _refuse(path, f"{num_bytes:,} bytes; {max_bytes:,} is the limit.")
        return _pread_exactly(path, fd, num_bytes, 0)


def _update_with_samples(digest: Any, state: FileState) -> None:
    num_bytes = min(SAMPLE_BYTES, state.num_bytes)
    span = state.num_bytes - num_bytes
    with _opened(state.path) as fd:
        for sample_idx in range(SAMPLES_PER_FILE):
            offset = span * sample_idx // (SAMPLES_PER_FILE - 1)
            digest.update(_pread_exactly(state.path, fd, num_bytes, offset))


def _parse_json(raw: bytes) -> Any:
    """Strict JSON: UTF-8, no key twice, no NaN. Raises ValueError with a short reason."""
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {_quoted(twice)} appears twice")
    for key in made:
        if not key.isascii() and any("\ud800" <= char <= "\udfff" for char in key):
            raise ValueError(f"key {_quoted(key)} is not Unicode text")
    return made


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _printable(text: object) -> str:
    """Safe to print: control characters, escapes and lone surrogates are shown as \\x.. codes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in str(text)
    )


def _quoted(value: object) -> str:
    text = _printable(str(value)[:200])
    if len(text) > 120:
        text = text[:117] + "..."
    return f'"{text}"' if isinstance(value, str) else text


def _changed(path: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"{_printable(path)} changed while it was in use: {how}.\n"
        "What was computed since may mix two models. Restore the file and resume from the last\n"
        "checkpoint, or begin a new run with the new weights."
    )


def _refuse(
    path: Path,
    what: str,
    *,
    tensor: str | None = None,
    way_out: str = "Nothing was loaded. Download this file again.",
    cause: BaseException | None = None,
) -> NoReturn:
    subject = f"tensor {_quoted(tensor)}: " if tensor is not None else ""
    raise CheckpointError(f"cannot use {_printable(path)}:\n{subject}{what}\n{way_out}") from cause
