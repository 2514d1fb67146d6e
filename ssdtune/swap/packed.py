"""Tensors that several file tensors stand for together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from ssdtune.kernels.affine import Affine
from ssdtune.kernels.formats import Format
from ssdtune.kernels.rotated import Rotated
from ssdtune.swap.header import TensorEntry


@dataclasses.dataclass(frozen=True, slots=True)
class PackedEntry:
    """A packed tensor, under the name, shape and dtype that it has once decoded.

    dtype: as safetensors names it. parts: in the order of `format.parts(shape)`, whose dtypes and shapes they have.
    """

    name: str
    path: Path  # of the first part
    dtype: str
    shape: tuple[int, ...]
    format: Format
    parts: tuple[TensorEntry, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in files."""
        return sum(part.num_bytes for part in self.parts)


def affine_of(format: Format) -> Affine | None:
    """The affine codes that a format stores, rotated or not; None: it has others."""
    stored = format.stored if isinstance(format, Rotated) else format
    return stored if isinstance(stored, Affine) else None


def reading_of(tensors: Mapping[str, TensorEntry | PackedEntry]) -> str | None:
    """In how many bits nested codes are read: "4"; "4, 5 (a1b2c3d4)" where tensors differ, with a digest of which are
    read in how many; None where there are none. The same files in other bits are other weights."""
    bits: dict[str, int] = {}
    for name, entry in tensors.items():
        codes = affine_of(entry.format) if isinstance(entry, PackedEntry) else None
        if codes is not None and codes.is_nested:
            bits[name] = codes.bits
    widths = sorted(set(bits.values()))
    words = ", ".join(map(str, widths)) or None
    if len(widths) < 2:
        return words
    digest = hashlib.sha256(json.dumps(bits, sort_keys=True).encode())
    return f"{words} ({digest.hexdigest()[:8]})"
