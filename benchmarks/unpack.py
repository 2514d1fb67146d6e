"""What decoding packed tensors costs beside copying as many bytes.

    python -m benchmarks.unpack [--dtype bfloat16] [--megabytes 256] [--rounds 7] [--moved] [--peers FOLDER]
                                [--json out.json]

Time: of this thread on its processor. Contestants take turns with one `memcpy` of as many bytes as they write, both
into memory that has been written before; each by the median of its rates beside the memcpy right before it. A memcpy
goes past the caches, as decoding so much does. What is slow decodes a sixteenth in its turn: torch's operators, and the
peers, which give new memory for each output. Two threads take turns with one, by the wall clock; what this machine's
memory takes from two, memcpy and memset say. Peers are imported where they can be, from `--peers` too:

    python -m pip install --no-deps --target FOLDER bitsandbytes torchao hqq termcolor

--moved: instead of these, what a variant of packed weights costs, moved along one random direction: decoding and adding
noise in two passes, and both in one; and what signs cost beside decoding alone.

Native code is checked against the format's definition before it is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import measures  # noqa: E402
from benchmarks.lossless import described  # noqa: E402

SHARE = 16  # what is slow decodes so much less
GROUP = 64  # elements that share a scale, here and with peers
WIDTH = 4096  # columns, where a format has blocks of rows and columns
CHECKED = 1 << 20  # elements that are compared with the definition
MOVED = ("4 bits (4,)", "8 bits (4, 1, 1, 2)", "NF4")  # formats of the variants
THREADED = MOVED[:2]  # formats that two threads decode
# Of a memcpy's rate, by the ending of the native functions' names and the kind of format ("4 bits": at most so many).
BARS = {
    "_avx512": {
        "4 bits": 1.4,
        "5 bits": 1.35,
        "6 bits": 1.15,
        "8 bits": 1.1,
        "FP8": 0.55,
        "4 bits (4,), signs": 0.85,  # of the rate without
    },
    "_avx2": {"4 bits": 1.25, "5 bits": 0.5, "6 bits": 0.5, "8 bits": 0.5, "FP8": 0.45},
}
KINDS = {  # of bits
    **dict.fromkeys(range(1, 5), "4 bits"),
    5: "5 bits",
    6: "6 bits",
    **dict.fromkeys((7, 8), "8 bits"),
}
THREADS_BAR = 1.7  # of one thread's rate


@dataclass(frozen=True)
class Turn:
    """A contestant. run: decodes num_elements. bar: of a memcpy's rate."""

    name: str
    run: Callable[[], object]
    num_elements: int
    bar: float | None = None


def bar_of(suffix: str, kind: str | None) -> float | None:
    """For the functions of this ending and a kind of format, decoded to 16 bits; None: there is none."""
    return BARS.get(suffix, {}).get(kind or "")


# ------------------------------------------------------------------ contestants


def formats() -> Iterator[tuple[str, Any, str | None]]:
    """Name, format, and the kind that its bar is of; None: it has no bar."""
    from ssdtune.kernels.affine import ORDERS, Affine
    from ssdtune.kernels.float8 import ScaledBytes
    from ssdtune.kernels.nibbles import E2M1, NF4, Nibbles, Nvfp4
    from ssdtune.kernels.rotated import Rotated

    for bits, order in ORDERS.items():
        yield f"{bits} bits {order}", Affine(bits, order, GROUP), KINDS[bits]
    yield "4 bits of (4, 1, 1, 2)", Affine(4, ORDERS[8], GROUP), KINDS[4]
    yield "4 bits of (2, 1, 1, 2, 2)", Affine(4, (2, 1, 1, 2, 2), GROUP), KINDS[4]
    yield "4 bits, groups of 128", Affine(4, (4,), 128), KINDS[4]
    yield "8 bits (8,)", Affine(8, (8,), GROUP), KINDS[8]
    for bits, group in ((2, GROUP), (3, GROUP), (4, GROUP), (4, 128)):
        rotated = Rotated(Affine(bits, ORDERS[bits], group))
        yield f"{bits} bits, rotated groups of {group}", rotated, None
    yield "NF4", Nibbles(NF4, GROUP, is_high_first=True), KINDS[4]
    yield "MXFP4", Nibbles(E2M1, 32, is_high_first=False, scale="E8M0"), KINDS[4]
    yield "NVFP4", Nvfp4(is_divided=False), None
    yield "FP8, blocks of 128", ScaledBytes((128, 128)), "FP8"


def shaped(format: Any, flat: Any) -> Any:
    """The elements in a shape that the format can have: as many whole rows as there are, where it has blocks of them."""
    from ssdtune.kernels.float8 import ScaledBytes

    if not isinstance(format, ScaledBytes):
        return flat
    return flat[: flat.numel() // WIDTH * WIDTH].view(-1, WIDTH)


def random_parts(format: Any, shape: tuple[int, ...]) -> list[Any]:
    """Random codes, zeros and scales of a byte, every one that is a number or e8m0's; other scales about 0.01."""
    import torch

    from ssdtune.kernels.nibbles import SCALE_DTYPES

    generator = torch.Generator().manual_seed(0)
    made: list[Any] = []
    for part in format.parts(shape):
        if part.dtype in ("U8", "F8_E4M3"):
            found = torch.randint(0, 256, part.shape, dtype=torch.uint8, generator=generator)
            if part.dtype == "F8_E4M3":
                found = found.masked_fill_((found & 127) == 127, 0).view(torch.float8_e4m3fn)
            made.append(found)
        else:
            values = torch.rand(part.shape, generator=generator).add_(0.5).mul_(0.01)
            made.append(values.to(SCALE_DTYPES[part.dtype]))
    return made


def ours(out: Any) -> Iterator[Turn]:
    """Every format by the best native code, and two by torch's operators."""
    from ssdtune.kernels import decoding
    from ssdtune.kernels.native import library
    from ssdtune.kernels.unpack import unpack

    decoding.set_threads(1)
    native = library()
    for name, format, kind in formats():
        if native is not None:
            check(name, format, out.dtype)
            to = shaped(format, out)
            run = partial(unpack, format, random_parts(format, tuple(to.shape)), to)
            bar = bar_of(native.suffixes[0], kind) if out.element_size() == 2 else None
            yield Turn(name, run, to.numel(), bar)
        if name in ("4 bits (4,)", "NF4"):
            some = out[: out.numel() // SHARE]
            by_torch = partial(format.by_torch, random_parts(format, tuple(some.shape)), some)
            yield Turn(f"{name}, torch", by_torch, some.numel())


def variants(out: Any) -> Iterator[Turn]:
    """Of a few formats, by the best native code: two passes over another tensor, and one."""
    import torch

    from ssdtune.kernels import decoding, noise
    from ssdtune.kernels.unpack import unpack
    from ssdtune.kernels.unpack_add import Move, unpack_add

    decoding.set_threads(1)
    slot = torch.zeros_like(out)
    for name, format, _ in formats():
        if name not in MOVED:
            continue
        parts = random_parts(format, tuple(out.shape))
        for kind in noise.KINDS:
            move = Move((noise.Direction(5, 1e-3, kind),))

            def two_passes(format: Any = format, parts: Any = parts, move: Move = move) -> None:
                unpack(format, parts, slot)
                noise.add_directions(out, slot, move.directions)

            one_pass = partial(unpack_add, format, parts, out, [move])
            yield Turn(f"{name}, {kind}, two passes", two_passes, out.numel())
            yield Turn(f"{name}, {kind}, one pass", one_pass, out.numel())


def check(name: str, format: Any, dtype: Any) -> None:
    """Native code against the definition, bit by bit."""
    import torch

    from ssdtune.kernels.unpack import unpack

    found, expected = (shaped(format, torch.empty(CHECKED, dtype=dtype)) for _ in range(2))
    parts = random_parts(format, tuple(found.shape))
    unpack(format, parts, found)
    format.by_torch(parts, expected)
    if not torch.equal(found.view(torch.int16), expected.view(torch.int16)):
        raise SystemExit(f"{name}: not the same bits")


def peers(num_elements: int) -> Iterator[Turn]:
    """Other libraries' four bits of a matrix, groups of 64, to bfloat16."""
    import torch

    matrix = torch.randn(-(-num_elements // 4096), 4096).mul_(0.02).bfloat16()
    if find_spec("bitsandbytes"):
        from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

        codes, state = functional.quantize_4bit(matrix, blocksize=GROUP, quant_type="nf4")
        run = partial(functional.dequantize_4bit, codes, state)
        yield Turn("bitsandbytes, NF4", run, matrix.numel())
    if find_spec("torchao"):
        yield Turn("torchao, 4 bits", torchao(matrix), matrix.numel())
    if find_spec("hqq"):
        from hqq.core.quantize import Quantizer  # pyright: ignore[reportMissingImports]

        codes, meta = Quantizer.quantize(
            matrix.float(), nbits=4, group_size=GROUP, axis=1, device="cpu"
        )
        meta = {**meta, "scale": meta["scale"].bfloat16(), "zero": meta["zero"].bfloat16()}
        yield Turn("hqq, 4 bits", partial(Quantizer.dequantize, codes, meta), matrix.numel())


def torchao(matrix: Any) -> Callable[[], object]:
    """Its affine codes, a byte each."""
    import torch
    from torchao.quantization import quant_primitives  # pyright: ignore[reportMissingImports]

    primitives: Any = quant_primitives
    shape, limits = (1, GROUP), (torch.uint8, 0, 15)
    scale, zero = primitives.choose_qparams_affine(
        matrix.float(), primitives.MappingType.ASYMMETRIC, shape, *limits
    )
    codes = primitives.quantize_affine(matrix.float(), shape, scale, zero, *limits)
    dequantize = partial(primitives.dequantize_affine, codes, shape, scale, zero, *limits)
    return partial(dequantize, output_dtype=torch.bfloat16)


# ------------------------------------------------------------------ time


def times(turns: Sequence[Turn], out: Any, num_rounds: int) -> list[dict[str, Any]]:
    """A row for each contestant, memcpy first: bytes written per second, and that beside memcpy's."""
    source = out.new_zeros(out.shape)
    copy = partial(ctypes.memmove, out.data_ptr(), source.data_ptr(), out.nbytes)
    copying: dict[str, list[float]] = {turn.name: [] for turn in turns}
    decoding: dict[str, list[float]] = {turn.name: [] for turn in turns}
    for round_idx in range(num_rounds + 1):
        for turn in turns:
            copied = seconds(copy)
            decoded = seconds(turn.run) * out.numel() / turn.num_elements
            if round_idx:  # the first warms up
                copying[turn.name].append(copied)
                decoding[turn.name].append(decoded)
    every_copy = [took for each in copying.values() for took in each]
    rows: list[dict[str, Any]] = [
        {"contestant": "memcpy", "bytes_per_s": out.nbytes / statistics.median(every_copy)}
    ]
    for turn in turns:
        of_memcpy = measures.paired_ratio(copying[turn.name], decoding[turn.name])
        rows.append(
            {
                "contestant": turn.name,
                "bytes_per_s": out.nbytes / statistics.median(decoding[turn.name]),
                "of_memcpy": of_memcpy,
                "bar": turn.bar,
                "passed": turn.bar is None or of_memcpy["p50"] >= turn.bar,
            }
        )
    return rows


def beside(
    usual: Callable[[], object],
    other: Callable[[], object],
    out: Any,
    num_rounds: int,
    *,
    clock: Callable[[], float],
    bar: float | None,
) -> dict[str, Any]:
    """A row's fields: how many times as fast as the usual way the other one makes `out`, in turns."""
    took: dict[Callable[[], object], list[float]] = {usual: [], other: []}
    for _ in range(num_rounds):
        for run, seconds_of in took.items():
            run()  # starts threads, warms up
            start = clock()
            run()
            seconds_of.append(clock() - start)
    ratio = measures.paired_ratio(took[usual], took[other])
    return {
        "bytes_per_s": out.nbytes / statistics.median(took[other]),
        "of_usual": ratio,
        "bar": bar,
        "passed": bar is None or ratio["p50"] >= bar,
    }


def threaded(out: Any) -> Iterator[tuple[str, Callable[[int], object], float | None]]:
    """Name, what so many threads do, and the bar of two beside one: what the memory takes from them, by memcpy and by
    memset of the output, a part in one piece each, then each of THREADED."""
    import torch

    from ssdtune.kernels import decoding
    from ssdtune.kernels.unpack import unpack

    source = torch.ones_like(out)
    acts: dict[str, Callable[[int, int], object]] = {
        "memcpy": lambda at, n: ctypes.memmove(out.data_ptr() + at, source.data_ptr() + at, n),
        "memset": lambda at, n: ctypes.memset(out.data_ptr() + at, 1, n),
    }
    with ThreadPoolExecutor(2) as pool:
        for name, act in acts.items():

            def share(num_threads: int, act: Callable[[int, int], object] = act) -> None:
                size = out.nbytes // num_threads
                list(pool.map(act, range(0, size * num_threads, size), [size] * num_threads))

            yield name, share, None
    for name, format, _ in formats():
        if name in THREADED:
            run = partial(unpack, format, random_parts(format, tuple(out.shape)), out)

            def by(num_threads: int, run: Callable[[], object] = run) -> None:
                decoding.set_threads(num_threads)
                run()

            yield name, by, THREADS_BAR
    decoding.set_threads(1)


def by_two_threads(out: Any, num_rounds: int) -> Iterator[dict[str, Any]]:
    """Yields a row for each of `threaded`: two threads beside one, by the wall clock, in turns."""
    for name, by, bar in threaded(out):
        row = beside(partial(by, 1), partial(by, 2), out, num_rounds, clock=perf_counter, bar=bar)
        yield {"contestant": f"{name}, two threads beside one, wall clock", **row}


def with_signs(out: Any, num_rounds: int, suffix: str) -> Iterator[dict[str, Any]]:
    """Yields a row for each of MOVED: decoded and moved by signs in one pass, beside decoded alone."""
    from ssdtune.kernels.noise import RADEMACHER, Direction
    from ssdtune.kernels.unpack import unpack
    from ssdtune.kernels.unpack_add import Move, unpack_add

    moves = [Move((Direction(5, 1e-3, RADEMACHER),))]
    for name, format, _ in formats():
        if name not in MOVED:
            continue
        parts = random_parts(format, tuple(out.shape))
        plain = partial(unpack, format, parts, out)
        moved = partial(unpack_add, format, parts, out, moves)
        bar = bar_of(suffix, f"{name}, signs")
        row = beside(plain, moved, out, num_rounds, clock=thread_time, bar=bar)
        yield {"contestant": f"{name}, with signs beside without", **row}


def seconds(run: Callable[[], object]) -> float:
    """Of this thread on a processor."""
    start = thread_time()
    run()
    return thread_time() - start


# ------------------------------------------------------------------ the table


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Markdown of a result."""
    yield "| decoder | GB/s written | of memcpy (p20-p80, n) | bar |"
    yield "| --- | --- | --- | --- |"
    for row in result["times"]:
        rate = f"| {row['contestant']} | {row['bytes_per_s'] / 1e9:.2f} |"
        ratio = row.get("of_memcpy", row.get("of_usual"))
        if ratio is None:
            yield f"{rate} 1 | |"
            continue
        spread = f"{ratio['p50']:.2f} ({ratio['p20']:.2f}-{ratio['p80']:.2f}, {ratio['n']})"
        verdict = "met" if row["passed"] else "**not met**"
        bar = "" if row["bar"] is None else f"{row['bar']:g}: {verdict}"
        yield f"{rate} {spread} | {bar} |"
    yield ""
    told = result["machine"]
    yield (
        f"{told['processor']}, {result['instructions']}, one thread of {told['cores']} cores; {told['megabytes']} MB "
        f"of {result['dtype']}; torch {told['torch']}, Linux {told['kernel']}; commit {told['commit']}; "
        f"{told['date']}; load average at the start {told['load_average']:.1f}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table and, last, the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--megabytes", type=int, default=256, help="written in a turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--moved", action="store_true", help="variants of packed weights")
    parser.add_argument("--peers", type=Path, help="a folder to import other libraries from")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.peers is not None:
        sys.path.append(str(options.peers))

    import torch

    from ssdtune.kernels.native import library

    torch.set_num_threads(1)
    told = described(options.megabytes)
    dtype = getattr(torch, options.dtype)
    out = torch.zeros(options.megabytes * 10**6 // dtype.itemsize, dtype=dtype)
    native = library()
    turns = variants(out) if options.moved else (*ours(out), *peers(out.numel() // SHARE))
    rows = times([*turns], out, options.rounds)
    if native is not None and options.moved and options.dtype == "bfloat16":
        rows += with_signs(out, options.rounds, native.suffixes[0])
    elif native is not None and not options.moved and len(os.sched_getaffinity(0)) > 1:
        rows += by_two_threads(out, options.rounds)
    result = {
        "times": rows,
        "dtype": options.dtype,
        "instructions": "nothing native" if native is None else native.suffixes[0][1:],
        "machine": told,
    }
    print("\n".join(lines(result)))
    print(json.dumps(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
