"""What lies in a GGUF file, checked whole before any tensor in it is named to anyone.

The format: ggml's docs/gguf.md. A file holds a header (keys with values, then a description of each tensor) and the
tensors' bytes, each beginning at a multiple of `general.alignment`. Only the header is read, in pieces: vocabularies
are passed over. Models that llama.cpp's gguf-split cut (`x-00001-of-00003.gguf`) are read as one.

    gguf = open_gguf(Path("Llama-3.1-8B.Q4_K_M.gguf"))      # CheckpointError for what does not hold together
    gguf.tensors["blk.0.attn_q.weight"]                     # PackedEntry, shape in torch's order: outputs first
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from ssdtune.kernels.ggml import KINDS, Ggml
from ssdtune.swap.header import (
    DTYPE_BITS,
    MAX_NUMEL,
    FileState,
    TensorEntry,
    opened,
    pread_exactly,
    quoted,
    refuse,
)
from ssdtune.swap.packed import PackedEntry
from ssdtune.swap.source import MAX_TENSORS

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)  # 1 counted in 32 bits; nobody has written it since 2023
ALIGNMENT_KEY: Final = "general.alignment"
DEFAULT_ALIGNMENT: Final = 32
PACKED_DTYPE: Final = "BF16"  # of a packed tensor once decoded, where nobody says another

MAX_HEADER_BYTES: Final = 1 << 28  # the largest vocabularies take some 20 MB
MAX_KEYS: Final = 1 << 12  # files have some 40
MAX_KEY_BYTES: Final = (1 << 16) - 1  # the format's own limit
MAX_NAME_BYTES: Final = 1024  # ggml's own limit is 64
MAX_TEXT_BYTES: Final = 1 << 24
MAX_RANK: Final = 4
MAX_ALIGNMENT: Final = 1 << 20
MAX_KEPT: Final = 1024  # elements; of longer arrays only the length is kept
MAX_LENGTH: Final = 1 << 22  # of an array; the largest vocabularies have some 600,000 merges
WINDOW_BYTES: Final = 1 << 20  # read at a time

# Types of values: struct's letter for those of one size.
NUMBERS: Final = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
BOOL, TEXT, ARRAY = 7, 8, 9
# Types of tensors, by ggml's numbers.
PLAIN: Final = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}  # fmt: skip
PACKED: Final = {kind.number: name for name, kind in KINDS.items() if kind.block > 1}
UNREAD: Final = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4",
}  # fmt: skip
_SPLIT_NAME: Final = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<total>\d{5})\.gguf")
_SPLIT_KEYS: Final = ("split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True, slots=True)
class Omitted:
    """An array that was passed over."""

    length: int

    def __len__(self) -> int:
        return self.length


Scalar = int | float | bool | str
Value = Scalar | tuple[Scalar, ...] | Omitted


@dataclass(frozen=True, slots=True)
class Gguf:
    """A model in GGUF files. metadata: of the first file. tensors: of all of them, under ggml's names, in the files'
    order."""

    path: Path  # of the first file
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorEntry | PackedEntry]
    states: tuple[FileState, ...]

    @property
    def architecture(self) -> str:
        """As llama.cpp names it; "" where the file does not say."""
        found = self.metadata.get("general.architecture")
        return found if isinstance(found, str) else ""

    @property
    def files(self) -> tuple[Path, ...]:
        """Those that hold tensors, or the first part of a model."""
        return tuple(state.path for state in self.states)


def open_gguf(path: Path) -> Gguf:
    """Read and validate the header of a GGUF file, and of the others of its model where that was split.

    Holds afterwards: names are unique, tensors lie one behind the other with no more between them than alignment
    needs, and end where the file ends. Raises CheckpointError.
    """
    path = Path(path).absolute()
    first = _read_file(path)
    if _split(first)[1] <= 1:
        return first
    parts = [_read_file(part) for part in _part_paths(path, _split(first)[1])]
    tensors: dict[str, TensorEntry | PackedEntry] = {}
    for number, part in enumerate(parts):
        _check_part(part, number, len(parts))
        for name, entry in part.tensors.items():
            if name in tensors:
                refuse(part.path, f"{quoted(tensors[name].path.name)} has it too.", tensor=name)
            tensors[name] = entry
    stated = _split(parts[0])[2]
    if stated not in (0, len(tensors)):
        refuse(parts[0].path, f"the model has {stated:,} tensors, its parts {len(tensors):,}.")
    states = tuple(state for part in parts for state in part.states)
    return Gguf(parts[0].path, parts[0].metadata, tensors, states)


# ------------------------------------------------------------------------------- models in parts


def _split(gguf: Gguf) -> tuple[int, int, int]:
    """Number of this part from 0, of parts, of tensors in all; zeros where the file does not say."""
    values = [gguf.metadata.get(key, 0) for key in _SPLIT_KEYS]
    for key, value in zip(_SPLIT_KEYS, values, strict=True):
        if type(value) is not int or not 0 <= value <= MAX_TENSORS:
            refuse(gguf.path, f"{key} is {quoted(value)}, not a count.")
    return values[0], values[1], values[2]  # type: ignore[return-value]


def _part_paths(path: Path, count: int) -> list[Path]:
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match["total"]) != count:
        refuse(
            path,
            f"it is one of {count} parts, and not named so that the others can be found.",
            way_out=f"Name them as they were published: name-00001-of-{count:05d}.gguf, all in one folder.",
        )
    return [path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]  # fmt: skip


def _check_part(part: Gguf, number: int, count: int) -> None:
    if _split(part)[:2] != (number, count):
        found, total, _ = _split(part)
        refuse(
            part.path,
            f"it says that it is part {found + 1} of {total}, its name that it is part {number + 1} of {count}.",
        )


# ------------------------------------------------------------------------------------- one file


class _Reader:
    """Reads a header from its beginning on. at: offset of what comes next."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.at = path, 0
        self._fd, self._num_bytes = fd, os.fstat(fd).st_size
        self._start, self._window = 0, b""

    def take(self, num_bytes: int) -> bytes:
        """The next bytes."""
        first = self.at - self._start
        if first + num_bytes > len(self._window):
            self._check(num_bytes)
            self._start, first = self.at, 0
            wanted = min(max(num_bytes, WINDOW_BYTES), self._num_bytes - self.at)
            self._window = pread_exactly(self.path, self._fd, wanted, self.at)
        self.at += num_bytes
        return self._window[first : first + num_bytes]

    def skip(self, num_bytes: int) -> None:
        """Passes over the next bytes."""
        self._check(num_bytes)
        self.at += num_bytes

    def numbers(self, letters: str) -> tuple[int, ...]:
        """The next values, by struct's letters."""
        return struct.unpack("<" + letters, self.take(struct.calcsize("<" + letters)))

    def text(self, what: str, max_bytes: int) -> str:
        """The next string, which has its length before it. what: it is, for messages."""
        [num_bytes] = self.numbers("Q")
        if num_bytes > max_bytes:
            refuse(self.path, f"{what} takes {num_bytes:,} bytes; {max_bytes:,} is the limit.")
        raw = self.take(num_bytes)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            refuse(self.path, f"{what} is not UTF-8: {quoted(repr(raw))}.", cause=error)

    def digest(self) -> str:
        """SHA-256 of what was read or passed over, in hexadecimal."""
        made = hashlib.sha256()
        for start in range(0, self.at, WINDOW_BYTES):
            wanted = min(WINDOW_BYTES, self.at - start)
            made.update(pread_exactly(self.path, self._fd, wanted, start))
        return made.hexdigest()

    def _check(self, num_bytes: int) -> None:
        stop = self.at + num_bytes
        if stop > self._num_bytes:
            refuse(
                self.path,
                f"its header goes on to byte {stop:,}, the file has {self._num_bytes:,}: cut short.",
            )
        if stop > MAX_HEADER_BYTES:
            refuse(self.path, f"its header takes more than {MAX_HEADER_BYTES:,} bytes.")


class _Described(NamedTuple):
    """A tensor as the header has it. offset: from where tensors begin."""

    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int


def _read_file(path: Path) -> Gguf:
    with opened(path) as fd:
        info = os.fstat(fd)
        reader = _Reader(path, fd)
        num_tensors, num_keys = _counts(reader, info.st_size)
        metadata = _metadata(reader, num_keys)
        alignment = _alignment(path, metadata)
        described = [_described(reader) for _ in range(num_tensors)]
        state = FileState(path, info.st_size, info.st_mtime_ns, reader.digest())
        data_start = _aligned(reader.at, alignment)
    entries = [_entry(path, one, data_start) for one in described]
    entries.sort(key=_start)
    _check_layout(path, entries, data_start, alignment, info.st_size)
    tensors = {entry.name: entry for entry in entries}
    if len(tensors) != len(entries):
        seen: set[str] = set()
        twice = next(e.name for e in entries if e.name in seen or seen.add(e.name))
        refuse(path, "it is there twice.", tensor=twice)
    return Gguf(path, metadata, tensors, (state,))


def _counts(reader: _Reader, num_bytes: int) -> tuple[int, int]:
    """Numbers of tensors and of keys."""
    path = reader.path
    if num_bytes < 24:
        refuse(path, f"{num_bytes} bytes is too short for a GGUF file.")
    if reader.take(4) != MAGIC:
        refuse(path, 'it does not begin with "GGUF": it is no GGUF file.')
    version, num_tensors, num_keys = reader.numbers("IQQ")
    if version not in VERSIONS:
        kind = f"of version {version}"
        if int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS:
            kind = "of the other byte order (big-endian)"
        refuse(path, f"it is {kind}; versions 2 and 3, little-endian, are read.")
    for what, number, limit in (("tensors", num_tensors, MAX_TENSORS), ("keys", num_keys, MAX_KEYS)):  # fmt: skip
        if number > limit:
            refuse(path, f"its header claims {number:,} {what}; {limit:,} is the limit.")
    return num_tensors, num_keys


def _metadata(reader: _Reader, num_keys: int) -> dict[str, Value]:
    made: dict[str, Value] = {}
    for _ in range(num_keys):
        key = reader.text("a key", MAX_KEY_BYTES)
        if key in made:
            refuse(reader.path, f"key {quoted(key)} appears twice.")
        [kind] = reader.numbers("I")
        made[key] = _array(reader, key) if kind == ARRAY else _scalar(reader, key, kind)
    return made


def _scalar(reader: _Reader, key: str, kind: int) -> Scalar:
    if kind == TEXT:
        return reader.text(f"the value of {quoted(key)}", MAX_TEXT_BYTES)
    if kind == BOOL:
        [byte] = reader.numbers("B")
        if byte > 1:
            refuse(reader.path, f"{quoted(key)} is {byte}, neither true nor false.")
        return bool(byte)
    if kind not in NUMBERS:
        refuse(reader.path, f"{quoted(key)} has a value of unknown type {kind}.")
    return reader.numbers(NUMBERS[kind])[0]


def _array(reader: _Reader, key: str) -> tuple[Scalar, ...] | Omitted:
    kind, length = reader.numbers("IQ")
    if kind == ARRAY:
        refuse(reader.path, f"{quoted(key)} is an array of arrays: not supported.")
    if length > MAX_LENGTH:
        refuse(reader.path, f"{quoted(key)} has {length:,} elements; {MAX_LENGTH:,} is the limit.")
    if length <= MAX_KEPT:
        return tuple(_scalar(reader, key, kind) for _ in range(length))
    if kind in NUMBERS:
        reader.skip(length * struct.calcsize("<" + NUMBERS[kind]))
    elif kind == TEXT:
        for _ in range(length):
            reader.skip(int.from_bytes(reader.take(8), "little"))
    else:
        refuse(reader.path, f"{quoted(key)} is an array of unknown type {kind}.")
    return Omitted(length)


def _alignment(path: Path, metadata: Mapping[str, Value]) -> int:
    found = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    is_sound = type(found) is int and 8 <= found <= MAX_ALIGNMENT and found.bit_count() == 1
    if not is_sound:
        refuse(path, f"{ALIGNMENT_KEY} is {quoted(found)}, not a power of two from 8 on.")
    return found  # type: ignore[return-value]


def _described(reader: _Reader) -> _Described:
    name = reader.text("the name of a tensor", MAX_NAME_BYTES)
    [rank] = reader.numbers("I")
    if not 1 <= rank <= MAX_RANK:
        refuse(reader.path, f"it has {rank} dimensions; 1 to {MAX_RANK} are read.", tensor=name)
    sizes = reader.numbers("Q" * rank)
    type_number, offset = reader.numbers("IQ")
    # What varies fastest is first in ggml, last in torch.
    return _Described(name, tuple(reversed(sizes)), type_number, offset)


def _entry(path: Path, one: _Described, data_start: int) -> TensorEntry | PackedEntry:
    """A tensor's description, checked by itself."""
    shape, start = one.shape, data_start + one.offset
    if 0 in shape or math.prod(shape) > MAX_NUMEL:
        refuse(path, f"shape {quoted(list(shape))} is no shape of a weight.", tensor=one.name)
    if one.type_number in PLAIN:
        dtype = PLAIN[one.type_number]
        num_bytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
        return TensorEntry(one.name, path, dtype, shape, start, num_bytes)
    if one.type_number not in PACKED:
        kind = UNREAD.get(one.type_number, f"of unknown type {one.type_number}")
        refuse(
            path,
            f"it is {kind}; {', '.join(PACKED.values())} are read.",
            tensor=one.name,
            way_out="Nothing was loaded. Take the model in one of these types.",
        )
    format = Ggml(PACKED[one.type_number])
    if shape[-1] % KINDS[format.kind].block:
        refuse(
            path,
            f"a row of {shape[-1]:,} elements is not whole blocks of {format.kind}.",
            tensor=one.name,
        )
    [part] = format.parts(shape)
    blocks = TensorEntry(f"{one.name}.blocks", path, part.dtype, part.shape, start, part.shape[0])
    return PackedEntry(one.name, path, PACKED_DTYPE, shape, format, (blocks,))


def _start(entry: TensorEntry | PackedEntry) -> int:
    return entry.parts[0].start if isinstance(entry, PackedEntry) else entry.start


def _check_layout(
    path: Path,
    entries: Sequence[TensorEntry | PackedEntry],
    data_start: int,
    alignment: int,
    num_bytes: int,
) -> None:
    """Sorted entries must follow each other with nothing between them but what brings each to its alignment."""
    end = data_start
    for entry in entries:
        wanted, start = _aligned(end, alignment), _start(entry)
        if start < wanted:
            how = f"it overlaps the tensor before it by {end - start:,} bytes"
            if start >= end:
                how = f"it begins at byte {start:,}, no multiple of {alignment}"
            refuse(path, f"{how}.", tensor=entry.name)
        if start > wanted:
            refuse(
                path, f"{start - wanted:,} bytes before it belong to no tensor.", tensor=entry.name
            )
        end = start + entry.num_bytes
        if end > num_bytes:
            refuse(
                path,
                f"it ends at byte {end:,}, the file has {num_bytes:,}: cut short.",
                tensor=entry.name,
            )
    if num_bytes > _aligned(end, alignment):
        refuse(path, f"{num_bytes - end:,} bytes after the last tensor belong to none.")


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
