"""Tensors that several file tensors stand for together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ssdtune.kernels.formats import Format
from ssdtune.swap.header import TensorEntry


@dataclasses.dataclass(frozen=True, slots=True)
class PackedEntry:
    """A packed tensor, under the name, shape and dtype that it has once decoded.

    dtype: as safetensors names it. parts: in the order of `format.parts(shape)`, whose dtypes and shapes they have.
    checksums: of the parts, where the file has them.
    """

    name: str
    path: Path  # of the first part
    dtype: str
    shape: tuple[int, ...]
    format: Format
    parts: tuple[TensorEntry, ...]
    checksums: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes in files."""
        return sum(part.num_bytes for part in self.parts)
