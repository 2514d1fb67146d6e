"""base + directions, rounded once: how weights are perturbed and updated when gradients are estimated.

A *direction* is a random tensor that a key stands for, times a scale. Its values are looked up, never computed by a
transcendental function, whose last bits differ between libraries:

    Gaussian     8 bits an element: a quantile of the normal distribution, one of 256. Mean 0, variance 1,
                 kurtosis 2.918 (a normal one's is 3), largest value 2.893.
    Rademacher   1 bit an element: +1 where it is set, -1 where it is not.

    to = round(base * decay + scale_1 z_1 + scale_2 z_2 + ...)

in float32, from left to right, each scale x z rounded to float32 beforehand. Rounded to nearest, or, where a key for
it is given, bfloat16 and float16 by the random bits of `philox.ROUNDING`. Of float16 torch's operators take care alone.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch

from ssdtune.kernels import philox
from ssdtune.kernels.native import has_triton, library
from ssdtune.kernels.structs import struct
from ssdtune.kernels.team import run_by_all

GAUSSIAN, RADEMACHER = "gaussian", "rademacher"
KINDS = (GAUSSIAN, RADEMACHER)
# The upper half of 256 quantiles of the normal distribution, at (k + 1/2) / 256, in units of 1/4096.
QUANTILES = (
    20, 60, 100, 140, 181, 221, 261, 301, 341, 382, 422, 462, 503, 543, 584, 624,
    665, 705, 746, 787, 828, 869, 910, 951, 992, 1034, 1075, 1117, 1158, 1200, 1242, 1284,
    1326, 1369, 1411, 1454, 1497, 1539, 1583, 1626, 1669, 1713, 1757, 1801, 1845, 1890, 1935, 1979,
    2025, 2070, 2116, 2162, 2208, 2255, 2301, 2348, 2396, 2444, 2492, 2540, 2589, 2638, 2688, 2738,
    2788, 2839, 2890, 2942, 2994, 3046, 3100, 3153, 3207, 3262, 3318, 3374, 3430, 3487, 3545, 3604,
    3664, 3724, 3785, 3847, 3910, 3973, 4038, 4104, 4170, 4238, 4307, 4378, 4450, 4523, 4597, 4673,
    4751, 4830, 4912, 4995, 5080, 5168, 5258, 5351, 5447, 5545, 5647, 5753, 5863, 5977, 6095, 6219,
    6350, 6486, 6631, 6784, 6948, 7123, 7312, 7519, 7746, 8001, 8290, 8628, 9038, 9565, 10324, 11820,
)  # fmt: skip
# What makes their variance 1: the square root is IEEE's, the same everywhere.
UNIT = 1 / math.sqrt(sum(q * q for q in QUANTILES) / len(QUANTILES))
LARGEST_GAUSSIAN = UNIT * QUANTILES[-1]
FIELD_BITS = {GAUSSIAN: 8, RADEMACHER: 1}
TILE = 8192  # elements; parts of a tensor begin at its multiples
ROUNDING_TILE = philox.tile_size(16)
PART = 64 * TILE  # elements that torch's operators take at a time
NATIVE_PART = 8 * TILE  # that a thread of the native code takes at a time
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # that the native code and the kernels know
FLOAT32_EXPONENT = 0x7F800000  # its bits
LARGEST_FLOAT16 = 65504.0
TRITON = "_triton"


@dataclasses.dataclass(frozen=True, slots=True)
class Direction:
    """scale x z, z from a key of 64 bits. kind: "gaussian" or "rademacher"."""

    key: int
    scale: float
    kind: str = GAUSSIAN

    def values(self) -> list[float]:
        """What a field stands for, scaled and rounded to float32: by field for Gaussian ones (256), for Rademacher
        ones without and with the bit set."""
        return list(_table(self.scale, self.kind))


def _table(scale: float, kind: str) -> ctypes.Array[ctypes.c_float]:
    """scale x z of each field. Of -0.0 that of 0.0: they are one key of the cache, whichever comes first."""
    return _table_of(scale + 0.0, kind)


@lru_cache(maxsize=64)  # all parameters of a step have the same few scales
def _table_of(scale: float, kind: str) -> ctypes.Array[ctypes.c_float]:
    halves = (-1.0, 1.0)
    if kind == GAUSSIAN:
        halves = tuple(q * UNIT for q in (*(-q for q in reversed(QUANTILES)), *QUANTILES))
    return (ctypes.c_float * len(halves))(*(scale * z for z in halves))


@lru_cache(maxsize=64)
def table_on(device: torch.device, scale: float, kind: str) -> torch.Tensor:
    """What `Direction.values` says, on a device, float32."""
    return torch.tensor(list(_table(scale, kind)), dtype=torch.float32, device=device)


# to, base, directions, decay, rounding key, first: as `add_directions` has them.
Adder = Callable[[torch.Tensor, torch.Tensor, Sequence[Direction], float, int | None, int], None]


def add_directions(  # noqa: PLR0913 - the last two are for parts of a tensor, and for tests
    to: torch.Tensor,
    base: torch.Tensor,
    directions: Sequence[Direction],
    *,
    decay: float = 1.0,
    rounding_key: int | None = None,
    first: int = 0,
    suffix: str | None = None,
) -> None:
    """to = round(base * decay + directions), element by element; `to` may be `base`.

    to, base: of one shape; elements are numbered in row-major order, whatever the strides. Of one dtype, or base is float32
    and `to` what that is rounded to. decay: rounded to float32. rounding_key: rounds 16 bits at random by this key instead
    of to nearest; means nothing for others, and is for one dtype.
    first: number of the first element, a multiple of TILE, where these are parts of a tensor.
    suffix: of the native function; None: the best there is; "" for torch; TRITON for its kernels.
    """
    assert to.shape == base.shape
    if to.dtype != base.dtype:
        assert rounding_key is None
        _by_way_of_float32(
            to,
            base,
            partial(add_directions, directions=directions, decay=decay, suffix=suffix),
            first,
        )
        return
    if suffix is None:
        suffix = _best_for(to, base) if directions else ""
    _adder(suffix)(to, base, directions, decay, rounding_key, first)


def _by_way_of_float32(
    to: torch.Tensor, base: torch.Tensor, add: Callable[..., None], first: int
) -> None:
    """What is added to a float32 base, then rounded to nearest; a part at a time, since it takes memory."""
    assert base.dtype == torch.float32
    source, out = base.reshape(-1), to.contiguous().view(-1)
    for at in range(0, source.numel(), PART):
        part = source[at : at + PART]
        moved = torch.empty_like(part)
        add(moved, part, first=first + at)
        out[at : at + PART] = moved
    if not to.is_contiguous():
        to.copy_(out.view(to.shape))


def _adder(suffix: str) -> Adder:
    """What adds, by a suffix as `add_directions` takes it."""
    if suffix == "":
        return _by_torch
    if suffix == TRITON:
        from ssdtune.kernels import noise_triton

        return noise_triton.by_triton
    return partial(_natively, _native(suffix))


def _native(suffix: str) -> Callable[..., None]:
    """The native function with this suffix."""
    native = library()
    assert native is not None
    return native.function("ssdtune_add_noise", suffix)


def _best_for(to: torch.Tensor, base: torch.Tensor) -> str:
    """What is fastest, of what knows them."""
    is_known = base.dtype in DTYPES and to.dtype == base.dtype
    if not (is_known and base.is_contiguous() and to.is_contiguous()):
        return ""
    if base.device.type == "cpu":
        native = library()
        return "" if native is None else native.suffixes[0]
    return TRITON if base.device.type == "cuda" and has_triton() else ""


def values(direction: Direction, num_elements: int, device: torch.device) -> torch.Tensor:
    """The direction's first elements themselves, scaled: float32 [num_elements]."""
    nothing = torch.zeros(num_elements, device=device)
    add_directions(nothing, nothing, [direction])
    return nothing


def add_low_rank(
    to: torch.Tensor,
    base: torch.Tensor,
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    decay: float = 1.0,
    rounding_key: int | None = None,
    suffix: str | None = None,
) -> None:
    """to = round(base * decay + sum over factors (U, V) and k of U_k V_k^T), element by element; `to` may be `base`.
    Dtypes and suffix as `add_directions` has them, but that there is no kernel.

    base: as a matrix [rows, columns]. U: float32 [rank, rows]; V: float32 [rank, columns]. Products and sums are rounded to
    float32 one by one, from left to right: no matrix product, whose order of sums is its library's.
    """
    native = _native_for(to, base, suffix) if factors and base.numel() else None
    if native is not None:
        left, right = torch.cat([u for u, _ in factors]), torch.cat([v for _, v in factors])
        noise = NativeNoise((), base.dtype, decay=decay, rounding_key=rounding_key)
        noise.add_factors(left, right)
        noise.run(native, to, base)
        return
    matrix = base.reshape(factors[0][0].shape[1] if factors else base.shape[0], -1)
    out = to.view(matrix.shape) if to.is_contiguous() else torch.empty_like(matrix, dtype=to.dtype)
    rows, columns = matrix.shape
    # Parts begin where a tile of fields for rounding does.
    step = ROUNDING_TILE // math.gcd(columns, ROUNDING_TILE)
    step *= max(1, PART // (step * columns))
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        total = _decayed(matrix[part], decay)
        for left, right in factors:
            for u, v in zip(left[:, part], right, strict=True):
                total = total + u.unsqueeze(1) * v
        out[part] = _rounded(total, to.dtype, rounding_key, first * columns)
    if not to.is_contiguous():
        to.copy_(out.view(base.shape))


def add_values(  # noqa: PLR0913 - the last two are for parts of a tensor, and for tests
    to: torch.Tensor,
    base: torch.Tensor,
    values: torch.Tensor,
    *,
    decay: float = 1.0,
    rounding_key: int | None = None,
    first: int = 0,
    suffix: str | None = None,
) -> None:
    """to = round(base * decay + values), as `add_directions` has it, but that there is no kernel. values: float32, of the
    same shape."""
    native = _native_for(to, base, suffix)
    if native is not None:
        noise = NativeNoise((), base.dtype, decay=decay, rounding_key=rounding_key)
        noise.add_values(values.contiguous(), first)
        noise.run(native, to, base, first)
        return
    total = _decayed(base, decay) + values
    to.copy_(_rounded(total, to.dtype, rounding_key, first))


def _native_for(
    to: torch.Tensor, base: torch.Tensor, suffix: str | None
) -> Callable[..., None] | None:
    """The native function with this suffix, the best there is for None; None where torch is to do it."""
    if suffix is None:
        suffix = _best_for(to, base)
    return None if suffix in ("", TRITON) else _native(suffix)


def _decayed(part: torch.Tensor, decay: float) -> torch.Tensor:
    """part * decay in float32, decay rounded to it."""
    if decay == 1.0:
        return part.float()
    return part.float() * torch.tensor(decay, dtype=torch.float32, device=part.device)


def _rounded(
    total: torch.Tensor, dtype: torch.dtype, rounding_key: int | None, first: int
) -> torch.Tensor:
    """float32 to a dtype. first: number of its first element in the tensor."""
    if rounding_key is None or dtype not in AT_RANDOM:
        return total.to(dtype)
    values = total.reshape(-1)
    random = philox.fields(
        rounding_key,
        first,
        values.numel(),
        bits=16,
        domain=philox.ROUNDING,
        device=values.device,
    )
    return AT_RANDOM[dtype](values, random.to(torch.int32)).view(total.shape)


def _by_torch(
    to: torch.Tensor,
    base: torch.Tensor,
    directions: Sequence[Direction],
    decay: float,
    rounding_key: int | None,
    first: int,
) -> None:
    """The definition. In parts, since it needs several times the memory."""
    flat, out = base.reshape(-1), torch.empty(base.numel(), dtype=base.dtype, device=base.device)
    for at in range(0, flat.numel(), PART):
        total = _decayed(flat[at : at + PART], decay)
        for direction in directions:
            bits = FIELD_BITS[direction.kind]
            found = philox.fields(
                direction.key,
                first + at,
                total.numel(),
                bits=bits,
                domain=philox.DIRECTION,
                device=base.device,
            )
            total = total + table_on(base.device, direction.scale, direction.kind)[found]
        out[at : at + PART] = _rounded(total, base.dtype, rounding_key, first + at)
    to.copy_(out.view(base.shape))


def _to_bfloat16(values: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """float32 to bfloat16 by 16 random bits, int32, below the last one that stays: up with the probability of what is
    cut."""
    bits = values.view(torch.int32)
    moved = torch.where(values.isfinite(), bits + random, bits) >> 16 << 16
    return torch.where(values.isnan(), values, moved.view(torch.float32)).to(torch.bfloat16)


def _to_float16(values: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """The same to float16, whose numbers lie 2^(exponent - 10) apart, and 2^-24 below 2^-14: of what is cut the first 16
    bits count. What the largest one does not exceed is rounded so, the rest to nearest.

    Exact in float32: `apart` is a power of two, and what is cut has fewer than 24 bits.
    """
    power = (values.view(torch.int32) & FLOAT32_EXPONENT).view(torch.float32)
    apart = power.clamp(min=2.0**-14) * 2.0**-10
    units = values.abs() / apart
    whole = units.floor()
    is_up = ((units - whole) * 2**16).floor() + random >= 2**16
    moved = ((whole + is_up) * apart).copysign(values)
    return torch.where(values.abs() <= LARGEST_FLOAT16, moved, values).to(torch.float16)


AT_RANDOM = {torch.bfloat16: _to_bfloat16, torch.float16: _to_float16}


class NativeNoise:
    """What native code needs to move a tensor of a dtype (float32 or bfloat16), kept alive. decay, rounding_key: as
    `add_directions` has them."""

    def __init__(
        self,
        directions: Sequence[Direction],
        dtype: torch.dtype,
        *,
        decay: float,
        rounding_key: int | None,
    ) -> None:
        tables = [_table(d.scale, d.kind) for d in directions]
        of_one = struct("direction", "pieces.h")
        listed = (of_one * len(directions))(
            *(
                of_one(d.key, ctypes.addressof(table), KINDS.index(d.kind))
                for d, table in zip(directions, tables, strict=True)
            )
        )
        self._alive: list[Any] = [tables, listed]
        self.job = struct("noise", "pieces.h")(
            dtype=DTYPES[dtype],
            directions=ctypes.addressof(listed),
            num_directions=len(directions),
            is_stochastic=rounding_key is not None,
            rounding_key=rounding_key or 0,
            part=NATIVE_PART,
            decay=decay,
        )

    @property
    def address(self) -> int:
        """Of the struct noise."""
        return ctypes.addressof(self.job)

    def add_factors(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Adds sum over r of left[r] right[r]^T. left: [rank, rows], right: [rank, columns], float32, contiguous."""
        self._alive += [left, right]
        self.job.left, self.job.right = left.data_ptr(), right.data_ptr()
        (self.job.rank, self.job.rows), self.job.columns = left.shape, right.shape[1]

    def add_values(self, values: torch.Tensor, first: int) -> None:
        """Adds these, contiguous float32. first: number of their first element in the tensor."""
        self._alive.append(values)
        self.job.values = values.data_ptr() - first * values.element_size()

    def run(
        self, function: Callable[..., None], to: torch.Tensor, base: torch.Tensor, first: int = 0
    ) -> None:
        """to = what this makes of base, `first` the number of their first element: native code gets the addresses that
        the whole tensor's first elements would have, and begins there."""
        job = self.job
        job.to = to.data_ptr() - first * to.element_size()
        job.base = base.data_ptr() - first * base.element_size()
        job.n, job.next = first + base.numel(), first
        run_by_all(function, job, -(-base.numel() // NATIVE_PART))


def _natively(  # noqa: PLR0913 - an Adder, and the function that it is made of
    function: Callable[..., None],
    to: torch.Tensor,
    base: torch.Tensor,
    directions: Sequence[Direction],
    decay: float,
    rounding_key: int | None,
    first: int,
) -> None:
    noise = NativeNoise(directions, base.dtype, decay=decay, rounding_key=rounding_key)
    noise.run(function, to, base, first)
