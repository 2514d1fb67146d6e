"""What a row must say about where it was measured, and the rates from which floors are made."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("float32", "bfloat16")


def print_result(result: dict[str, Any], to: Path | None) -> None:
    """Prints it as JSON, which is the last line, and writes it to a file, where one is given."""
    text = json.dumps(result)
    if to:
        to.write_text(text + "\n")
    print(text)


def describe(model: Path, *, num_threads: int) -> dict[str, Any]:
    """Machine, drive, software, commit, date and load."""
    import torch
    import transformers

    from ssdtune.probe.machine import processor_name

    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": num_threads,
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": "cpu",
        "drive": drive_name(model),
        "filesystem": filesystem_name(model),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit_name(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0],
    }


def _mount(path: Path) -> tuple[str, str]:
    """Device and file-system type of the mount that holds `path`."""
    resolved = path.resolve()
    best, found = -1, ("unknown", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        device, point, kind = line.split()[:3]
        if resolved.is_relative_to(point) and len(point) > best:
            best, found = len(point), (device, kind)
    return found


def filesystem_name(path: Path) -> str:
    """For instance "ext4"."""
    return _mount(path)[1]


def drive_name(path: Path) -> str:
    """The block device under `path` and its model, where sysfs knows one."""
    device = _mount(path)[0]
    number = path.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    for folder in (block, block.resolve().parent if block.exists() else block):
        model = folder / "device" / "model"
        if model.is_file():
            return f"{device} ({model.read_text().strip()})"
    return f"{device} (the system names no model)"


def commit_name() -> str | None:
    """The commit measured, "+ changes" where files differ from it; None outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        if head.returncode != 0:
            return None
        dirty = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return head.stdout.strip() + (" + changes" if dirty.stdout.strip() else "")


def matmul_flops_per_s(dtype: str, *, rows: int, width: int, seconds: float = 0.6) -> float:
    """Best rate of [rows, width] x [width, 3 width] in `dtype`, tried for about `seconds`.

    Best and not median: it makes a floor. One product is run first to warm caches and threads.
    """
    import torch

    kind = getattr(torch, dtype)
    left, right = torch.ones(rows, width, dtype=kind), torch.ones(width, 3 * width, dtype=kind)
    best, spent = float("inf"), 0.0
    for turn in range(1000):
        start = perf_counter()
        torch.mm(left, right)
        took = perf_counter() - start
        spent += took
        if turn:
            best = min(best, took)
        if turn and spent >= seconds:
            break
    return 6.0 * rows * width * width / best


def choose_dtype(asked: str, rates: dict[str, float]) -> tuple[str, str]:
    """The dtype to train in, and one sentence that says why. rates: FLOP/s by dtype, as measured."""
    told = ", ".join(f"{name} {rate / 1e9:.1f} GFLOP/s" for name, rate in rates.items())
    if asked != "auto":
        return asked, f"asked for; matrix products here: {told}"
    fastest = max(rates, key=lambda name: rates[name])
    return fastest, f"the faster one here: {told}"


def read_bytes_per_s(storage: Any, file: Path, seconds: float = 0.7) -> float:
    """Rate at which this storage reads this file with two threads, bytes/s, best of three tries."""
    from ssdtune.swap.readers import measure_read_rate

    return max(measure_read_rate(storage, file, seconds) for _ in range(3)) * 1e9
