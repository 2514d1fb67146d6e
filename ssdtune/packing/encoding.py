"""A group's tensors to the parts of their formats: which encoder, on which threads, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from ssdtune.kernels import lossless
from ssdtune.kernels.apart import MOST_THREADS, in_order
from ssdtune.kernels.encode import quantized
from ssdtune.kernels.formats import Format
from ssdtune.kernels.lossless import Lossless
from ssdtune.kernels.quantize import CHUNK
from ssdtune.packing.layout import Group, unpackable
from ssdtune.swap.header import TensorEntry

# Of float16 weights: a code stands for less than twice as much, and float16 ends at 2^16.
MOST_HALF = 2.0**14
Encoded = tuple[Format, Mapping[str, torch.Tensor]]
Encoder = Callable[[str, torch.Tensor, Format], Encoded | None]  # name, values, the format wanted


def all_encoded(
    group: Group, values: Mapping[str, torch.Tensor], encode: Encoder
) -> dict[str, Encoded]:
    """What is packed of a group, by name. An encoder cuts a tensor into pieces, one a thread; where many tensors, such as
    a mixture's experts, have fewer pieces than there are threads, each thread takes whole tensors."""

    def one(entry: TensorEntry) -> Encoded | None:
        return encode(entry.name, values[entry.name], group.formats[entry.name])

    wanted = [entry for entry in group.tensors if entry.name in group.formats]
    num_threads = min(torch.get_num_threads(), MOST_THREADS)
    small = [entry for entry in wanted if math.prod(entry.shape) < CHUNK * num_threads]
    if len(small) < num_threads:
        small = []
    made = dict(zip((entry.name for entry in small), in_order(one, small), strict=True))
    made |= {entry.name: one(entry) for entry in wanted if entry.name not in made}
    return {entry.name: found for entry in wanted if (found := made[entry.name]) is not None}


def encoded(name: str, values: torch.Tensor, format: Format) -> Encoded | None:
    """The parts of a tensor; None where packing it saves nothing. Raises PackError that names it."""
    if isinstance(format, Lossless):
        made = lossless.encode(values, format.bits)
        if made is None:
            return None
        found, parts = made
        suffixes = (part.suffix for part in found.parts(tuple(values.shape)))
        return found, dict(zip(suffixes, parts, strict=True))
    try:
        _refuse_large_halves(values)
        return format, quantized(values, format)
    except ValueError as error:
        raise unpackable(name, error) from error


def _refuse_large_halves(values: torch.Tensor) -> None:
    """Raises ValueError for float16 so large that a code near it could be infinite once decoded."""
    if values.dtype == torch.float16 and values.numel():
        most = float(torch.stack(torch.aminmax(values)).abs().max())
        if MOST_HALF < most < math.inf:
            raise ValueError(
                f"a magnitude of {most:g} is too large for float16, in which codes near it could be infinite."
            )
