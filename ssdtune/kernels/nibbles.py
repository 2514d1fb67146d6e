"""Four-bit codes that stand for sixteen values, times a scale for each block: NF4, FP4, MXFP4, NVFP4.

    w = table[q] * scale[block of the element]

Two codes in a byte, in the order in which the elements lie. Scales are float32, bfloat16, float16, or small floats:
e8m0 (2^(e - 127), 255 is no number) or e4m3. One product, rounded to float32, then to the output.

NF4: Dettmers et al., QLoRA, arXiv 2305.14314. MXFP4: OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ssdtune.kernels.formats import Part, num_elements

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# The table that bitsandbytes ships, float32's nearest to these decimals.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
SCALE_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "E8M0": torch.uint8,  # also where a file calls it U8
}
CHUNK = 1 << 20  # elements that torch's operators take at a time


@dataclasses.dataclass(frozen=True, slots=True)
class Nibbles:
    """table: the 16 values. block: elements that share a scale. is_high_first: whether the upper half of a byte is the
    element before the lower half. scale: of SCALE_DTYPES."""

    table: tuple[float, ...]
    block: int
    is_high_first: bool
    scale: str = "F32"

    @property
    def label(self) -> str:
        """For messages and tables."""
        kind = {NF4: "NF4", E2M1: "FP4"}.get(self.table, "4-bit codebook")
        return f"{kind}, blocks of {self.block}"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Codes; scales."""
        n = num_elements(shape)
        dtype = "U8" if self.scale == "E8M0" else self.scale
        return (
            Part("codes", "U8", (-(-n // 2),)),
            Part("scales", dtype, (-(-n // self.block),)),
        )

    def by_torch(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """As `Format.by_torch` says: the definition."""
        codes, scales = (part.reshape(-1) for part in parts)
        flat = out.view(-1)
        table = torch.tensor(self.table, dtype=torch.float32, device=out.device)
        chunk = CHUNK // self.block * self.block
        for first in range(0, flat.numel(), chunk):
            count = min(chunk, flat.numel() - first)
            found = codes[first // 2 : -(-(first + count) // 2)]
            halves = (found >> 4, found & 15) if self.is_high_first else (found & 15, found >> 4)
            values = table[torch.stack(halves, dim=-1).view(-1)[:count].long()]
            blocks = scales[first // self.block : -(-(first + count) // self.block)]
            scale = scale_of(blocks, self.scale).repeat_interleave(self.block)[:count]
            flat[first : first + count] = values * scale


def scale_of(scales: torch.Tensor, kind: str) -> torch.Tensor:
    """Stored scales as float32: exact."""
    if kind != "E8M0":
        return scales.float()
    # 2^-127, e = 0, is below float32's normal numbers: its bits are written down, not shifted.
    bits = scales.to(torch.int32)
    bits = torch.where(bits == 0, 0x00400000, torch.where(bits == 255, 0x7FC00000, bits << 23))
    return bits.view(torch.float32)
