"""What kernels of packed tensors cost on a device beside a copy within it.

    python benchmarks/unpack_device.py [--device cuda] [--megabytes 256] [--rounds 9] [--json]

Rate: bytes read and written in a second, of what a kernel is given and of what it makes; a copy reads as many as it
writes. Contestants take turns with the copy; each by the median of its rates beside the copy right before it, by the
device's own clock. Each is checked against its definition on the CPU before it is timed. Where a bar is not met the exit
code is 1. With --json the last line printed is the JSON.

(`--device cpu` is for the benchmark's own test: it leaves out what only Triton has.)
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import measures  # noqa: E402

WIDTH = 4096  # columns of a matrix
CHECKED_ROWS = 64  # that are compared with the definition
BARS = (0.7, 0.6)  # of a copy's rate: of four and eight bits; of others
TOKENS = 16  # of a product: what one program takes


@dataclass(frozen=True)
class Work:
    """run: a turn. num_bytes: read and written in it. is_right: whether one turn has given what the definition gives."""

    run: Callable[[], object]
    num_bytes: int
    is_right: Callable[[], bool]


@dataclass(frozen=True)
class Contestant:
    """make: of a number of rows and a device. bar: of a copy's rate; None: of what goes through memory more than once."""

    name: str
    make: Callable[[int, str], Work]
    bar: float | None


def formats() -> Iterator[tuple[str, Any, float]]:
    """Name, format, bar."""
    from ssdtune.kernels.affine import ORDERS, Affine
    from ssdtune.kernels.float8 import ScaledBytes
    from ssdtune.kernels.ggml import Ggml
    from ssdtune.kernels.integers import Awq, Gptq, PackQuantized
    from ssdtune.kernels.nibbles import E2M1, NF4, NestedNibbles, Nibbles, Nvfp4
    from ssdtune.kernels.rotated import Rotated

    usual, other = BARS
    for bits, order in ORDERS.items():
        yield f"{bits} bits {order}", Affine(bits, order), usual if bits in (4, 8) else other
    yield "4 bits, rotated", Rotated(Affine(4, (4,))), other
    yield "NF4", Nibbles(NF4, 64, is_high_first=True), usual
    yield "NF4, nested scales", NestedNibbles(NF4, 64, 256, 0.01), usual
    yield "MXFP4", Nibbles(E2M1, 32, is_high_first=False, scale="E8M0"), usual
    yield "NVFP4", Nvfp4(is_divided=False), usual
    yield "FP4, ue5m3", Nibbles(E2M1, 16, is_high_first=False, scale="UE5M3"), usual
    yield "GPTQ, 4 bits", Gptq(4, 128), usual
    yield "GPTQ, 3 bits", Gptq(3, 128), other
    yield "AWQ", Awq(128), usual
    yield "compressed-tensors, 4 bits", PackQuantized(4, 128), usual
    yield "compressed-tensors, 8 bits", PackQuantized(8, 128), usual
    yield "FP8, blocks of 128", ScaledBytes((128, 128)), usual
    yield "INT8, a scale a row", ScaledBytes((1, WIDTH), "I8", "BF16"), usual
    for kind in ("Q4_0", "Q4_1", "Q4_K", "IQ4_NL", "IQ4_XS", "MXFP4", "Q8_0"):
        yield f"GGUF {kind}", Ggml(kind), usual
    for kind in ("Q2_K", "Q3_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K"):
        yield f"GGUF {kind}", Ggml(kind), other


def contestants(device: str) -> Iterator[Contestant]:
    """All that there is a kernel of."""
    from ssdtune.kernels.affine import Affine
    from ssdtune.kernels.nibbles import NF4, Nibbles
    from ssdtune.kernels.noise import KINDS

    other, four = BARS[1], Affine(4, (4,))
    for name, format, bar in formats():
        yield Contestant(name, partial(decoding, format), bar)
    for bits in (4, 3):
        yield Contestant(f"lossless, {bits}-bit codes", partial(lossless, bits), other)
    for kind in KINDS:
        for name, format in (("4 bits", four), ("NF4", Nibbles(NF4, 64, is_high_first=True))):
            yield Contestant(f"{name}, a {kind} direction", partial(moving, format, kind), other)
    yield Contestant("codes of 4 bits take a step", partial(stepping, four), None)
    for key, how in ((None, "to nearest"), (5, "at random")):
        yield Contestant(f"activations to bytes, {how}", partial(packing, key), other)
    if device != "cpu":
        yield Contestant(f"4 bits x {TOKENS} tokens", partial(multiplying, four), other)


# ------------------------------------------------------------------ work


def random_parts(format: Any, num_rows: int, device: str) -> list[Any]:
    """Codes of any bits; scales of more than a byte about 0.01."""
    import torch

    from ssdtune.visit.placement import FILE_DTYPES

    generator = torch.Generator(device).manual_seed(0)
    made: list[Any] = []
    for part in format.parts((num_rows, WIDTH)):
        dtype = FILE_DTYPES[part.dtype]
        if dtype.is_floating_point and dtype.itemsize > 1:
            values = torch.rand(part.shape, generator=generator, device=device).add_(0.5).mul_(0.01)
            made.append(values.to(dtype))
        else:
            num_bytes = torch.Size(part.shape).numel() * dtype.itemsize
            found = torch.randint(
                0, 256, (num_bytes,), dtype=torch.uint8, generator=generator, device=device
            )
            made.append(found.view(dtype).view(part.shape))
    return made


def decoding(format: Any, num_rows: int, device: str, parts: Sequence[Any] | None = None) -> Work:
    """Packed to bfloat16."""
    import torch

    from ssdtune.kernels.unpack import unpack

    given = random_parts(format, num_rows, device) if parts is None else parts
    out = torch.empty(num_rows, WIDTH, dtype=torch.bfloat16, device=device)

    def is_right() -> bool:
        expected = torch.empty(out.shape, dtype=out.dtype)
        format.by_torch(on_cpu(given), expected)
        return same(out, expected)

    return Work(partial(unpack, format, given, out), size_of(*given, out), is_right)


def lossless(bits: int, num_rows: int, device: str) -> Work:
    """Decoding, of what weights may be."""
    import torch

    from ssdtune.kernels.lossless import pack

    generator = torch.Generator(device).manual_seed(0)
    weights = torch.randn(num_rows, WIDTH, generator=generator, device=device).mul_(0.02)
    format, parts = pack(weights.bfloat16(), bits)
    return decoding(format, num_rows, device, [part.to(device) for part in parts])


def moving(format: Any, kind: str, num_rows: int, device: str) -> Work:
    """Decoding, and a random direction added on the way."""
    import torch

    from ssdtune.kernels.noise import Direction
    from ssdtune.kernels.unpack_add import Move, unpack_add

    parts, moves = random_parts(format, num_rows, device), [Move((Direction(5, 1e-3, kind),))]
    out = torch.empty(num_rows, WIDTH, dtype=torch.bfloat16, device=device)

    def is_right() -> bool:
        expected = torch.empty(out.shape, dtype=out.dtype)
        unpack_add(format, on_cpu(parts), expected, moves, suffix="")
        return same(out, expected)

    return Work(partial(unpack_add, format, parts, out, moves), size_of(*parts, out), is_right)


def stepping(format: Any, num_rows: int, device: str) -> Work:
    """Codes moved along a direction, in place. What they are moved by is made in float32 beside them, so that it reads and
    writes far more than is counted."""
    import torch

    from ssdtune.kernels.noise import Direction
    from ssdtune.kernels.requantize import requantize
    from ssdtune.kernels.unpack_add import Move

    parts, shape = random_parts(format, num_rows, device), (num_rows, WIDTH)
    move = Move((Direction(5, 1e-2),), 0.999, 7)

    def is_right() -> bool:
        expected = on_cpu(random_parts(format, num_rows, device))
        requantize(format, expected, shape, move, suffix="")
        return all(torch.equal(a.cpu(), b) for a, b in zip(parts, expected, strict=True))

    *codes, scales, zeros = parts
    num_bytes = size_of(*codes, *codes, scales, zeros)
    return Work(partial(requantize, format, parts, shape, move), num_bytes, is_right)


def packing(key: int | None, num_rows: int, device: str) -> Work:
    """bfloat16 to a byte each, with scales. key: rounds at random."""
    import torch

    from ssdtune.kernels.transfer import pack

    generator = torch.Generator(device).manual_seed(0)
    values = torch.randn(num_rows, WIDTH, generator=generator, device=device).bfloat16()
    made = pack(values, key=key)

    def is_right() -> bool:
        expected = pack(values.cpu(), key=key, suffix="")
        return all(torch.equal(a.cpu(), b) for a, b in zip(made, expected, strict=True))

    return Work(partial(pack, values, key=key), size_of(values, *made), is_right)


def multiplying(format: Any, num_rows: int, device: str) -> Work:
    """A few tokens times packed weights, within what sums of float32 may be off by."""
    import torch

    from ssdtune.kernels.matmul_triton import matmul_triton

    parts = random_parts(format, num_rows, device)
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(TOKENS, WIDTH, generator=generator, device=device).bfloat16()
    run = partial(matmul_triton, format, parts, x, num_rows)
    made = run()

    def is_right() -> bool:
        weights = torch.empty(num_rows, WIDTH, dtype=torch.bfloat16)
        format.by_torch(on_cpu(parts), weights)
        given, exact = x.cpu().double(), weights.double().t()
        off = (made.cpu() - given @ exact).abs()
        return bool((off <= WIDTH * 2**-23 * (given.abs() @ exact.abs())).all())

    return Work(run, size_of(*parts, x, made), is_right)


def on_cpu(tensors: Sequence[Any]) -> list[Any]:
    """The tensors there."""
    return [tensor.cpu() for tensor in tensors]


def size_of(*tensors: Any) -> int:
    """Bytes."""
    return sum(tensor.nbytes for tensor in tensors)


def same(found: Any, expected: Any) -> bool:
    """Bit by bit; of what is no number that it is none. bfloat16."""
    import torch

    both = [x.cpu().nan_to_num(7.0).view(torch.int16) for x in (found, expected)]
    return torch.equal(*both)


# ------------------------------------------------------------------ times


def check(contestant: Contestant, device: str) -> None:
    """Against the definition."""
    work = contestant.make(CHECKED_ROWS, device)
    work.run()
    if not work.is_right():
        raise SystemExit(f"{contestant.name}: not the definition's bits")


def seconds(run: Callable[[], object], device: str) -> float:
    """By the device's clock."""
    import torch

    if device == "cpu":
        start = perf_counter()
        run()
        return perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def measure(device: str, megabytes: int, num_rounds: int) -> list[dict[str, Any]]:
    """A row for each contestant: bytes moved per second, and that beside the copy's."""
    import torch

    num_rows = -(-megabytes * 10**6 // (2 * WIDTH))
    source = torch.zeros(num_rows, WIDTH, dtype=torch.bfloat16, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    rows = []
    for contestant in contestants(device):
        check(contestant, device)
        work, copied = contestant.make(num_rows, device), 2 * source.nbytes
        times = [(seconds(copy, device), seconds(work.run, device)) for _ in range(num_rounds + 2)]
        copying, working = zip(*times[2:], strict=True)  # the first ones warm up
        per_byte = [[s / n for s in took] for took, n in ((copying, copied), (working, work.num_bytes))]  # fmt: skip
        of_copy, bar = measures.paired_ratio(*per_byte), contestant.bar
        rows.append(
            {
                "contestant": contestant.name,
                "bytes_per_s": work.num_bytes / statistics.median(working),
                "copy_bytes_per_s": copied / statistics.median(copying),
                "of_copy": of_copy,
                "bar": bar,
                "passed": bar is None or of_copy["p50"] >= bar,
            }
        )
    return rows


def unmet(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Bars that are not met, in words."""
    return [
        f"{row['contestant']}: {row['of_copy']['p50']:.2f} of a copy (bar {row['bar']:g})"
        for row in rows
        if not row["passed"]
    ]


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown."""
    yield "| kernel | GB/s moved | of a copy (p20-p80, n) | bar |"
    yield "| --- | --- | --- | --- |"
    for row in rows:
        ratio = row["of_copy"]
        spread = f"{ratio['p50']:.2f} ({ratio['p20']:.2f}-{ratio['p80']:.2f}, {ratio['n']})"
        verdict = "met" if row["passed"] else "**not met**"
        bar = "" if row["bar"] is None else f"{row['bar']:g}: {verdict}"
        yield f"| {row['contestant']} | {row['bytes_per_s'] / 1e9:.1f} | {spread} | {bar} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints. 1: a bar is not met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--megabytes", type=int, default=256, help="that a decoder writes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rows = measure(options.device, options.megabytes, options.rounds)
    for line in lines(rows):
        print(line)
    if options.json:
        print(json.dumps(rows))
    return int(bool(unmet(rows)))


if __name__ == "__main__":
    sys.exit(main())
