"""A reader of packed models written from docs/format.md alone, by numpy: nothing of ssdtune, torch or safetensors in it.

It is what a stranger would write, slow and plain: the library is compared with it, and it with the document.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Parts = Callable[[str], np.ndarray]  # a part's suffix -> what is stored; bytes of small floats
NEWEST = 3
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4"}  # others of the format are bytes
TABLES = {
    "nf4": [
        float(x)
        for x in (
            "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 "
            "-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 "
            "0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 "
            "0.7229568362236023 1.0"
        ).split()
    ],
    "fp4": [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6],
}


def read_folder(folder: Path, bits: int | None = None) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields name, dtype and values of each tensor of a model: float32, before they are rounded to the dtype; bfloat16 as
    uint16 where it is stored as it was or without loss. bits: of nested codes. Asserts that all checksums are right."""
    told = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert told["quant_method"] == "ssdtune"
    assert told["version"] <= NEWEST
    for path in sorted(folder.glob("*.safetensors")):
        yield from read_shard(path.read_bytes(), bits)


def read_shard(raw: bytes, bits: int | None) -> Iterator[tuple[str, str, np.ndarray]]:
    """The same of one file."""
    [length] = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    told = json.loads(header.pop("__metadata__")["ssdtune.packed"])
    assert told["version"] <= NEWEST

    def stored(name: str, checksum: str) -> np.ndarray:
        described = header.pop(name)
        first, last = (8 + length + offset for offset in described["data_offsets"])
        assert checksum_of(raw[first:last]) == int(checksum, 16), name
        dtype = DTYPES.get(described["dtype"], "u1")
        return np.frombuffer(raw[first:last], dtype).reshape(described["shape"])

    for name, checksum in told.get("plain", {}).items():
        dtype = header[name]["dtype"]
        yield name, dtype, stored(name, checksum)
    for name, one in told["tensors"].items():
        sums, dtype, shape = one["checksums"], one["dtype"], one["shape"]
        format = told["formats"][one["format"]]
        values = decode(format, lambda s, n=name, c=sums: stored(f"{n}.{s}", c[s]), shape, bits)
        yield name, dtype, values.reshape(shape)


def decode(format: Mapping[str, Any], part: Parts, shape: list[int], bits: int | None) -> Any:
    """A tensor's values, flat."""
    n, kind = int(np.prod(shape)), format["kind"]
    if kind in ("affine", "rotated affine"):
        return affine(format, part, n, bits)
    if kind in TABLES:
        scales = scales_of(part("scales"), format["scale"])
        return table(part("codes"), kind, n) * each(scales, format["block"], n)
    if kind == "nvfp4":
        scales = e4m3(part("scales")) * part("global_scale")[0]
        return table(part("codes"), "fp4", n) * each(scales, 16, n)
    if kind == "fp8":
        scales = part("scales").repeat(128, axis=-2).repeat(128, axis=-1)
        return e4m3(part("codes")) * scales[..., : shape[-2], : shape[-1]]
    assert kind == "lossless", kind
    return lossless(format["bits"], part, n)


def affine(format: Mapping[str, Any], part: Parts, n: int, bits: int | None) -> np.ndarray:
    order, group = format["order"], format["group"]
    k = bits if bits and format.get("nested", True) else sum(order)
    u = part(f"zeros.{k}").astype(np.float32)
    z = (u + np.float32(0.5)) * np.float32(2.0 ** (k - 8)) - np.float32(0.5)
    s = bfloat16(part(f"scales.{k}"))
    codes = slices(order[: list(np.cumsum(order)).index(k) + 1], part)[:n].astype(np.float32)
    v = (codes - each(z, group, n)) * each(s, group, n)
    if format["kind"] == "affine":
        return v
    whole, half = n // group * group, 1
    rotated = v[:whole]
    while half < group:
        a, b = rotated.reshape(-1, 2, half).swapaxes(0, 1)
        rotated = np.stack((a + b, a - b), axis=1)
        half *= 2
    return np.concatenate((rotated.reshape(-1) * np.float32(group**-0.5), v[whole:]))


def slices(widths: list[int], part: Parts) -> np.ndarray:
    """Codes of the slices, those that fill up the last tile too. Byte i of vector v of a tile has, in bits [j b, (j + 1) b),
    element 64 (v 8/b + j) + i."""
    codes = np.zeros(1, np.uint8)
    for number, b in enumerate(widths):
        vectors = part(f"codes.{number}").reshape(-1, b, 1, 64)
        fields = vectors >> np.arange(0, 8, b, dtype=np.uint8).reshape(-1, 1) & np.uint8(2**b - 1)
        codes = (codes << np.uint8(b % 8)) | fields.reshape(-1)
    return codes


def table(codes: np.ndarray, kind: str, n: int) -> np.ndarray:
    halves = np.stack((codes & 15, codes >> 4), axis=-1).reshape(-1)[:n]
    return np.array(TABLES[kind], np.float32)[halves]


def each(of_blocks: np.ndarray, size: int, n: int) -> np.ndarray:
    """A block's value for each of its elements."""
    return of_blocks.repeat(size)[:n]


def scales_of(stored: np.ndarray, kind: str) -> np.ndarray:
    bits = stored.astype(np.float64)
    if kind == "E8M0":
        return np.where(bits == 255, np.nan, 2.0 ** (bits - 127)).astype(np.float32)
    if kind == "UE5M3":
        e, m = stored >> 3, (stored & 7).astype(np.float64)
        normal = 2.0 ** (e.astype(np.float64) - 15) * (1 + m / 8)
        value = np.where(e == 0, m * 2.0**-17, normal)
        return np.where(stored == 255, np.nan, value).astype(np.float32)
    readers = {"BF16": bfloat16, "F8_E4M3": e4m3}
    return readers.get(kind, lambda values: values.astype(np.float32))(stored)


def e4m3(stored: np.ndarray) -> np.ndarray:
    e, m = (stored >> 3 & 15).astype(np.float64), (stored & 7).astype(np.float64)
    value = np.where(e == 0, m * 2.0**-9, 2.0 ** (e - 7) * (1 + m / 8))
    value = np.where(stored & 127 == 127, np.nan, value)
    return np.where(stored >> 7, -value, value).astype(np.float32)


def bfloat16(stored: np.ndarray) -> np.ndarray:
    return (stored.astype(np.uint32) << 16).view(np.float32)


def lossless(bits: int, part: Parts, n: int) -> np.ndarray:
    """bfloat16 as uint16."""
    codes = slices([4] if bits == 4 else [2, 1], part)[:n]
    is_escape = codes == 2**bits - 1
    upper = np.append(part("dictionary"), np.uint8(0))[codes]
    upper[is_escape] = part("escapes")
    counts = np.add.reduceat(is_escape, np.arange(0, n, 4096)) if n else []
    assert np.array_equal(part("offsets"), np.cumsum([0, *counts]))
    return upper.astype(np.uint16) << 8 | part("lower")


def checksum_of(memory: bytes) -> int:
    """64 bits: lanes of a block of 16 KiB, of all blocks, and these as one."""
    total = np.arange(1, 65, dtype=np.uint32)
    for first in range(0, len(memory), 16384):
        block = memory[first : first + 16384]
        words = np.frombuffer(block + bytes(-len(block) % 256), "<u4").reshape(-1, 64)
        lanes = np.arange(1, 65, dtype=np.uint32)
        for row in words:
            lanes = mixed(lanes, row)
        total = mixed(total, lanes)
    s = len(memory)
    for lane in total.tolist():
        m = (s ^ lane) * 0x9E3779B97F4A7C15 % 2**64
        s = m ^ m >> 32
    return s


def mixed(lanes: np.ndarray, words: np.ndarray) -> np.ndarray:
    m = (lanes ^ words) * np.uint32(0x9E3779B1)
    return m ^ m >> np.uint32(15)
