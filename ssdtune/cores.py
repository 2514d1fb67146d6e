"""How much of the processor others take, by what the kernel says: /proc/stat (proc(5))."""

from __future__ import annotations

import os
from pathlib import Path


def cpu_seconds() -> float:
    """CPU time of all processes but this one, and what other machines took of these cores."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields)
    own = os.times()
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - own.user - own.system - own.children_user - own.children_system
