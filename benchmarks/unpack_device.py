"""What decoding packed tensors costs on a device beside a copy within it.

    python benchmarks/unpack_device.py [--device cuda] [--megabytes 256] [--rounds 9] [--json]

Rate: bytes read and written in a second, of the packed tensor and of what it becomes; a copy reads as many as it writes.
Contestants take turns with the copy; each by the median of its rates beside the copy right before it, by the device's
own clock. Kernels are checked against the format's definition on the CPU before they are timed. With --json the last
line printed is the JSON. (`--device cpu` is for the benchmark's own test.)
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
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


def contestants() -> Iterator[tuple[str, Any, float]]:
    """Name, format, bar."""
    from ssdtune.kernels.affine import ORDERS, Affine
    from ssdtune.kernels.float8 import ScaledBytes
    from ssdtune.kernels.ggml import Ggml
    from ssdtune.kernels.integers import Awq, Gptq, PackQuantized
    from ssdtune.kernels.nibbles import E2M1, NF4, Nibbles
    from ssdtune.kernels.rotated import Rotated

    usual, other = BARS
    for bits, order in ORDERS.items():
        yield f"{bits} bits {order}", Affine(bits, order), usual if bits in (4, 8) else other
    yield "4 bits, rotated", Rotated(Affine(4, (4,))), other
    yield "NF4", Nibbles(NF4, 64, is_high_first=True), usual
    yield "MXFP4", Nibbles(E2M1, 32, is_high_first=False, scale="E8M0"), usual
    yield "FP4, ue5m3", Nibbles(E2M1, 16, is_high_first=False, scale="UE5M3"), usual
    yield "GPTQ, 4 bits", Gptq(4, 128), usual
    yield "GPTQ, 3 bits", Gptq(3, 128), other
    yield "AWQ", Awq(128), usual
    yield "compressed-tensors, 4 bits", PackQuantized(4, 128), usual
    yield "compressed-tensors, 8 bits", PackQuantized(8, 128), usual
    yield "FP8, blocks of 128", ScaledBytes((128, 128)), usual
    for kind in ("Q4_0", "Q4_1", "Q4_K"):
        yield f"GGUF {kind}", Ggml(kind), usual
    yield "GGUF Q8_0", Ggml("Q8_0"), usual
    for kind in ("Q5_K", "Q6_K"):
        yield f"GGUF {kind}", Ggml(kind), other


def random_parts(format: Any, num_rows: int) -> list[Any]:
    """Codes of any bits; scales of more than a byte about 0.01. On the CPU."""
    import torch

    from ssdtune.visit.placement import FILE_DTYPES

    generator = torch.Generator().manual_seed(0)
    made: list[Any] = []
    for part in format.parts((num_rows, WIDTH)):
        dtype = FILE_DTYPES[part.dtype]
        if dtype.is_floating_point and dtype.itemsize > 1:
            values = torch.rand(part.shape, generator=generator).add_(0.5).mul_(0.01)
            made.append(values.to(dtype))
        else:
            num_bytes = torch.Size(part.shape).numel() * dtype.itemsize
            found = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)
            made.append(found.view(dtype).view(part.shape))
    return made


def check(name: str, format: Any, device: str) -> None:
    """Against the definition, bit by bit; of what is no number that it is none."""
    import torch

    from ssdtune.kernels.unpack import unpack

    parts = random_parts(format, CHECKED_ROWS)
    expected = torch.empty(CHECKED_ROWS, WIDTH, dtype=torch.bfloat16)
    found = torch.empty_like(expected, device=device)
    format.by_torch(parts, expected)
    unpack(format, [part.to(device) for part in parts], found)
    both = [x.nan_to_num(7.0).view(torch.int16) for x in (found.cpu(), expected)]
    if not torch.equal(*both):
        raise SystemExit(f"{name}: not the definition's bits")


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

    from ssdtune.kernels.unpack import unpack

    num_rows = -(-megabytes * 10**6 // (2 * WIDTH))
    out = torch.zeros(num_rows, WIDTH, dtype=torch.bfloat16, device=device)
    copy = partial(out.copy_, torch.zeros_like(out))
    rows = []
    for name, format, bar in contestants():
        check(name, format, device)
        parts = [part.to(device) for part in random_parts(format, num_rows)]
        decode = partial(unpack, format, parts, out)
        moved = out.nbytes + sum(part.nbytes for part in parts)
        times = [(seconds(copy, device), seconds(decode, device)) for _ in range(num_rounds + 2)]
        copying, decoding = zip(*times[2:], strict=True)  # the first ones warm up
        per_byte = [[s / n for s in took] for took, n in ((copying, 2 * out.nbytes), (decoding, moved))]  # fmt: skip
        of_copy = measures.paired_ratio(*per_byte)
        rows.append(
            {
                "contestant": name,
                "bytes_per_s": moved / statistics.median(decoding),
                "copy_bytes_per_s": 2 * out.nbytes / statistics.median(copying),
                "of_copy": of_copy,
                "bar": bar,
                "passed": of_copy["p50"] >= bar,
            }
        )
    return rows


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown."""
    yield "| decoder | GB/s moved | of a copy (p20-p80, n) | bar |"
    yield "| --- | --- | --- | --- |"
    for row in rows:
        ratio = row["of_copy"]
        spread = f"{ratio['p50']:.2f} ({ratio['p20']:.2f}-{ratio['p80']:.2f}, {ratio['n']})"
        verdict = "met" if row["passed"] else "**not met**"
        rate = f"| {row['contestant']} | {row['bytes_per_s'] / 1e9:.1f} |"
        yield f"{rate} {spread} | {row['bar']:g}: {verdict} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
