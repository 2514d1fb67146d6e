"""Quantizers without calibration data that benchmarks compare: ours, plain rounding, bitsandbytes, HQQ, torchao."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ssdtune.kernels import quantize
from ssdtune.kernels.affine import ORDERS, Affine, widths
from ssdtune.kernels.float8 import ScaledBytes
from ssdtune.kernels.formats import Format
from ssdtune.kernels.nibbles import E2M1, NF4, SCALE_DTYPES, Nibbles
from ssdtune.kernels.quantize_affine import quantize_affine
from ssdtune.kernels.quantize_fp8 import quantize_fp8
from ssdtune.kernels.quantize_nibbles import quantize_nibbles
from ssdtune.kernels.rotated import Rotated
from ssdtune.swap.pack_header import OWN_FP8

GROUP = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Contestant:
    """An encoder. group: weights that share a scale; rows hold whole groups. readings: (width, bits a weight) of each
    way in which what it makes can be read. decoded: what a float32 matrix comes back as in each of them."""

    name: str
    group: int
    readings: tuple[tuple[int, float], ...]
    decoded: Callable[[torch.Tensor], Sequence[torch.Tensor]]


# ------------------------------------------------------------------------------------------- ours


def ours() -> list[Contestant]:
    """Files of one width, the default files of every width, some of them with rotated groups, and tables."""
    orders = dict.fromkeys([*((k,) for k in (1, 2, 4, 8)), *ORDERS.values(), (2, 1, 1, 2, 2)])
    tables = (
        ("ours, NF4, bf16 scales", Nibbles(NF4, 64, False, "BF16")),
        ("ours, NF4, bf16 scales", Nibbles(NF4, 128, False, "BF16")),
        ("ours, MXFP4", Nibbles(E2M1, 32, False, "E8M0")),
        ("ours, FP4, bf16 scales", Nibbles(E2M1, 16, False, "BF16")),
        ("ours, FP4, e4m3 scales", Nibbles(E2M1, 16, False, "F8_E4M3")),
        ("ours, FP4, ue5m3 scales", Nibbles(E2M1, 16, False, "UE5M3")),
    )
    return [
        *(_affine(order, GROUP) for order in orders),
        _affine((4,), 32),
        _affine((4,), 128),
        *(
            _affine(order, group, is_rotated=True)
            for order in ((2,), (2, 1), (4,))
            for group in (64, 128)
        ),
        *(_table(name, format) for name, format in tables),
        _fp8(OWN_FP8),
    ]


def _affine(order: tuple[int, ...], group: int, *, is_rotated: bool = False) -> Contestant:
    plain = [Affine(width, order, group) for width in widths(order)]
    formats: list[Format] = [Rotated(format) if is_rotated else format for format in plain]

    def decoded(weight: torch.Tensor) -> list[torch.Tensor]:
        made = quantize_affine(weight, order, group, is_rotated=is_rotated)
        return [quantize.decoded(format, made, tuple(weight.shape)) for format in formats]

    readings = tuple((format.bits, format.bits + 24 / group) for format in plain)
    kind = "rotated groups" if is_rotated else "groups"
    name = f"ours, {'+'.join(map(str, order))} bits, {kind} of {group}"
    return Contestant(name, group, readings, decoded)


def _fp8(format: ScaledBytes) -> Contestant:
    bits = 8 + 32 / math.prod(format.block)

    def decoded(weight: torch.Tensor) -> list[torch.Tensor]:
        made = quantize_fp8(weight, format.block)
        return [quantize.decoded(format, made, tuple(weight.shape))]

    name = f"ours, FP8, blocks of {format.block[0]}"
    return Contestant(name, 1, ((8, bits),), decoded)  # blocks may be cut: rows of any length


def _table(name: str, format: Nibbles) -> Contestant:
    bits = 4 + 8 * SCALE_DTYPES[format.scale].itemsize / format.block

    def decoded(weight: torch.Tensor) -> list[torch.Tensor]:
        made = quantize_nibbles(weight, format.table, format.block, format.scale)
        return [quantize.decoded(format, made, tuple(weight.shape))]

    return Contestant(f"{name}, blocks of {format.block}", format.block, ((4, bits),), decoded)


# ----------------------------------------------------------------------------------------- others


def plain() -> list[Contestant]:
    """Rounding to nearest on each group's range, scale and zero of 16 bits: what any search must beat."""

    def decoded(weight: torch.Tensor, bits: int) -> list[torch.Tensor]:
        groups = weight.view(-1, GROUP)
        low, high = groups.aminmax(dim=1, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).clamp(min=2.0**-126)
        codes = (groups / scale - low / scale).round().clamp(0, 2**bits - 1)
        return [(codes * scale + low).view_as(weight)]

    return [
        Contestant(
            f"to nearest, groups of {GROUP}",
            GROUP,
            ((bits, bits + 32 / GROUP),),
            lambda weight, bits=bits: decoded(weight, bits),
        )
        for bits in range(2, 9)
    ]


def bitsandbytes() -> list[Contestant]:
    """NF4 in its default blocks, in larger ones, with nested scales; FP4; 8 bits in blocks."""
    import bitsandbytes.functional as library  # pyright: ignore[reportMissingImports]

    def four(weight: torch.Tensor, kind: str, block: int, is_nested: bool) -> list[torch.Tensor]:
        codes, state = library.quantize_4bit(
            weight, blocksize=block, compress_statistics=is_nested, quant_type=kind
        )
        return [library.dequantize_4bit(codes, state)]

    def eight(weight: torch.Tensor) -> list[torch.Tensor]:
        codes, state = library.quantize_blockwise(weight, blocksize=GROUP)
        return [library.dequantize_blockwise(codes, state)]

    kinds = (("nf4", 64, False), ("nf4", 128, False), ("nf4", 64, True), ("fp4", 64, False))
    found = [
        Contestant(
            f"bitsandbytes {kind}, blocks of {block}{', nested' if is_nested else ''}",
            block,
            ((4, 4 + (8 + 32 / 256 if is_nested else 32) / block),),
            lambda weight, kind=kind, block=block, is_nested=is_nested: four(
                weight, kind, block, is_nested
            ),
        )
        for kind, block, is_nested in kinds
    ]
    found.append(
        Contestant(f"bitsandbytes 8-bit, blocks of {GROUP}", GROUP, ((8, 8 + 32 / GROUP),), eight)
    )
    return found


def hqq() -> list[Contestant]:
    """Its optimizer as it comes, groups along rows as ours, scale and zero rounded to 16 bits as it keeps them."""
    from hqq.core.quantize import Quantizer  # pyright: ignore[reportMissingImports]

    def decoded(weight: torch.Tensor, bits: int, group: int) -> list[torch.Tensor]:
        codes, meta = Quantizer.quantize(
            weight, nbits=bits, group_size=group, axis=1, device="cpu", bitpack=False
        )
        scale, zero = meta["scale"].half().float(), meta["zero"].half().float()
        return [((codes.float() - zero) * scale).view_as(weight)]

    return [
        Contestant(
            f"HQQ, groups of {group}",
            group,
            ((bits, bits + 32 / group),),
            lambda weight, bits=bits, group=group: decoded(weight, bits, group),
        )
        for bits in (2, 3, 4, 5, 6, 8)
        for group in (64, 128)
    ]


def torchao() -> list[Contestant]:
    """Integers of every width in groups: zeros of 8 bits, or by its own half-quadratic search without zeros."""
    import torchao.quantization as library  # pyright: ignore[reportMissingImports]
    from torchao.quantization.quant_api import (  # pyright: ignore[reportMissingImports]
        IntxChooseQParamsAlgorithm,
    )

    def decoded(weight: torch.Tensor, bits: int, is_searched: bool) -> list[torch.Tensor]:
        algorithms, kinds = IntxChooseQParamsAlgorithm, library.MappingType
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        config = library.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=library.PerGroup(GROUP),
            mapping_type=kinds.SYMMETRIC if is_searched else kinds.ASYMMETRIC,
            scale_dtype=torch.bfloat16,
            intx_choose_qparams_algorithm=(
                algorithms.HQQ_SCALE_ONLY if is_searched else algorithms.AFFINE
            ),
        )
        library.quantize_(layer, config)
        made: Any = layer.weight
        return [made.dequantize().float()]

    return [
        Contestant(
            f"torchao{' HQQ without zeros' if is_searched else ''}, groups of {GROUP}",
            GROUP,
            ((bits, bits + (16 if is_searched else 24) / GROUP),),
            lambda weight, bits=bits, is_searched=is_searched: decoded(weight, bits, is_searched),
        )
        for is_searched in (False, True)
        for bits in range(2, 9)
    ]


def all_contestants(peers: Path | None) -> tuple[list[Contestant], dict[str, str]]:
    """Those that can be had here; of the others, name -> why not. peers: a folder to import from, beside those there are."""
    if peers is not None:
        sys.path.append(str(peers))
    found: list[Contestant] = []
    missing: dict[str, str] = {}
    for make in (ours, plain, bitsandbytes, hqq, torchao):
        try:
            found += make()
        except ImportError as error:
            missing[make.__name__] = str(error)
    return found, missing
