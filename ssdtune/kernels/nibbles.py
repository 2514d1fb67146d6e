"""Four-bit codes that stand for sixteen values, times a scale for each block: NF4, FP4, MXFP4, NVFP4.

    w = table[q] * scale[block of the element]

Two codes in a byte, in the order in which the elements lie. Scales are float32, bfloat16, float16, or small floats:
e8m0 (2^(e - 127), 255 is no number), e4m3, or ue5m3: no sign, five bits of exponent with a bias of 15, three of
fraction, 255 is no number; from 2^-17 to 114,688. One product, rounded to float32, then to the output.

NF4: Dettmers et al., QLoRA, arXiv 2305.14314. MXFP4: OCP Microscaling Formats 1.0. NVFP4, which has a float32 scale of
the whole tensor beside those of blocks: NVIDIA, arXiv 2509.25149. UE5M3: Fasoli et al., arXiv 2601.19026: scales that
need none of the whole tensor beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from ssdtune.kernels.formats import Part, num_elements
from ssdtune.kernels.unpack import unpack

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# The table that bitsandbytes ships, float32's nearest to these decimals.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# What bitsandbytes means by FP4: another table, not E2M1's sixths.
BNB_FP4 = (
    0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 0.5, 2 / 12, 0.25,
    -0.0, -0.0625 / 12, -8 / 12, -1.0, -4 / 12, -0.5, -2 / 12, -0.25,
)  # fmt: skip
TABLES: dict[tuple[float, ...], str] = {NF4: "NF4", E2M1: "FP4", BNB_FP4: "bitsandbytes FP4"}
SCALE_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "E8M0": torch.uint8,  # also where a file calls it U8
    "UE5M3": torch.uint8,
}
NVFP4_BLOCK = 16
LARGEST_BLOCK = 4096  # of NF4 and FP4, as bitsandbytes has it
CHUNK = 1 << 20  # elements that torch's operators take at a time
SLAB = (
    1 << 22
)  # elements whose scales are computed before they are decoded: 1 MB of them at 16 elements a block


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
        return f"{TABLES.get(self.table, '4-bit codebook')}, blocks of {self.block}"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Codes; scales."""
        n = num_elements(shape)
        return (
            Part("codes", "U8", (-(-n // 2),)),
            Part("scales", file_dtype(self.scale), (-(-n // self.block),)),
        )

    def by_torch(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """As `Format.by_torch` says: the definition."""
        codes, scales = (part.reshape(-1) for part in parts)
        flat = out.view(-1)
        table = torch.tensor(self.table, dtype=torch.float32, device=out.device)
        chunk = CHUNK // (2 * self.block) * 2 * self.block  # whole blocks and whole bytes
        for first in range(0, flat.numel(), chunk):
            count = min(chunk, flat.numel() - first)
            found = codes[first // 2 : -(-(first + count) // 2)]
            halves = (found >> 4, found & 15) if self.is_high_first else (found & 15, found >> 4)
            values = table[torch.stack(halves, dim=-1).view(-1)[:count].long()]
            blocks = scales[first // self.block : -(-(first + count) // self.block)]
            scale = scale_of(blocks, self.scale).repeat_interleave(self.block)[:count]
            flat[first : first + count] = values * scale


@dataclasses.dataclass(frozen=True, slots=True)
class Slab:
    """Some elements of a tensor whose scales are computed before it is decoded. first: number of the first one."""

    first: int
    format: Nibbles
    parts: tuple[torch.Tensor, torch.Tensor]
    out: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class NestedNibbles:
    """bitsandbytes' double quantization: scales are themselves codes of 8 bits, in blocks with a scale.

        scale[b] = map[absmax[b]] * nested_absmax[b // nested_block] + offset

    The product and the sum are each rounded to float32. table, block: as `Nibbles` has them, the upper half first.
    """

    table: tuple[float, ...]
    block: int
    nested_block: int
    offset: float

    @property
    def label(self) -> str:
        """For messages and tables."""
        return f"{Nibbles(self.table, self.block, True).label}, nested scales"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Codes; codes of scales; what these stand for; their scales."""
        n = num_elements(shape)
        num_blocks = -(-n // self.block)
        return (
            Part("codes", "U8", (-(-n // 2),)),
            Part("absmax", "U8", (num_blocks,)),
            Part("nested_quant_map", "F32", (256,)),
            Part("nested_absmax", "F32", (-(-num_blocks // self.nested_block),)),
        )

    def by_torch(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """As `Format.by_torch` says: the definition."""
        for slab in self.slabs(parts, out):
            unpack(slab.format, slab.parts, slab.out)

    def slabs(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> Iterator[Slab]:
        """The tensor as plain nibbles, some at a time."""
        codes, absmax, meanings, nested = parts
        inner = Nibbles(self.table, self.block, is_high_first=True)
        for some, blocks in _slabs(out, self.block):
            number = torch.arange(blocks.start, blocks.stop, device=out.device) // self.nested_block
            scales = meanings[absmax[blocks].long()] * nested[number] + self.offset
            found = codes[some.start // 2 : -(-some.stop // 2)]
            yield Slab(some.start, inner, (found, scales), out.view(-1)[some])


NVFP4_BLOCKS = Nibbles(E2M1, NVFP4_BLOCK, is_high_first=False, scale="F8_E4M3")


@dataclasses.dataclass(frozen=True, slots=True)
class Nvfp4:
    """E2M1 in blocks of 16, low half first, with e4m3 scales and one for all of them.

    is_divided: whether the blocks' scales are divided by that one (compressed-tensors) or multiplied (ModelOpt, and what
    `ssdtune pack` writes); rounded to float32 either way. num_stored: numbers that the one for all is stored as; it is
    the first of them.
    """

    is_divided: bool
    num_stored: int = 1

    @property
    def label(self) -> str:
        """For messages and tables."""
        return "NVFP4"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Codes; scales of blocks; the scale of all."""
        n = num_elements(shape)
        return (
            Part("codes", "U8", (-(-n // 2),)),
            Part("scales", "F8_E4M3", (-(-n // NVFP4_BLOCK),)),
            Part("global_scale", "F32", (self.num_stored,)),
        )

    def by_torch(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """As `Format.by_torch` says: the definition."""
        for slab in self.slabs(parts, out):
            unpack(slab.format, slab.parts, slab.out)

    def slabs(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> Iterator[Slab]:
        """The tensor as plain nibbles, some at a time."""
        codes, scales, stored = parts
        inner = Nibbles(E2M1, NVFP4_BLOCK, is_high_first=False)
        for some, blocks in _slabs(out, NVFP4_BLOCK):
            found = self.scaled(scales[blocks], stored)
            halves = codes[some.start // 2 : -(-some.stop // 2)]
            yield Slab(some.start, inner, (halves, found), out.view(-1)[some])

    def scaled(self, scales: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        """What blocks with these e4m3 scales are multiplied by, float32. stored: the part with the one for all."""
        return scales.float() / stored[:1] if self.is_divided else scales.float() * stored[:1]


@dataclasses.dataclass(frozen=True, slots=True)
class TurnedMxfp4:
    """MXFP4 as gpt-oss has it: experts' matrices [rows, columns] in blocks of 32 along columns, low half first, for
    tensors [experts, columns, rows]."""

    @property
    def label(self) -> str:
        """For messages and tables."""
        return "MXFP4, transposed"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Codes; scales. Columns are a multiple of 32."""
        experts, width, rows = shape
        return (
            Part("blocks", "U8", (experts, rows, width // 32, 16)),
            Part("scales", "U8", (experts, rows, width // 32)),
        )

    def by_torch(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """As `Format.by_torch` says: the definition."""
        inner = Nibbles(E2M1, 32, is_high_first=False, scale="E8M0")
        _, width, rows = out.shape
        step = max(1, CHUNK // width)
        for codes, scales, turned in zip(*parts, out, strict=True):
            for first in range(0, rows, step):
                some = slice(first, min(first + step, rows))
                matrix = out.new_empty(some.stop - first, width)
                unpack(inner, (codes[some], scales[some]), matrix)
                turned[:, some] = matrix.t()


def _slabs(out: torch.Tensor, block: int) -> Iterator[tuple[slice, slice]]:
    """Some elements at a time, beginning with a block and a byte; and their blocks."""
    step = -(-SLAB // (2 * block)) * 2 * block
    for first in range(0, out.numel(), step):
        stop = min(first + step, out.numel())
        yield slice(first, stop), slice(first // block, -(-stop // block))


def file_dtype(kind: str) -> str:
    """What safetensors calls scales of that kind: bytes, where it has no name for them."""
    return "U8" if SCALE_DTYPES[kind] == torch.uint8 else kind


def scale_of(scales: torch.Tensor, kind: str) -> torch.Tensor:
    """Stored scales as float32: exact."""
    if SCALE_DTYPES[kind] != torch.uint8:
        return scales.float()
    bits = scales.to(torch.int32)
    if kind == "UE5M3":
        normal = ((bits << 20) + (127 - 15 << 23)).view(torch.float32)
        value = torch.where(bits < 8, bits * 2.0**-17, normal)
        return torch.where(bits == 255, torch.nan, value)
    # 2^-127, e = 0, is below float32's normal numbers: its bits are written down, not shifted.
    bits = torch.where(bits == 0, 0x00400000, torch.where(bits == 255, 0x7FC00000, bits << 23))
    return bits.view(torch.float32)
