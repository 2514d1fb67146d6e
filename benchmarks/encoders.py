"""How fast `ssdtune pack` encodes: weights a second of each format, on one thread and on more.

    python -m benchmarks.encoders [--millions 32] [--threads 1 2] [--rounds 3] [--only nf4 …] [--json out.json]

Each format encodes as many million made-up bfloat16 weights as it is told, in 4096 columns, by the function that packing
calls; numbers of threads take turns, each has the median of its rounds. Beside the wall clock stands the processor time
of all threads, which other programs disturb less: what a core makes by it is the rate on a machine with nothing else
to do, but for what threads wait for each other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.lossless import described, made_up  # noqa: E402
from benchmarks.machine import print_result  # noqa: E402

LARGE = 70e9  # weights of the model whose hours are told
WIDTH = 4096


def formats() -> dict[str, Any]:
    """What is encoded, by what it is called: `quantization`'s words, and rotated groups."""
    from ssdtune.packing.wanted import FORMATS, Wanted

    words = ("2", "3", "4", "6", "8", "4/8", "3/8", *FORMATS[1:])
    wanted = {word: Wanted.of(word) for word in words}
    return {
        **{word: each.chosen() for word, each in wanted.items()},
        "4, rotated": Wanted(bits=4, is_rotated=True).chosen(),
        "lossless, 3 bits": Wanted("lossless", bits=3).chosen(),
    }


def seconds_of(weights: Any, format: Any, num_threads: int) -> tuple[float, float]:
    """By the wall clock, and of all this process's threads on their processors."""
    import torch

    from ssdtune.packing.encoding import encoded

    torch.set_num_threads(num_threads)
    computed, started = process_time(), perf_counter()
    encoded("weights", weights, format)
    return perf_counter() - started, process_time() - computed


def row_of(
    name: str, format: Any, weights: Any, threads: Sequence[int], num_rounds: int
) -> dict[str, Any]:
    """Weights a second by number of threads: median by the wall clock, and of a second of processor time."""
    taken: dict[int, list[tuple[float, float]]] = {number: [] for number in threads}
    for turn in range(num_rounds + 1):
        for number in threads:
            took = seconds_of(weights if turn else weights[:64], format, number)
            if turn:  # the first warms up
                taken[number].append(took)
    wall, cpu = (
        {n: weights.numel() / statistics.median(t[i] for t in taken[n]) for n in threads}
        for i in (0, 1)
    )
    return {"format": name, "weights_per_s": wall, "weights_per_cpu_s": cpu}


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Markdown of a result."""
    threads, told = result["threads"], result["machine"]
    names = [f"{number} thread{'s' if number > 1 else ''}" for number in threads]
    cells = [f"{name}, wall clock | of a core's second" for name in names]
    yield f"| format | {' | '.join(cells)} | 70 billion, hours of one core |"
    yield "| --- " * (2 * len(threads) + 2) + "|"
    for row in result["rows"]:
        rates = [
            row[kind][n] / 1e6 for n in threads for kind in ("weights_per_s", "weights_per_cpu_s")
        ]
        hours = LARGE / row["weights_per_cpu_s"][threads[0]] / 3600
        yield f"| {row['format']} | {' | '.join(f'{rate:.1f}' for rate in rates)} | {hours:.1f} |"
    yield ""
    yield (
        f"Millions of weights a second; {told['processor']}, {told['cores']} cores; {result['millions']} million "
        f"weights a turn; torch {told['torch']}, Linux {told['kernel']}; commit {told['commit']}; {told['date']}; load "
        f"average at the start {told['load_average']:.1f}, at the end {result['load_at_end']:.1f}."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table and, last, the JSON."""
    known = formats()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--millions", type=int, default=32, help="of weights a turn")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=known, default=list(known))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    told = described(2 * options.millions)
    weights = made_up(options.millions * 10**6 // WIDTH * WIDTH).view(-1, WIDTH)
    rows = [
        row_of(name, known[name], weights, options.threads, options.rounds) for name in options.only
    ]
    result = {
        "millions": options.millions,
        "threads": options.threads,
        "rows": rows,
        "machine": told,
        "load_at_end": os.getloadavg()[0],
    }
    print("\n".join(lines(result)))
    print_result(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
