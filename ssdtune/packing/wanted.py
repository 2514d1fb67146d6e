"""What a packing is asked for, in words: `--format nf4`, `quantization: 4`."""

from __future__ import annotations

import dataclasses

from ssdtune.errors import SSDTuneError
from ssdtune.kernels.affine import GROUPS, ORDERS, SLICE_WIDTHS, Affine
from ssdtune.kernels.formats import Format
from ssdtune.kernels.lossless import Lossless
from ssdtune.kernels.nibbles import E2M1, NF4, NestedNibbles, Nibbles, Nvfp4, TurnedMxfp4
from ssdtune.kernels.rotated import Rotated
from ssdtune.packing.widths import is_by_block, mean_of, widths_of

AFFINE = "affine"
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
    "nvfp4": Nibbles(E2M1, 16, is_high_first=False, scale="F8_E4M3"),
    "fp4-ue5m3": Nibbles(E2M1, 16, is_high_first=False, scale="UE5M3"),
    "lossless": Lossless(bits=4, num_escapes=0),  # how many there are is known once it is packed
}
FORMATS = (AFFINE, "nf4", *FIXED)


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """bits: of affine codes; order: of their slices, None: the usual one for these bits; group: elements that share a
    scale, of affine codes and nf4; is_rotated: whether groups of affine codes are rotated first."""

    format: str = AFFINE
    bits: int = 4
    order: tuple[int, ...] | None = None
    group: int = 64
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

    def chosen(self) -> Format:
        """The format. Raises SSDTuneError that names the flag."""
        if self.format not in FORMATS:
            way_out = f"Allowed: 1 to 8, 4/8, 4.5/8, 5,28x4,6/8, {', '.join(FORMATS[1:])}."
            if self.format == "auto":
                way_out = "`ssdtune plan` and `ssdtune train` choose it; here give the one that they print."
            raise SSDTuneError(f"quantization {self.format!r} is not known.\n{way_out}")
        if self.is_rotated and self.format != AFFINE:
            raise SSDTuneError(
                f"--rotate is for affine codes, not for {self.format}.\nLeave out one of --rotate and --format."
            )
        if self.format == "nf4":
            return Nibbles(NF4, self.group, is_high_first=False, scale="BF16")
        return FIXED[self.format] if self.format in FIXED else self._affine()

    def _affine(self) -> Format:
        if self.bits not in ORDERS:
            raise SSDTuneError(f"--bits {self.bits}: 1 to 8 are possible.")
        if self.group not in GROUPS:
            raise SSDTuneError(f"--group {self.group}: {', '.join(map(str, GROUPS))} are possible.")
        order = self.order or ORDERS[self.bits]
        if not set(order) <= set(SLICE_WIDTHS) or sum(order) != self.bits:
            raise SSDTuneError(
                f"--order {','.join(map(str, order))}: slices of 1, 2, 4 or 8 bits that add up to --bits {self.bits}.\n"
                "Write for instance --bits 8 --order 4,1,1,2: read at 4, 5, 6 or 8 bits."
            )
        affine = Affine(self.bits, order, self.group)
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
        return "lossless"
    if isinstance(format, Nvfp4 | TurnedMxfp4):
        return "nvfp4" if isinstance(format, Nvfp4) else "mxfp4"
    if isinstance(format, Nibbles | NestedNibbles) and format.table == NF4:
        return "nf4"  # at any block
    if isinstance(format, Nibbles) and format.table == E2M1:
        words = {(f.block, f.scale): word for word, f in FIXED.items() if isinstance(f, Nibbles)}
        return words.get((format.block, format.scale))
    return None
