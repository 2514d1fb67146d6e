"""The machine itself: its name, how much of its device is free, and how that is waited for."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def machine_name(device: torch.device) -> str:
    """For people."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def processor_name() -> str:
    """As the kernel has it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.lower().startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def free_device_bytes(device: torch.device) -> int | None:
    """Free of the device's memory now; None of the processor."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def waiter(device: torch.device) -> Callable[[], None]:
    """What waits until the device has done what it was given."""
    import torch

    if device.type == "cuda":
        return lambda: torch.cuda.current_stream(device).synchronize()
    return lambda: None
