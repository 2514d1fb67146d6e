"""Integer codes in words of 32 bits, as GPTQ, AWQ and compressed-tensors have them in their files.

    w[o, i] = (q[o, i] - z[o, g(i)]) * s[o, g(i)]

o: row, an output of the layer; i: column, an input; g(i): group of the column, i // group, or what a g_idx says where
columns were quantized in another order. q - z is exact in float32; the product is rounded to float32, then to the
output. The libraries multiply in the scales' dtype: into an output of that dtype the bits are theirs, into another
they round twice and this once.

Codes form *streams*, the first in the lowest bits, with no gaps: a code of 3 bits may begin in one word and end in the
next. Of GPTQ and AWQ the words of a row lie in a column of the file's tensor.

GPTQ: Frantar et al., arXiv 2210.17323; file layout of AutoGPTQ and GPTQModel. AWQ: Lin et al., arXiv 2306.00978;
AutoAWQ's "gemm". compressed-tensors: its "pack-quantized".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch

from ssdtune.kernels.formats import Part

CHUNK = 1 << 18  # elements that torch's operators take at a time: 1 MB of float32, several times
RUN = 32  # codes after which a stream is at the beginning of a word, whatever their width
GPTQ_BITS = (2, 3, 4, 8)
# Where in a word of AWQ's is output 8 c + r of column c: in the bits from 4 AWQ_ORDER[r] on.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclasses.dataclass(frozen=True, slots=True)
class Gptq:
    """bits: one of GPTQ_BITS. group: columns that share a scale. is_v1: whether zeros are stored less one. is_ordered:
    whether a g_idx says which group a column is in. scale: dtype of the scales."""

    bits: int
    group: int
    is_v1: bool = True
    is_ordered: bool = False
    scale: str = "F16"

    def __post_init__(self) -> None:
        assert self.bits in GPTQ_BITS, self.bits

    @property
    def label(self) -> str:
        """For messages and tables."""
        order = ", in an order of their own" if self.is_ordered else ""
        return f"GPTQ, {self.bits} bits, groups of {self.group}{order}"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Codes, zeros, scales, all with one column for each row of the tensor; groups of the columns."""
        rows, width = shape
        groups = num_groups(width, self.group)
        return (
            Part("qweight", "I32", (num_words(width, self.bits), rows)),
            Part("qzeros", "I32", (groups, num_words(rows, self.bits))),
            Part("scales", self.scale, (groups, rows)),
            *([Part("g_idx", "I32", (width,))] * self.is_ordered),
        )

    def by_torch(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """As `Format.by_torch` says: the definition."""
        order = parts[3] if self.is_ordered else None
        for some in row_slices(*out.shape):
            codes = stream(parts[0][:, some].t(), self.bits)
            put_rows(out[some], codes, *self.scaling(parts, some), self.group, order)

    def scaling(
        self, parts: Sequence[torch.Tensor], some: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """z and s of a few rows, [rows, groups], s in float32. some: begins at a multiple of RUN."""
        _, zero_words, scales, *_ = parts
        columns = slice(some.start * self.bits // 32, num_words(some.stop, self.bits))
        zeros = self._zeros(zero_words[:, columns])[:, : some.stop - some.start]
        return zeros.t(), scales[:, some].t().float()

    def _zeros(self, words: torch.Tensor) -> torch.Tensor:
        """z of a few columns of stored words [groups, words]: [groups, codes].

        What v1 subtracted before it wrote is added again. Except with 3 bits its writer subtracts from whole words, so
        that a zero of 0 borrows from its neighbour; the same done backwards returns both (GPTQModel's
        convert_gptq_v2_to_v1_format_module).
        """
        if not self.is_v1:
            return stream(words, self.bits)
        if self.bits == 3:
            return (stream(words, self.bits) + 1) & 7
        return stream(words + sum(1 << k for k in range(0, 32, self.bits)), self.bits)


@dataclasses.dataclass(frozen=True, slots=True)
class Awq:
    """group: columns that share a scale. scale: dtype of the scales."""

    group: int
    scale: str = "F16"
    bits: ClassVar[int] = 4
    is_ordered: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """For messages and tables."""
        return f"AWQ, 4 bits, groups of {self.group}"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Codes, zeros, scales, along rows of the tensor, of which there are a multiple of 8."""
        rows, width = shape
        groups = num_groups(width, self.group)
        return (
            Part("qweight", "I32", (width, rows // 8)),
            Part("qzeros", "I32", (groups, rows // 8)),
            Part("scales", self.scale, (groups, rows)),
        )

    def by_torch(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """As `Format.by_torch` says: the definition."""
        for some in row_slices(*out.shape):
            codes = _awq_codes(parts[0][:, some.start // 8 : some.stop // 8])
            put_rows(out[some], codes, *self.scaling(parts, some), self.group)

    def scaling(
        self, parts: Sequence[torch.Tensor], some: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """z and s of a few rows, [rows, groups], s in float32. some: begins at a multiple of 8."""
        _, zero_words, scales = parts
        zeros = _awq_codes(zero_words[:, some.start // 8 : some.stop // 8])
        return zeros, scales[:, some].t().float()


@dataclasses.dataclass(frozen=True, slots=True)
class PackQuantized:
    """bits: 1 to 8. group: columns that share a scale. has_zeros: else they are 2^(bits - 1). is_ordered: whether a
    g_idx says which group a column is in. scale: dtype of the scales."""

    bits: int
    group: int
    has_zeros: bool = False
    is_ordered: bool = False
    scale: str = "BF16"

    def __post_init__(self) -> None:
        assert 1 <= self.bits <= 8, self.bits

    @property
    def label(self) -> str:
        """For messages and tables."""
        order = ", in an order of their own" if self.is_ordered else ""
        return f"compressed-tensors, {self.bits} bits, groups of {self.group}{order}"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Codes and scales along columns; zeros along rows; groups of the columns."""
        rows, width = shape
        groups = num_groups(width, self.group)
        zeros = Part("weight_zero_point", "I32", (num_words(rows, self.bits), groups))
        return (
            Part("weight_packed", "I32", (rows, num_words(width, self.bits))),
            Part("weight_scale", self.scale, (rows, groups)),
            *([zeros] * self.has_zeros),
            *([Part("weight_g_idx", "I32", (width,))] * self.is_ordered),
        )

    def by_torch(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """As `Format.by_torch` says: the definition."""
        order = parts[-1] if self.is_ordered else None
        for some in row_slices(*out.shape):
            codes = stream(parts[0][some], self.bits)
            put_rows(out[some], codes, *self.scaling(parts, some), self.group, order)

    def scaling(
        self, parts: Sequence[torch.Tensor], some: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """z and s of a few rows, [rows, groups], z on the scale of what is stored, s in float32. some: begins at a
        multiple of RUN."""
        scales = parts[1][some].float()
        if not self.has_zeros:
            return torch.full_like(scales, 2 ** (self.bits - 1)), scales
        words = slice(some.start * self.bits // 32, num_words(some.stop, self.bits))
        zeros = stream(parts[2][words].t(), self.bits)[:, : some.stop - some.start]
        return zeros.t(), scales


def num_words(num_codes: int, bits: int) -> int:
    """Words of 32 bits that a stream of so many codes takes."""
    return -(-num_codes * bits // 32)


def num_groups(width: int, group: int) -> int:
    """The last one may be short."""
    return -(-width // group)


def row_slices(num_rows: int, per_row: int, most: int = CHUNK) -> Iterator[slice]:
    """A few rows at a time, beginning at multiples of RUN. per_row: numbers of which at most so many are wanted."""
    step = max(1, most // (RUN * max(per_row, 1))) * RUN
    return (slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step))


def stream(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes of streams: int32 [..., words] to integers [..., codes], those that fill up the last word too."""
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        by_byte = words.reshape(-1).contiguous().view(torch.uint8).unsqueeze(-1)
        return ((by_byte >> shifts) & (2**bits - 1)).view(*words.shape[:-1], -1)
    runs = torch.nn.functional.pad(words, (0, -words.shape[-1] % bits)).unflatten(-1, (-1, bits))
    start = torch.arange(RUN, dtype=torch.int32, device=words.device) * bits
    word, shift = (start // 32).long(), start % 32
    spilt = (shift + bits - 32).clamp(min=0)  # bits of a code that are in the next word
    # int32's shift repeats the sign: what comes in is masked away.
    low = (runs[..., word] >> shift) & ((1 << bits - spilt) - 1)
    high = runs[..., (word + 1).clamp(max=bits - 1)] & ((1 << spilt) - 1)
    return (low | high << bits - spilt).flatten(-2)


def _awq_codes(words: torch.Tensor) -> torch.Tensor:
    """int32 [columns, words] to codes [8 words, columns]."""
    shifts = 4 * torch.tensor(AWQ_ORDER, dtype=torch.int32, device=words.device)
    turned = words.t().contiguous().unsqueeze(1)
    return ((turned >> shifts.view(1, 8, 1)) & 15).flatten(0, 1)


def put_rows(
    out: torch.Tensor,
    codes: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    group: int,
    order: torch.Tensor | None = None,
) -> None:
    """out = (codes - zeros) * scales, rounded.

    out: [rows, columns]. codes: [rows, at least as many columns]. zeros, scales: [rows, groups], scales in float32.
    order: group of each column; None: each column's number // group.
    """
    rows, width = out.shape
    values = codes[:, :width].float()
    number = None  # of a column's group; None where all groups are whole and in their order
    if order is not None:
        number = order.long()
    elif width % group == 0:
        values = values.view(rows, -1, group)
    else:
        number = torch.arange(width, device=out.device) // group
    values -= _spread(zeros.float(), number)
    values *= _spread(scales, number)
    out.copy_(values.view(rows, width))


def _spread(per_group: torch.Tensor, number: torch.Tensor | None) -> torch.Tensor:
    """[rows, groups] so that it broadcasts to the columns."""
    return per_group.unsqueeze(2) if number is None else per_group.index_select(1, number)
