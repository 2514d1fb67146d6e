"""The steps of a trace: when each began and ended, and how long a lane worked in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

# Top to bottom, as data flows.
LANES = ("nvme_read", "nvme_write", "h2d", "d2h", "d2d", "cpu", "compute")
LANE_LABELS = {
    "nvme_read": "NVMe read",
    "nvme_write": "NVMe write",
    "h2d": "host to device",
    "d2h": "device to host",
    "d2d": "device (unpack)",
    "cpu": "CPU (unpack)",
    "compute": "compute",
}


class OpRecord(Protocol):
    """One op as it ran. `wait_s` (how long compute stood still for weights) counts as 0 if absent,
    `is_miss` (fetched on demand) as false."""

    @property
    def lane(self) -> str: ...
    @property
    def block(self) -> str: ...
    @property
    def direction(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def start_s(self) -> float: ...
    @property
    def end_s(self) -> float: ...
    @property
    def num_bytes(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class StepWindow:
    """One training step on the trace's clock: from its first visit to the next step's first."""

    step: int
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """The step's length."""
        return self.end_s - self.start_s


def training_steps(trace: Iterable[OpRecord]) -> list[StepWindow]:
    """The windows of all steps with a backward half, in order; of all steps where none has one, as of a run of forward
    passes alone.

    A step ends where the next begins (optimizer and data loading are part of it), or with its own
    last visit if an evaluation or nothing follows.
    """
    visits: dict[int, list[OpRecord]] = {}
    for op in trace:
        if op.lane == "compute":
            visits.setdefault(op.step, []).append(op)
    starts = {step: min(op.start_s for op in ops) for step, ops in visits.items()}
    trained = {step for step, ops in visits.items() if any(op.direction == "B" for op in ops)}
    trained = trained or set(visits)
    windows = []
    for step in sorted(trained):
        own_end = max(op.end_s for op in visits[step])
        end = starts[step + 1] if step + 1 in trained else own_end
        windows.append(StepWindow(step=step, start_s=starts[step], end_s=end))
    return windows


def wait_of(op: OpRecord) -> float:
    """Seconds that compute stood still for its weights."""
    return getattr(op, "wait_s", 0.0)


def is_miss(op: OpRecord) -> bool:
    """Whether the block was fetched on demand."""
    return getattr(op, "is_miss", False)


def busy_seconds(trace: Iterable[OpRecord], lane: str, window: StepWindow) -> float:
    """Seconds of the window in which the lane worked, overlapping ops once, waits left out."""
    spans = sorted(
        (max(op.start_s + wait_of(op), window.start_s), min(op.end_s, window.end_s))
        for op in trace
        if op.lane == lane
    )
    total, until = 0.0, window.start_s
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
