"""Activations or gradients in a byte each, to cross a link in a quarter or half of the time.

    s = largest |x| of a group / 127        q = clamp(round(x / s), -127, 127)        x is read back as q s

A group is `group` neighbours in a row; a row's last one may be cut. Quotients are float32, each rounded once; `round` is
to nearest, ties to even. At random it is floor(x / s + u), u = k 2^-24, k the upper 24 bits of the element's field of 32
bits (`philox.CODES`, elements numbered in row-major order): the mean over keys is x, to 2^-17 of a step. A group with what
is no finite number is read back as NaNs, so that nobody takes it for sound.

What comes out are the parts of a format that is read already, `ScaledBytes((1, group), "I8")`: `unpack.unpack` decodes
it to any dtype, on any device. Stochastic rounding where sums shall not drift: Chen et al., FP4 All the Way, arXiv
2505.19115. Nothing here decides what crosses a link so: it changes the bits of training.
"""

from __future__ import annotations

import torch

from ssdtune.kernels import philox
from ssdtune.kernels.float8 import ScaledBytes
from ssdtune.kernels.native import has_triton
from ssdtune.kernels.requantize import UNIT
from ssdtune.kernels.unpack import TRITON

GROUPS = (32, 64, 128)
LARGEST = 127


def format_of(group: int) -> ScaledBytes:
    """What `pack` makes, for `unpack.unpack`."""
    assert group in GROUPS, group
    return ScaledBytes((1, group), codes="I8")


def pack(
    values: torch.Tensor, group: int = 128, *, key: int | None = None, suffix: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, int8 [rows, columns], and scales, float32 [rows, groups], on the device of the values.

    values: float32, bfloat16 or float16 [rows, columns], contiguous. group: one of GROUPS. key: of 64 bits, rounds at
    random; None: to nearest. suffix: TRITON for its kernel, "" for torch; None: the best there is."""
    codes, scales = format_of(group).parts(tuple(values.shape))
    assert values.is_contiguous()
    made = (
        torch.empty(codes.shape, dtype=torch.int8, device=values.device),
        torch.empty(scales.shape, dtype=torch.float32, device=values.device),
    )
    if not values.numel():
        return made
    if suffix is None:
        suffix = TRITON if values.device.type == "cuda" and has_triton() else ""
    if suffix == TRITON:
        from ssdtune.kernels.transfer_triton import by_triton

        by_triton(*made, values, group, key)
    else:
        _by_torch(*made, values, group, key)
    return made


def _by_torch(
    codes: torch.Tensor, scales: torch.Tensor, values: torch.Tensor, group: int, key: int | None
) -> None:
    """The definition."""
    rows, columns = values.shape
    largest = _grouped(values.float().abs(), group).amax(-1)
    scales.copy_(torch.where(largest.isfinite(), largest / LARGEST, torch.nan))
    steps = _grouped(values.float(), group) / scales.unsqueeze(-1)
    if key is None:
        whole = steps.round()
    else:
        field = philox.fields(
            key, 0, values.numel(), bits=32, domain=philox.CODES, device=values.device
        )
        whole = (steps + _grouped((field >> 8).float().view(rows, columns) * UNIT, group)).floor()
    whole = torch.where(whole.isnan(), 0.0, whole).clamp(-LARGEST, LARGEST)
    codes.copy_(whole.view(rows, -1)[:, :columns])


def _grouped(values: torch.Tensor, group: int) -> torch.Tensor:
    """[rows, columns] as [rows, groups, group], the last ones filled up with zeros."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % group))
    return padded.view(len(values), -1, group)
