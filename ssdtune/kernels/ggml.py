"""ggml's quantized types, as GGUF files hold them: blocks of bytes, each with its codes and their scales.

    w = (q - z) * s - m        q: a code, or what a table has for it; z: the kind's; s, m: of 16 or 32 codes

Q4_0 ... Q8_0 store s (and m) as float16 for blocks of 32. The K kinds have blocks of 256, in which s and m are products
of a float16 and an integer: two roundings, to float32 each, before those of w. A row of a tensor is whole blocks.

F32, F16 and BF16 are kinds too, with blocks of one value: for tensors that were moved (`ggml_moved.py`).

ggml: ggml-common.h (what lies in a block) and ggml-quants.c, `dequantize_row_*`; the bits are those of its Python
package, `gguf.quants`. MXFP4 there has no NaN: a scale of 255 is 2^128, its half times a table of whole numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ssdtune.kernels.formats import Part, num_elements

CHUNK = 1 << 19  # elements that torch's operators take at a time: a few MB of float32
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
DOUBLED_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class Kind(NamedTuple):
    """number: ggml's of the type. decode: uint8 [blocks, num_bytes] to float32 [blocks, block]."""

    number: int
    block: int  # elements
    num_bytes: int
    decode: Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class Ggml:
    """kind: of KINDS, as ggml names it."""

    kind: str

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind

    @property
    def label(self) -> str:
        """For messages and tables."""
        return f"GGUF, {self.kind}"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Blocks. The last dimension is a multiple of the kind's block."""
        kind = KINDS[self.kind]
        return (Part("blocks", "U8", (num_elements(shape) // kind.block * kind.num_bytes,)),)

    def by_torch(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """As `Format.by_torch` says: the definition."""
        _, block, num_bytes, decode = KINDS[self.kind]
        blocks, values = parts[0].view(-1, num_bytes), out.view(-1, block)
        step = CHUNK // block
        for first in range(0, len(blocks), step):
            some = slice(first, first + step)
            values[some] = decode(blocks[some])


def spread(packed: torch.Tensor, width: int, run: int) -> torch.Tensor:
    """Fields of `width` bits, uint8 [blocks, bytes] to [blocks, bytes * 8 / width].

    Of every `run` bytes the lowest fields come first, then those above them, to the highest.
    """
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    runs = packed.unflatten(1, (-1, 1, run))
    return ((runs >> shifts.view(-1, 1)) & (2**width - 1)).flatten(1)


def scaled(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: int = 0,
    minimum: torch.Tensor | None = None,
) -> torch.Tensor:
    """(codes - zero) * scale - minimum, each product and difference rounded. codes: [blocks, elements]. scale, minimum:
    float32 [blocks, n], for as many runs of codes."""
    values = (codes.float() - zero).unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(2)
    if minimum is not None:
        values -= minimum.unsqueeze(2)
    return values.flatten(1)


def half_at(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 in bytes `at` and the next of each block, as float32 [blocks, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def looked_up(codes: torch.Tensor, table: Sequence[int]) -> torch.Tensor:
    """What the table has for codes, float32."""
    return torch.tensor(table, dtype=torch.float32, device=codes.device)[codes.long()]


def scales_and_mins(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of 6 bits in 12 bytes, as Q4_K and Q5_K have them; float32 [blocks, 8] each.

    The first four of each lie in the lower 6 bits of bytes 0-3 and 4-7; the others have 4 bits in bytes 8-11, and
    their upper 2 in the bits that the first four leave.
    """
    scale, minimum, low = packed.split(4, dim=1)
    scales = torch.cat((scale & 63, (low & 15) | (scale >> 6) << 4), dim=1)
    minima = torch.cat((minimum & 63, (low >> 4) | (minimum >> 6) << 4), dim=1)
    return scales.float(), minima.float()


def _q4_0(b: torch.Tensor) -> torch.Tensor:
    return scaled(spread(b[:, 2:], 4, 16), half_at(b, 0), zero=8)


def _q4_1(b: torch.Tensor) -> torch.Tensor:
    return scaled(spread(b[:, 4:], 4, 16), half_at(b, 0), minimum=-half_at(b, 2))


def _q5_0(b: torch.Tensor) -> torch.Tensor:
    codes = spread(b[:, 6:], 4, 16) | spread(b[:, 2:6], 1, 1) << 4
    return scaled(codes, half_at(b, 0), zero=16)


def _q5_1(b: torch.Tensor) -> torch.Tensor:
    codes = spread(b[:, 8:], 4, 16) | spread(b[:, 4:8], 1, 1) << 4
    return scaled(codes, half_at(b, 0), minimum=-half_at(b, 2))


def _q8_0(b: torch.Tensor) -> torch.Tensor:
    return scaled(b[:, 2:].view(torch.int8), half_at(b, 0))


def _q2_k(b: torch.Tensor) -> torch.Tensor:
    low, high = (b[:, :16] & 15).float(), (b[:, :16] >> 4).float()
    scale, minimum = half_at(b, 80) * low, half_at(b, 82) * high
    return scaled(spread(b[:, 16:80], 2, 32), scale, minimum=minimum)


def _q3_k(b: torch.Tensor) -> torch.Tensor:
    codes = spread(b[:, 32:96], 2, 32) | spread(b[:, :32], 1, 32) << 2
    scales = spread(b[:, 96:104], 4, 8) | spread(b[:, 104:108], 2, 4) << 4
    return scaled(codes, half_at(b, 108) * (scales.float() - 32), zero=4)


def _q4_k(b: torch.Tensor) -> torch.Tensor:
    scales, minima = scales_and_mins(b[:, 4:16])
    codes = spread(b[:, 16:], 4, 32)
    return scaled(codes, half_at(b, 0) * scales, minimum=half_at(b, 2) * minima)


def _q5_k(b: torch.Tensor) -> torch.Tensor:
    scales, minima = scales_and_mins(b[:, 4:16])
    codes = spread(b[:, 48:], 4, 32) | spread(b[:, 16:48], 1, 32) << 4
    return scaled(codes, half_at(b, 0) * scales, minimum=half_at(b, 2) * minima)


def _q6_k(b: torch.Tensor) -> torch.Tensor:
    codes = spread(b[:, :128], 4, 64) | spread(b[:, 128:192], 2, 32) << 4
    return scaled(codes, half_at(b, 208) * b[:, 192:208].view(torch.int8).float(), zero=32)


def _iq4_nl(b: torch.Tensor) -> torch.Tensor:
    return scaled(looked_up(spread(b[:, 2:], 4, 16), IQ4), half_at(b, 0))


def _iq4_xs(b: torch.Tensor) -> torch.Tensor:
    scales = spread(b[:, 4:8], 4, 1) | spread(b[:, 2:4], 2, 1) << 4
    values = looked_up(spread(b[:, 8:], 4, 16), IQ4)
    return scaled(values, half_at(b, 0) * (scales.float() - 32))


def _mxfp4(b: torch.Tensor) -> torch.Tensor:
    e = b[:, :1].to(torch.int32)
    # Half of 2^(e - 127), for the table is doubled. Of 0 and 1 that is below float32's normal numbers.
    bits = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1) << 23)
    return scaled(looked_up(spread(b[:, 1:], 4, 16), DOUBLED_E2M1), bits.view(torch.float32))


def _plain(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    # A copy: bytes need not lie where a value of this dtype may.
    return lambda b: b.clone(memory_format=torch.contiguous_format).view(dtype).float()


KINDS: dict[str, Kind] = {
    "F32": Kind(0, 1, 4, _plain(torch.float32)),
    "F16": Kind(1, 1, 2, _plain(torch.float16)),
    "BF16": Kind(30, 1, 2, _plain(torch.bfloat16)),
    "Q4_0": Kind(2, 32, 18, _q4_0),
    "Q4_1": Kind(3, 32, 20, _q4_1),
    "Q5_0": Kind(6, 32, 22, _q5_0),
    "Q5_1": Kind(7, 32, 24, _q5_1),
    "Q8_0": Kind(8, 32, 34, _q8_0),
    "Q2_K": Kind(10, 256, 84, _q2_k),
    "Q3_K": Kind(11, 256, 110, _q3_k),
    "Q4_K": Kind(12, 256, 144, _q4_k),
    "Q5_K": Kind(13, 256, 176, _q5_k),
    "Q6_K": Kind(14, 256, 210, _q6_k),
    "IQ4_NL": Kind(20, 32, 18, _iq4_nl),
    "IQ4_XS": Kind(23, 256, 136, _iq4_xs),
    "MXFP4": Kind(39, 32, 17, _mxfp4),
}
