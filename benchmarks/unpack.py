"""What decoding packed tensors costs beside copying as many bytes.

    python -m benchmarks.unpack [--dtype bfloat16] [--megabytes 256] [--rounds 7] [--moved] [--peers FOLDER]
                                [--json out.json]

Time: of this thread on its processor. Contestants take turns with one `memcpy` of as many bytes as they write, both
into memory that has been written before; each by the median of its rates beside the memcpy right before it. A memcpy
goes past the caches, as decoding so much does. What is slow decodes a sixteenth in its turn: torch's operators, and the
peers, which give new memory for each output. Peers are imported where they can be, from `--peers` too:

    python -m pip install --no-deps --target FOLDER bitsandbytes torchao hqq termcolor

--moved: instead of these, what a variant of packed weights costs, moved along one random direction: decoding and adding
noise in two passes, and both in one.

Native code is checked against the format's definition before it is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import thread_time
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import measures  # noqa: E402
from benchmarks.lossless import described  # noqa: E402

SHARE = 16  # what is slow decodes so much less
GROUP = 64  # elements that share a scale, here and with peers
CHECKED = 1 << 20  # elements that are compared with the definition
MOVED = ("4 bits (4,)", "8 bits (4, 1, 1, 2)", "NF4")  # formats of the variants
# Of a memcpy's rate, by the ending of the native functions' names: up to four bits, and above.
BARS = {"_avx512": (1.4, 1.1), "_avx2": (1.25, 0.5)}


@dataclass(frozen=True)
class Turn:
    """A contestant. run: decodes num_elements. bar: of a memcpy's rate."""

    name: str
    run: Callable[[], object]
    num_elements: int
    bar: float | None = None


# ------------------------------------------------------------------ contestants


def formats() -> Iterator[tuple[str, Any, bool | None]]:
    """Name, format, and whether it has at most four bits; None: it has no bar."""
    from ssdtune.kernels.affine import ORDERS, Affine
    from ssdtune.kernels.nibbles import E2M1, NF4, Nibbles
    from ssdtune.kernels.rotated import Rotated

    for bits, order in ORDERS.items():
        yield f"{bits} bits {order}", Affine(bits, order, GROUP), bits <= 4
    yield "4 bits of (4, 1, 1, 2)", Affine(4, ORDERS[8], GROUP), True
    yield "4 bits of (2, 1, 1, 2, 2)", Affine(4, (2, 1, 1, 2, 2), GROUP), True
    yield "4 bits, groups of 128", Affine(4, (4,), 128), True
    yield "8 bits (8,)", Affine(8, (8,), GROUP), False
    for bits, group in ((2, GROUP), (3, GROUP), (4, GROUP), (4, 128)):
        rotated = Rotated(Affine(bits, ORDERS[bits], group))
        yield f"{bits} bits, rotated groups of {group}", rotated, None
    yield "NF4", Nibbles(NF4, GROUP, is_high_first=True), True
    yield "MXFP4", Nibbles(E2M1, 32, is_high_first=False, scale="E8M0"), True


def random_parts(format: Any, num_elements: int) -> list[Any]:
    """Random codes, zeros and e8m0 scales of every size; other scales about 0.01."""
    import torch

    from ssdtune.kernels.nibbles import SCALE_DTYPES

    generator = torch.Generator().manual_seed(0)
    made: list[Any] = []
    for part in format.parts((num_elements,)):
        if part.dtype == "U8":
            bytes_of = torch.randint(0, 256, part.shape, dtype=torch.uint8, generator=generator)
            made.append(bytes_of)
        else:
            values = torch.rand(part.shape, generator=generator).add_(0.5).mul_(0.01)
            made.append(values.to(SCALE_DTYPES[part.dtype]))
    return made


def ours(out: Any) -> Iterator[Turn]:
    """Every format by the best native code, and two by torch's operators."""
    from ssdtune.kernels import decoding, unpack_native
    from ssdtune.kernels.native import library

    decoding.set_threads(1)
    native = library()
    for name, format, is_small in formats():
        if native is not None:
            suffix = native.suffixes[0]
            check(name, format, suffix, out.dtype)
            decode = partial(unpack_native.DECODERS[type(format)], format)
            run = partial(decode, random_parts(format, out.numel()), out, suffix)
            bars = BARS.get(suffix) if out.element_size() == 2 else None
            bar = None if bars is None or is_small is None else bars[not is_small]
            yield Turn(name, run, out.numel(), bar)
        if name in ("4 bits (4,)", "NF4"):
            some = out[: out.numel() // SHARE]
            by_torch = partial(format.by_torch, random_parts(format, some.numel()), some)
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
        parts = random_parts(format, out.numel())
        for kind in noise.KINDS:
            move = Move((noise.Direction(5, 1e-3, kind),))

            def two_passes(format: Any = format, parts: Any = parts, move: Move = move) -> None:
                unpack(format, parts, slot)
                noise.add_directions(out, slot, move.directions)

            one_pass = partial(unpack_add, format, parts, out, [move])
            yield Turn(f"{name}, {kind}, two passes", two_passes, out.numel())
            yield Turn(f"{name}, {kind}, one pass", one_pass, out.numel())


def check(name: str, format: Any, suffix: str, dtype: Any) -> None:
    """Native code against the definition, bit by bit."""
    import torch

    from ssdtune.kernels.unpack import unpack

    parts = random_parts(format, CHECKED)
    found, expected = torch.empty(CHECKED, dtype=dtype), torch.empty(CHECKED, dtype=dtype)
    unpack(format, parts, found, suffix=suffix)
    format.by_torch(parts, expected)
    if not torch.equal(found.view(torch.int16), expected.view(torch.int16)):
        raise SystemExit(f"{name}, {suffix}: not the same bits")


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
        if "of_memcpy" not in row:
            yield f"{rate} 1 | |"
            continue
        ratio = row["of_memcpy"]
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
