"""Moving weights along a random direction, as zeroth-order steps do."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ssdtune.probe.timing import time_all
from ssdtune.schedule.curve import Curve
from ssdtune.schedule.profile import PERTURB, PERTURB_SIGNS

if TYPE_CHECKING:
    import torch

ELEMENTS = (2**12, 2**16, 2**19, 2**21, 2**23)
KEY, SCALE = 7, 1e-3


def measure_perturbing(device: torch.device, dtype: torch.dtype) -> dict[str, Curve]:
    """Elements that move along one direction into other memory, of normal numbers and of signs."""
    import torch

    from ssdtune.kernels.noise import GAUSSIAN, RADEMACHER, Direction, add_directions

    base = torch.ones(max(ELEMENTS), dtype=dtype, device=device)
    to = torch.empty_like(base)
    found: dict[str, Curve] = {}
    for name, kind in ((PERTURB, GAUSSIAN), (PERTURB_SIGNS, RADEMACHER)):
        directions = [Direction(KEY, SCALE, kind)]
        pieces = {float(n): partial(add_directions, to[:n], base[:n], directions) for n in ELEMENTS}
        found[name] = time_all(pieces, device, is_compute=True)
    return found
