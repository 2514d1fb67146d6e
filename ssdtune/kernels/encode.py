"""Float weights to the parts of any packed format that loses bits, by its encoder."""

from __future__ import annotations

import torch

from ssdtune.kernels.affine import Affine
from ssdtune.kernels.float8 import ScaledBytes
from ssdtune.kernels.formats import Format
from ssdtune.kernels.nibbles import Nibbles, Nvfp4
from ssdtune.kernels.quantize_affine import quantize_affine
from ssdtune.kernels.quantize_fp8 import quantize_fp8
from ssdtune.kernels.quantize_nibbles import quantize_nibbles, quantize_nvfp4
from ssdtune.kernels.rotated import Rotated


def quantized(values: torch.Tensor, format: Format) -> dict[str, torch.Tensor]:
    """The format's parts, by suffix. values: as its encoder takes them. Raises ValueError where they are no numbers."""
    if isinstance(format, Affine):
        return quantize_affine(values, format.order, format.group, is_nested=format.is_nested)
    if isinstance(format, Rotated):
        stored = format.stored
        return quantize_affine(
            values, stored.order, stored.group, is_nested=stored.is_nested, is_rotated=True
        )
    if isinstance(format, Nvfp4):
        return quantize_nvfp4(values, format.num_stored)
    if isinstance(format, ScaledBytes):
        return quantize_fp8(values, format.block)
    assert isinstance(format, Nibbles)
    return quantize_nibbles(values, format.table, format.block, format.scale)
