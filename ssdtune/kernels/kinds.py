"""Packed formats by how fast they decode: one format of each kind, to be measured, and the kind that any format is of.

Beside narrow codes (up to 4 bits, and tables of 16 values), whose rate is the profile's, the others take from 1.3 to 30
times as long; within a kind, by its bits, most rates lie within a factor of 2 (`benchmarks/README.md`, "Packed
weights").
"""

from __future__ import annotations

from ssdtune.kernels.affine import ORDERS, Affine
from ssdtune.kernels.float8 import ScaledBytes
from ssdtune.kernels.formats import Format
from ssdtune.kernels.ggml import Ggml
from ssdtune.kernels.integers import Awq, Gptq, PackQuantized
from ssdtune.kernels.lossless import Lossless
from ssdtune.kernels.nibbles import NF4, NestedNibbles, Nvfp4, TurnedMxfp4
from ssdtune.kernels.rotated import Rotated

NARROW, WIDE, COLUMNS = "narrow", "wide", "columns"
EXAMPLES: dict[str, Format] = {
    NARROW: Affine(4, ORDERS[4]),
    WIDE: Affine(8, ORDERS[8]),
    "rotated": Rotated(Affine(4, ORDERS[4])),
    "nested scales": NestedNibbles(NF4, 64, 256, 0.0),
    "nvfp4": Nvfp4(is_divided=False),
    "turned": TurnedMxfp4(),
    "bytes": ScaledBytes((128, 128)),
    "words": PackQuantized(4, 128),
    COLUMNS: Gptq(4, 128),
    "ggml": Ggml("Q4_K"),
    "lossless": Lossless(bits=4, num_escapes=0),
}
_BY_TYPE = {type(format): kind for kind, format in EXAMPLES.items()} | {Awq: COLUMNS}


def kind_of(format: Format) -> str:
    """A key of EXAMPLES; NARROW for what is none of the others."""
    if isinstance(format, Affine):
        return WIDE if format.bits > 4 else NARROW
    return _BY_TYPE.get(type(format), NARROW)
