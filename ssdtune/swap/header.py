"""The header of one safetensors file, checked whole before any tensor in it is named to anyone.

The format: huggingface/safetensors README, "Format". Only the header is read: no tensor data, no
mmap (a file that shrinks under an mmap is a SIGBUS, not an error). Nothing is ever written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NoReturn

from ssdtune.errors import SSDTuneError

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

MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit
# JSON values become Python objects of 30-300 bytes each. The largest published checkpoints hold
# about 200,000 tensors in all, 8-9 brackets and commas each, spread over dozens of files.
MAX_STRUCTURE: Final = 1_000_000
MAX_RANK: Final = 64  # of a torch tensor
MAX_NUMEL: Final = 2**63 - 1


class CheckpointError(SSDTuneError):
    """A model folder that cannot be used as it is; names the file, the tensor and the way out."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor's bytes lie: C order, little endian, [start, start + num_bytes) of `path`.

    checksum: of these bytes, as `kernels/checksum.py` makes it, where the file's header has one."""

    name: str
    path: Path
    dtype: str  # a key of DTYPE_BITS
    shape: tuple[int, ...]
    start: int  # absolute byte offset in the file; any value, even odd ones
    num_bytes: int
    checksum: int | None = None

    @property
    def stop(self) -> int:
        """The first byte behind it in the file."""
        return self.start + self.num_bytes


@dataclass(frozen=True, slots=True)
class FileState:
    """What a file was when its header was read."""

    path: Path
    num_bytes: int
    mtime_ns: int
    header_sha256: str
    metadata: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)


# ------------------------------------------------------------------------------------ one header


def read_header(path: Path) -> tuple[FileState, dict[str, TensorEntry]]:
    """Read and validate the header of one safetensors file; entries are in order of offset.

    Holds afterwards: the tensors lie one behind the other without overlap or hole and end where the
    file ends; each one's bytes are what its dtype and shape need. Raises CheckpointError."""
    info, raw = _read_header_bytes(path)
    num_structure = sum(raw.count(mark) for mark in (b"{", b"[", b","))
    if num_structure > MAX_STRUCTURE:
        refuse(path, f"{num_structure:,} values in its header; {MAX_STRUCTURE:,} is the limit.")
    try:
        header = parse_json(raw)
    except ValueError as error:
        refuse(path, f"its header is not valid JSON: {error}.", cause=error)
    if not isinstance(header, dict):
        refuse(path, "its header is not a JSON object.")
    metadata = header.pop("__metadata__", {})
    _check_metadata(path, metadata)
    data_start = 8 + len(raw)
    entries = [_entry(path, name, described, data_start) for name, described in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.num_bytes))
    _check_layout(path, entries, data_start, info.st_size)
    digest = hashlib.sha256(raw).hexdigest()
    state = FileState(path, info.st_size, info.st_mtime_ns, digest, metadata)
    return state, {entry.name: entry for entry in entries}


def _read_header_bytes(path: Path) -> tuple[os.stat_result, bytes]:
    with opened(path) as fd:
        info = os.fstat(fd)
        if info.st_size < 10:  # 8 bytes of length and at least "{}"
            refuse(path, f"{info.st_size} bytes is too short for a safetensors file.")
        prefix = os.pread(fd, 64, 0)
        if prefix.startswith(b"version https://git-lfs"):
            refuse(
                path,
                "it is a git-lfs pointer, not the weights.",
                way_out="Run `git lfs pull` in the model folder, or download the model again.",
            )
        num_bytes = int.from_bytes(prefix[:8], "little")
        if num_bytes > MAX_HEADER_BYTES:
            refuse(
                path,
                f"its header claims {num_bytes:,} bytes; {MAX_HEADER_BYTES:,} is the format's limit.",
            )
        if num_bytes > info.st_size - 8:
            refuse(
                path,
                f"its header claims {num_bytes:,} bytes, the whole file has {info.st_size:,}: "
                "cut short.",
            )
        if prefix[8:9] != b"{":
            refuse(path, 'its header does not begin with "{".')
        return info, pread_exactly(path, fd, num_bytes, 8)


def _check_metadata(path: Path, metadata: Any) -> None:
    is_text = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not is_text:
        refuse(path, '"__metadata__" must map text to text.')


def _entry(path: Path, name: str, described: Any, data_start: int) -> TensorEntry:
    """One tensor's description, checked by itself; offsets made absolute."""
    if not isinstance(described, dict) or described.keys() != {"dtype", "shape", "data_offsets"}:
        refuse(path, "its description is not dtype, shape and data_offsets.", tensor=name)
    dtype, shape, offsets = described["dtype"], described["shape"], described["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        refuse(path, f"unknown dtype {quoted(dtype)}.", tensor=name)
    if not is_counts(shape) or len(shape) > MAX_RANK:
        refuse(path, f"shape {quoted(shape)} is not a list of counts.", tensor=name)
    if not is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(path, f"data_offsets {quoted(offsets)} are not [begin, end].", tensor=name)
    # Zeros are left out first, so that [2**62, 2**62, 0] overflows in any order of multiplication.
    if math.prod(dim for dim in shape if dim) > MAX_NUMEL:
        refuse(path, f"shape {quoted(shape)} overflows 64 bits.", tensor=name)
    num_bits = math.prod(shape) * DTYPE_BITS[dtype]
    begin, end = offsets
    if num_bits % 8 or num_bits // 8 != end - begin:
        needs = f"{num_bits / 8:,.1f}" if num_bits % 8 else f"{num_bits // 8:,}"
        refuse(
            path,
            f"{dtype} of shape {quoted(shape)} needs {needs} bytes, its data_offsets "
            f"give {end - begin:,}.",
            tensor=name,
        )
    return TensorEntry(name, path, dtype, tuple(shape), data_start + begin, end - begin)


def is_counts(value: Any) -> bool:
    """A list of non-negative 64-bit integers; True is no integer here."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= MAX_NUMEL for v in value)


def _check_layout(path: Path, entries: Sequence[TensorEntry], data_start: int, size: int) -> None:
    """Sorted entries must tile [data_start, size) exactly; empty ones may share an offset."""
    end = data_start
    for entry in entries:
        if entry.start < end:
            refuse(
                path,
                f"it overlaps the tensor before it by {end - entry.start:,} bytes.",
                tensor=entry.name,
            )
        if entry.start > end:
            refuse(
                path,
                f"{entry.start - end:,} bytes before it belong to no tensor.",
                tensor=entry.name,
            )
        if entry.stop > size:
            refuse(
                path,
                f"it ends at byte {entry.stop:,}, the file has {size:,}: cut short.",
                tensor=entry.name,
            )
        end = entry.stop
    if end != size:
        refuse(path, f"{size - end:,} bytes after the last tensor belong to none.")


# ------------------------------------------------------------------------------ files, JSON, text


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """The descriptor of a regular file; a fifo named like a shard must not hang, so O_NONBLOCK."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        refuse(path, f"it cannot be opened: {error.strerror}.", cause=error)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            refuse(path, "it is not a regular file.")
        yield fd
    finally:
        os.close(fd)


def pread_exactly(path: Path, fd: int, num_bytes: int, offset: int) -> bytes:
    """So many bytes of an open file. Raises CheckpointError naming `path` where they cannot be read, or are fewer."""
    try:
        raw = os.pread(fd, num_bytes, offset)
    except OSError as error:
        refuse(path, f"reading it failed: {error.strerror}.", cause=error)
    if len(raw) != num_bytes:
        refuse(path, f"{len(raw):,} of {num_bytes:,} bytes at offset {offset:,}: cut short.")
    return raw


def read_small(path: Path, max_bytes: int) -> bytes:
    """A whole file of at most so many bytes. Raises CheckpointError."""
    with opened(path) as fd:
        num_bytes = os.fstat(fd).st_size
        if num_bytes > max_bytes:
            refuse(path, f"{num_bytes:,} bytes; {max_bytes:,} is the limit.")
        return pread_exactly(path, fd, num_bytes, 0)


def parse_json(raw: bytes) -> Any:
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
        raise ValueError(f"key {quoted(twice)} appears twice")
    for key in made:
        if not key.isascii() and any("\ud800" <= char <= "\udfff" for char in key):
            raise ValueError(f"key {quoted(key)} is not Unicode text")
    return made


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def printable(text: object) -> str:
    """Safe to print: control characters, escapes and lone surrogates are shown as \\x.. codes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in str(text)
    )


def quoted(value: object) -> str:
    """For messages: printable, in quotes where it is text, cut at 120 characters."""
    text = printable(str(value)[:200])
    if len(text) > 120:
        text = text[:117] + "..."
    return f'"{text}"' if isinstance(value, str) else text


def refuse(
    path: Path,
    what: str,
    *,
    tensor: str | None = None,
    way_out: str = "Nothing was loaded. Download this file again.",
    cause: BaseException | None = None,
) -> NoReturn:
    """Raises CheckpointError: the file, the tensor in it, what is wrong, the way out."""
    subject = f"tensor {quoted(tensor)}: " if tensor is not None else ""
    raise CheckpointError(f"cannot use {printable(path)}:\n{subject}{what}\n{way_out}") from cause
