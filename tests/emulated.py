"""The C library on an emulated processor: Python stays here, each call of a function runs there (`elsewhere.c`).

A job is a ctypes structure with addresses in it. What lies at those is carried over, and what the function changed of
it is carried back.
"""

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ssdtune.kernels import structs

JOBS: dict[str, type[ctypes.Structure]] = {
    "ssdtune_checksum": structs.struct("checksum", "checksum.c"),
    "ssdtune_add_noise": structs.struct("noise", "pieces.h"),
    "ssdtune_requantize": structs.struct("requantize", "requantize.c"),
    "ssdtune_decode_lossless": structs.struct("job", "lossless.c"),
    "ssdtune_unpack_affine": structs.struct("affine", "pieces.h"),
    "ssdtune_unpack_ggml": structs.struct("ggml", "ggml.c"),
    "ssdtune_unpack_integers": structs.struct("integers", "integers.c"),
    "ssdtune_unpack_nibbles": structs.struct("nibbles", "unpack.c"),
}
# What lies behind addresses of these names, where it has addresses too.
NESTED: dict[str, type[ctypes.Structure]] = {
    "packed": JOBS["ssdtune_unpack_affine"],
    "move": JOBS["ssdtune_add_noise"],
}
DIRECTION = structs.struct("direction", "pieces.h")
CARRIED = 1 << 18  # bytes behind an address; the tests' tensors are smaller
PAGE = 4096
DRIVER = Path(__file__).parent / "elsewhere.c"


class Emulated:
    """What a module's `library()` gives. command: that an executable is run with. suffix: of all functions."""

    def __init__(
        self, library: Path, scratch: Path, *, compiler: str, command: Sequence[str], suffix: str
    ) -> None:
        self.suffixes = (suffix,)
        self.names: set[str] = set()  # of what was called
        self._library, self._command, self._file = library, command, scratch / "memory"
        self._driver = scratch / "elsewhere"
        build = [compiler, "-O1", "-Wall", "-Werror", str(DRIVER), "-o", str(self._driver), "-ldl"]
        subprocess.run(build, check=True)

    def function(self, name: str, suffix: str | None = None) -> Callable[..., None]:
        """Takes the address of a job, as the library's own."""
        return partial(self._call, name, suffix or self.suffixes[0])

    def _call(self, name: str, suffix: str, address: ctypes.c_void_p) -> None:
        self.names.add(name)
        memory = Memory()
        memory.add_structure(JOBS[name], address.value or 0)
        self._file.write_bytes(memory.written())
        call = [*self._command, self._driver, self._library, name + suffix, self._file]
        subprocess.run(call, check=True)
        memory.take_back(self._file.read_bytes())


class Memory:
    """Regions of this process, and the addresses in them that point to one another."""

    def __init__(self) -> None:
        self._regions: list[tuple[int, bytes]] = []  # address, what was there
        self._pointers: list[tuple[int, int, int, int]] = []

    def add_structure(self, kind: type[Any], address: int) -> int:
        """A structure or an array of them, with all that it points to. Returns the region's number."""
        number = self._add(address, ctypes.sizeof(kind))
        found = kind.from_address(address)
        many = [found] if isinstance(found, ctypes.Structure) else list(found)
        for i, one in enumerate(many):
            for name, at, target in _addresses(one):
                if name == "directions":
                    to = self.add_structure(DIRECTION * one.num_directions, target)
                elif name in NESTED:
                    to = self.add_structure(NESTED[name], target)
                else:
                    to = self._add(target, min(CARRIED, _readable(target)))
                place = i * ctypes.sizeof(one) + at
                self._pointers.append((number, place, to, 0))
        return number

    def _add(self, address: int, num_bytes: int) -> int:
        self._regions.append((address, ctypes.string_at(address, num_bytes)))
        return len(self._regions) - 1

    def written(self) -> bytes:
        """As the driver reads it."""
        numbers = [len(self._regions), len(self._pointers)]
        for address, content in self._regions:
            numbers += [len(content), address % PAGE]
        for pointer in self._pointers:
            numbers += pointer
        return struct.pack(f"<{len(numbers)}q", *numbers) + b"".join(c for _, c in self._regions)

    def take_back(self, raw: bytes) -> None:
        """Puts what was changed where it came from, and nothing else: other threads may be at the rest. Pointers stay
        what they are here."""
        start = len(raw) - sum(len(content) for _, content in self._regions)
        kept = {(region, at + i) for region, at, _, _ in self._pointers for i in range(8)}
        for number, (address, content) in enumerate(self._regions):
            there = np.frombuffer((ctypes.c_uint8 * len(content)).from_address(address), np.uint8)
            made = np.frombuffer(raw, np.uint8, len(content), start)
            is_changed = made != np.frombuffer(content, np.uint8)
            is_changed[[at for region, at in kept if region == number]] = False
            there[is_changed] = made[is_changed]
            start += len(content)


def _addresses(found: ctypes.Structure) -> Iterator[tuple[str, int, int]]:
    """Name, place and value of what points somewhere."""
    for name, kind, *_ in found._fields_:
        at, value = getattr(type(found), name).offset, getattr(found, name)
        if kind is ctypes.c_void_p and value:
            yield name, at, value
        elif isinstance(value, ctypes.Array) and value._type_ is ctypes.c_void_p:
            yield from ((name, at + 8 * i, one) for i, one in enumerate(value) if one)


def _readable(address: int) -> int:
    """Bytes from there to where the memory ends."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, stop = (int(word, 16) for word in line.split(maxsplit=1)[0].split("-"))
        if first <= address < stop:
            return stop - address
    raise AssertionError(f"nothing lies at {address:#x}")


def arm_tools() -> tuple[str, list[str]] | None:
    """A compiler for 64-bit Arm, and what runs its programs here; None where one of them is missing."""
    compiler = shutil.which("aarch64-linux-gnu-gcc")
    runner = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if compiler is None or runner is None:
        return None
    return compiler, [runner, "-L", "/usr/aarch64-linux-gnu"]
