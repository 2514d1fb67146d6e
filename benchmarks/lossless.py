"""What lossless packing of bfloat16 saves, and what decoding costs beside copying.

    python -m benchmarks.lossless [--model FOLDER ...] [--megabytes 256] [--rounds 7] [--json out.json]

Bits a weight: of made-up weights (normal, each row with a scale of its own) and of a model folder's own matrices,
rounded to bfloat16 where they are wider; beside them the bound of any code that keeps the other eight bits as they are
and takes exponents one by one: 8 bits and the exponents' entropy. Weights that once were quantized have few values or
few exponents, so their figures say nothing about others.

Time: of this thread on its processor, decoding so many megabytes of bfloat16 and one `memcpy` of as many, taking turns;
each decoder by the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import thread_time
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import machine, measures  # noqa: E402

BITS = (4, 3)
BAR = 1.0  # of a memcpy's rate, with 4 bits and the best instruction set
SCALES = 0.3  # standard deviation of the logarithm of a row's scale
TORCH_SHARE = 16  # torch's operators decode so much less in their turn
SMALLEST = 1 << 16  # elements: a matrix worth packing


# ------------------------------------------------------------------ bits a weight


def made_up(num_elements: int) -> Any:
    """bfloat16 [num_elements]: N(0, 0.02), rows of 1024, times scales that are log-normal."""
    import torch

    generator = torch.Generator().manual_seed(0)
    scales = torch.exp(SCALES * torch.randn(-(-num_elements // 1024), 1, generator=generator))
    values = torch.randn(len(scales), 1024, generator=generator)
    return values.mul_(0.02 * scales).view(-1)[:num_elements].bfloat16()


def matrices(folder: Path) -> Iterator[Any]:
    """A model folder's floating-point tensors of at least SMALLEST elements, bfloat16."""
    import torch
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # not a mapping: it has nothing but `keys`
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and tensor.numel() >= SMALLEST:
                    yield tensor.to(torch.bfloat16)


def sizes(tensors: Iterator[Any]) -> dict[str, Any]:
    """Bits a weight and the share of escapes, by bits of a code; the bound; all over all tensors together."""
    import torch

    from ssdtune.kernels.lossless import encode

    numel, bound = 0, 0.0
    num_bytes, num_escapes = dict.fromkeys(BITS, 0), dict.fromkeys(BITS, 0)
    for values in tensors:
        numel += values.numel()
        exponents = (values.view(torch.int16).view(-1) >> 7 & 255).bincount().double()
        shares = exponents[exponents > 0] / values.numel()
        bound += values.numel() * (8 - float((shares * shares.log2()).sum()))
        for bits in BITS:
            made = encode(values, bits)
            num_bytes[bits] += (
                2 * values.numel() if made is None else made[0].num_bytes(values.shape)
            )
            num_escapes[bits] += 0 if made is None else made[0].num_escapes
    return {
        "numel": numel,
        "bound": bound / numel,
        "bits_a_weight": {bits: 8 * num_bytes[bits] / numel for bits in BITS},
        "escapes": {bits: num_escapes[bits] / numel for bits in BITS},
    }


# ------------------------------------------------------------------ time


def contestants(values: Any) -> Iterator[tuple[str, Callable[[], object], float]]:
    """Name, one turn, and the share of `values` that it makes."""
    import torch

    from ssdtune.kernels import decoding
    from ssdtune.kernels.lossless import pack
    from ssdtune.kernels.lossless_native import decode_lossless
    from ssdtune.kernels.native import library

    decoding.set_threads(1)
    out = torch.zeros_like(values)
    yield "memcpy", partial(ctypes.memmove, out.data_ptr(), values.data_ptr(), values.nbytes), 1.0
    native = library()
    for bits in BITS:
        format, parts = pack(values, bits)
        for suffix in () if native is None else native.suffixes:
            decode = partial(decode_lossless, format, parts, out, suffix)
            decode()
            if not torch.equal(out.view(torch.int16), values.view(torch.int16)):
                raise SystemExit(f"{bits} bits, {suffix}: not the same bits")
            yield f"{bits} bits, {suffix[1:]}", decode, 1.0
        some = values[: len(values) // TORCH_SHARE]
        format, parts = pack(some, bits)
        decode = partial(format.by_torch, parts, torch.empty_like(some))
        yield f"{bits} bits, torch", decode, 1 / TORCH_SHARE


def times(values: Any, num_rounds: int) -> list[dict[str, Any]]:
    """A row for each contestant: bytes written per second, and that beside memcpy's."""
    turns = list(contestants(values))
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in turns}
    for turn in range(num_rounds + 1):
        for name, run, share in turns:
            start = thread_time()
            run()
            if turn:  # the first warms up
                seconds[name].append((thread_time() - start) / share)
    copying = seconds["memcpy"]
    return [
        {
            "contestant": name,
            "bytes_per_s": values.nbytes / statistics.median(took),
            "of_memcpy": measures.paired_ratio(copying, took),
        }
        for name, took in seconds.items()
    ]


# ------------------------------------------------------------------ the table


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Markdown of a result."""
    yield "| weights | millions | 4 bits: bits a weight (escapes) | 3 bits | 8 + entropy of exponents |"
    yield "| --- | --- | --- | --- | --- |"
    for name, row in result["sizes"].items():
        cells = [
            f"{row['bits_a_weight'][bits]:.3f} ({100 * row['escapes'][bits]:.3f} %)"
            for bits in BITS
        ]
        yield f"| {name} | {row['numel'] / 1e6:.1f} | {' | '.join(cells)} | {row['bound']:.3f} |"
    yield ""
    yield "| decoder | GB/s written | of memcpy (p20-p80, n) |"
    yield "| --- | --- | --- |"
    for row in result["times"]:
        ratio = row["of_memcpy"]
        spread = f"{ratio['p50']:.2f} ({ratio['p20']:.2f}-{ratio['p80']:.2f}, {ratio['n']})"
        yield f"| {row['contestant']} | {row['bytes_per_s'] / 1e9:.2f} | {spread} |"
    yield ""
    bar = result["bar"]
    if bar is not None:
        verdict = "met" if bar["passed"] else "**not met**"
        yield f"- {bar['contestant']} / memcpy: {bar['value']:.3g} (bar {BAR:g}): {verdict}"
        yield ""
    told = result["machine"]
    yield (
        f"{told['processor']}, one thread of {told['cores']} cores; {told['megabytes']} MB; torch {told['torch']}, "
        f"Linux {told['kernel']}; commit {told['commit']}; {told['date']}; load average at the start "
        f"{told['load_average']:.1f}."
    )


def bar_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """4 bits by the best instruction set beside memcpy; None where nothing native could be built."""
    best = next((row for row in rows if row["contestant"].startswith(f"{BITS[0]} bits")), None)
    if best is None or best["contestant"].endswith("torch"):
        return None
    value = best["of_memcpy"]["p50"]
    return {"contestant": best["contestant"], "value": value, "passed": value >= BAR}


def described(megabytes: int) -> dict[str, Any]:
    """Machine, software, commit, date, load."""
    import torch

    from ssdtune.probe.machine import processor_name

    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "megabytes": megabytes,
        "torch": torch.__version__,
        "kernel": platform.release(),
        "commit": machine.commit_name(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the tables and, last, the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, action="append", default=[], help="a model folder")
    parser.add_argument("--megabytes", type=int, default=256, help="of bfloat16 a turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    import torch

    torch.set_num_threads(1)
    told = described(options.megabytes)
    values = made_up(options.megabytes * 10**6 // 2)
    found = {"normal, a scale a row": sizes(iter([values]))}
    for folder in options.model:
        found[folder.name] = sizes(matrices(folder))
    rows = times(values, options.rounds)
    result = {"sizes": found, "times": rows, "bar": bar_of(rows), "machine": told}
    print("\n".join(lines(result)))
    print(json.dumps(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
