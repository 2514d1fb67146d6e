"""What a packing is asked for, in words: `--format nf4`, `quantization: 4`."""

from __future__ import annotations

import dataclasses
import math

from ssdtune.errors import SSDTuneError
from ssdtune.kernels.affine import GROUPS, ORDERS, SLICE_WIDTHS, Affine
from ssdtune.kernels.float8 import ScaledBytes
from ssdtune.kernels.formats import Format
from ssdtune.kernels.lossless import Lossless
from ssdtune.kernels.nibbles import (
    E2M1,
    LARGEST_BLOCK,
    NF4,
    NVFP4_BLOCK,
    NVFP4_BLOCKS,
    NestedNibbles,
    Nibbles,
    Nvfp4,
    TurnedMxfp4,
)
from ssdtune.kernels.rotated import Rotated
from ssdtune.packing.widths import is_by_block, mean_of, widths_of
from ssdtune.swap.pack_header import OWN_FP8, OWN_NVFP4

AFFINE, FP8, LOSSLESS = "affine", "fp8", "lossless"
USUAL_BITS, USUAL_GROUP = 4, 64
# So many bits read of a nested file of 8, which is packed once and can be read at other widths later.
NESTED = {
    "6/8": (4, 1, 1, 2),
    "5/8": (4, 1, 1, 2),
    "4/8": (4, 1, 1, 2),
    "3/8": (2, 1, 1, 2, 2),
    "2/8": (2, 1, 1, 2, 2),
}
FIXED: dict[str, Format] = {  # nothing about them can be chosen
    "mxfp4": Nibbles(E2M1, 32, is_high_first=False, scale="E8M0"),
    "nvfp4": OWN_NVFP4,
    "fp4-ue5m3": Nibbles(E2M1, 16, is_high_first=False, scale="UE5M3"),
    FP8: OWN_FP8,
}
# What `nvfp4` was in version 1 of the format, without a scale of the whole tensor: read, no longer written.
FIRST_NVFP4 = NVFP4_BLOCKS
FORMATS = (AFFINE, "nf4", *FIXED, LOSSLESS)
# Bits and groups that other formats than affine codes can be asked for; where groups are not here, any.
BITS = {"nf4": (4,), **dict.fromkeys(FIXED, (4,)), FP8: (8,), LOSSLESS: (4, 3)}
BLOCKS = {
    "mxfp4": (32,),
    "nvfp4": (NVFP4_BLOCK,),
    "fp4-ue5m3": (16,),
    FP8: (math.prod(OWN_FP8.block),),
    LOSSLESS: (),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """bits: of affine codes, or of a lossless dictionary's; order: of affine codes' slices; group: elements that share a
    scale, of affine codes and nf4; None: the usual ones. is_rotated: whether groups of affine codes are rotated first."""

    format: str = AFFINE
    bits: int | None = None
    order: tuple[int, ...] | None = None
    group: int | None = None
    is_rotated: bool = False

    @staticmethod
    def of(quantization: str) -> Wanted:
        """What the key `quantization` stands for: "4", "4/8", "4.5/8", "5,28x4,6/8" or "nf4"."""
        if quantization in NESTED:
            return Wanted(bits=8, order=NESTED[quantization])
        if is_by_block(quantization):
            least = mean_of(quantization) or min(widths_of(quantization))
            return Wanted(bits=8, order=NESTED["4/8" if least >= 4 else "3/8"])
        if quantization.isdigit():
            return Wanted(bits=int(quantization))
        return Wanted(format=quantization)

    @property
    def group_size(self) -> int:
        """Elements that share a scale, of affine codes and nf4."""
        return USUAL_GROUP if self.group is None else self.group

    def chosen(self) -> Format:
        """The format. Raises SSDTuneError that names the flag, also where the format has no use for it."""
        if self.format not in FORMATS:
            way_out = f"Allowed: 1 to 8, 4/8, 4.5/8, 5,28x4,6/8, {', '.join(FORMATS[1:])}."
            if self.format == "auto":
                way_out = "`ssdtune plan` and `ssdtune train` choose it; here give the one that they print."
            raise SSDTuneError(f"quantization {self.format!r} is not known.\n{way_out}")
        if self.format == AFFINE:
            return self._affine()
        self._check_flags()
        self._check_group()
        if self.format == "nf4":
            return Nibbles(NF4, self.group_size, is_high_first=False, scale="BF16")
        if self.format == LOSSLESS:  # how many escapes there are is known once it is packed
            return Lossless(bits=self.bits or USUAL_BITS, num_escapes=0)
        return FIXED[self.format]

    def _check_flags(self) -> None:
        """Raises SSDTuneError for what this format, which is not affine codes, would pass over."""
        for flag, is_given in (("--rotate", self.is_rotated), ("--order", self.order is not None)):
            if is_given:
                raise SSDTuneError(
                    f"{flag} is for affine codes, not for {self.format}.\nLeave out one of {flag} and --format."
                )
        widths = BITS[self.format]
        if self.bits is not None and self.bits not in widths:
            raise SSDTuneError(
                f"--bits {self.bits}: {self.format} has {' or '.join(map(str, widths))}.\n"
                "Leave out --bits, or --format: affine codes have 1 to 8."
            )

    def _check_group(self) -> None:
        """The same for --group."""
        blocks = BLOCKS.get(self.format)
        if blocks is None:
            if not 1 <= self.group_size <= LARGEST_BLOCK:
                raise SSDTuneError(
                    f"--group {self.group}: 1 to {LARGEST_BLOCK} weights share a scale."
                )
        elif self.group not in (None, *blocks):
            own = f"shares a scale among {blocks[0]} weights" if blocks else "has no scales"
            raise SSDTuneError(f"--group {self.group}: {self.format} {own}.\nLeave out --group.")

    def _affine(self) -> Format:
        bits = USUAL_BITS if self.bits is None else self.bits
        if bits not in ORDERS:
            raise SSDTuneError(f"--bits {bits}: 1 to 8 are possible.")
        if self.group_size not in GROUPS:
            raise SSDTuneError(
                f"--group {self.group_size}: {', '.join(map(str, GROUPS))} are possible."
            )
        order = self.order or ORDERS[bits]
        if not set(order) <= set(SLICE_WIDTHS) or sum(order) != bits:
            raise SSDTuneError(
                f"--order {','.join(map(str, order))}: slices of 1, 2, 4 or 8 bits that add up to --bits {bits}.\n"
                "Write for instance --bits 8 --order 4,1,1,2: read at 4, 5, 6 or 8 bits."
            )
        affine = Affine(bits, order, self.group_size)
        return Rotated(affine) if self.is_rotated else affine


def bits_of(quantization: str) -> int | None:
    """Bits that are read of nested codes: of "4" or "4/8", 4; None: all that are there, or blocks have their own."""
    bits = quantization.split("/")[0]
    return int(bits) if bits.isdigit() else None


def word_of(format: Format) -> str | None:
    """What the key `quantization` calls a format, whoever packed it: "4", "nf4"; None: it has no word for it."""
    if isinstance(format, Rotated):
        format = format.stored
    if isinstance(format, Affine):
        return str(format.bits)
    if isinstance(format, Lossless):
        return LOSSLESS
    if format == FIRST_NVFP4 or isinstance(format, Nvfp4):
        return "nvfp4"
    if isinstance(format, TurnedMxfp4):
        return "mxfp4"
    if isinstance(format, ScaledBytes) and format.codes == OWN_FP8.codes:
        return FP8  # in any blocks
    if isinstance(format, Nibbles | NestedNibbles) and format.table == NF4:
        return "nf4"  # at any block
    if isinstance(format, Nibbles) and format.table == E2M1:
        words = {(f.block, f.scale): w for w, f in FIXED.items() if isinstance(f, Nibbles)}
        return words.get((format.block, format.scale))
    return None
