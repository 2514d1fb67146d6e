"""Markdown of a result: `python benchmarks/table.py out.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

COLUMNS = (
    "contestant",
    "trains",
    "losses",
    "s / step (p20-p80, n)",
    "floor (limit); predicted",
    "ratio",
    "to limit",
    "stall",
    "busy: read, compute",
    "read / step",
    "written / step",
    "misses",
    "peak RSS",
)


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """A table for each workload, the bars, and what the numbers were measured on."""
    rows = result["rows"]
    for workload in dict.fromkeys((row["rows"], row["length"]) for row in rows):
        yield f"\n**{workload[0]} x {workload[1]} tokens**\n"
        yield f"| {' | '.join(COLUMNS)} |"
        yield "|" + " --- |" * len(COLUMNS)
        for row in rows:
            if (row["rows"], row["length"]) == workload:
                yield f"| {' | '.join(cells(row))} |"
    yield ""
    for bar in result["bars"]:
        verdict = "met" if bar["passed"] else "**not met**"
        yield f"- {bar['bar']}: {bar['value']:.3g} (bar {bar['limit']:g}): {verdict}"
    if rows:
        yield ""
        yield from provenance(rows[0])


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row's cells, as many as COLUMNS."""
    if "not_measured" in row:
        empty = [""] * (len(COLUMNS) - 2)
        return [row["contestant"], f"not measured: {row['not_measured']}".replace("|", "/"), *empty]
    seconds = row["seconds"]
    return [
        row["contestant"],
        f"{row['trains']}, {row['dtype']}",
        _losses(row),
        f"{seconds['p50']:.2f} ({seconds['p20']:.2f}-{seconds['p80']:.2f}, {seconds['n']})",
        _floor(row),
        f"{row['ratio']['p50']:.3f} of {row['base']}",
        _to_limit(row),
        f"{row['stall_s']:.2f} s" if "stall_s" in row else "",
        _busy(row),
        _megabytes(row["disk_read_bytes"]),
        _megabytes(row["disk_written_bytes"]),
        str(row.get("misses", "")),
        f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
    ]


def _losses(row: Mapping[str, Any]) -> str:
    losses = row["losses"]
    if losses["bit_equal"]:
        return f"equal to the bit, {losses['steps']} steps"
    return f"off by {losses['max_difference']:.1e} of {losses['first_expected']:.3f}"


def _floor(row: Mapping[str, Any]) -> str:
    if "floor" not in row:
        return ""
    floor = row["floor"]
    predicted = f"; {floor['predicted_s']:.2f}" if "predicted_s" in floor else ""
    return f"{floor['seconds']:.2f} ({floor['limit']}){predicted}"


def _to_limit(row: Mapping[str, Any]) -> str:
    if "ratio_to_limit" not in row:
        return ""
    return (
        f"{row['ratio_to_limit']:.3f}, passes {row['ratio_to_passes']:.3f} "
        f"(reading/memory {row['reading_over_in_memory']:.2f})"
    )


def _busy(row: Mapping[str, Any]) -> str:
    busy = row.get("busy", {})
    return (
        ", ".join(f"{100 * busy.get(lane, 0.0):.0f} %" for lane in ("nvme_read", "compute"))
        if busy
        else ""
    )


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.0f} MB"


def provenance(row: Mapping[str, Any]) -> Iterator[str]:
    """What stands beneath a table."""
    yield (
        f"{row['processor']}, {row['cores']} cores, {row['threads']} threads, "
        f"{row['ram_bytes'] / 2**30:.0f} GiB RAM, {row['device']}; {row['drive']}, {row['filesystem']}, "
        f"{row['storage']} reads at {row['drive_bytes_per_s'] / 1e9:.2f} GB/s; "
        f"matrix products at {row['matmul_flops_per_s'] / 1e9:.1f} GFLOP/s."
    )
    yield (
        f"{row['model']}, {row['tokens']}; dtype: {row['dtype_why']}. "
        f"torch {row['torch']}, transformers {row['transformers']}, Python {row['python']}, "
        f"Linux {row['kernel']}; commit {row['commit']}; {row['date']}; "
        f"load average at the start {row['load_average']:.1f}."
    )


def main() -> int:
    """Prints the table of the file named on the command line."""
    if len(sys.argv) != 2:
        print("usage: python benchmarks/table.py out.json", file=sys.stderr)
        return 2
    print("\n".join(lines(json.loads(Path(sys.argv[1]).read_text()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
