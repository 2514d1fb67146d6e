"""The process of one contestant: builds it, takes a step when told to, says what it cost.

Reads one JSON object a line from stdin ({"do": "step"}, {"do": "set", …}, {"do": "end"}) and
answers each with one line. What libraries print goes to stderr, which the parent keeps in a file.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO


def memory_peak_bytes() -> int:
    """Largest resident set so far (VmHWM of proc(5)): code, mapped files and heap."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def forget_peak() -> bool:
    """Starts the peak anew from what is resident now (proc(5), clear_refs 5); False if refused."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def disk_bytes() -> tuple[int, int]:
    """Bytes that this process made the drive read and write (proc(5), io): no page-cache hits."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0, 0
    counts = dict(line.split(": ") for line in lines)
    return int(counts["read_bytes"]), int(counts["write_bytes"])


def measure(contestant: Any) -> dict[str, Any]:
    """One step: `seconds` until nothing of it is left to do, read-ahead included."""
    disk, cpu, start = disk_bytes(), time.process_time(), time.perf_counter()
    loss = contestant.step()
    done = time.perf_counter()
    settled = contestant.settle()
    cpu_s, after = time.process_time() - cpu, disk_bytes()
    return {
        "seconds": max(done, settled or done) - start,
        "returned_s": done - start,
        "cpu_s": cpu_s,
        "loss": loss,
        "disk_read_bytes": after[0] - disk[0],
        "disk_written_bytes": after[1] - disk[1],
        **contestant.about_step(),
    }


def serve(contestant: Any, requests: TextIO, answers: TextIO) -> None:
    """Answers until told to end, or until the parent is gone."""
    peak_at_load = memory_peak_bytes()
    was_reset = forget_peak()

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    answer({"trains": contestant.trains, **contestant.about()})
    for line in requests:
        request = json.loads(line)
        act = request.pop("do")
        if act == "step":
            answer(measure(contestant))
        elif act == "set":
            contestant.set(request)
            answer({})
        elif act == "end":
            peaks = {"load_peak_rss_bytes": peak_at_load, "peak_rss_bytes": memory_peak_bytes()}
            contestant.close()
            answer({**peaks, "peak_is_of_steps_alone": was_reset, **contestant.about()})
            return


def main() -> int:
    """`python -m benchmarks.worker SPEC.json`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = json.loads(Path(sys.argv[1]).read_text())
    import torch

    torch.set_num_threads(spec["threads"])
    from benchmarks.contestants import builders

    serve(builders()[spec["kind"]](spec), sys.stdin, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
