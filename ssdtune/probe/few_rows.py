"""Products of few rows with matrices that no cache holds, as a grid of rows and matrices' sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssdtune.memory import free_ram
from ssdtune.probe.machine import free_device_bytes
from ssdtune.probe.matrices import Product, by_next
from ssdtune.probe.timing import Run, time_all
from ssdtune.schedule.curve import Curve
from ssdtune.schedule.products import Grid

if TYPE_CHECKING:
    import torch

ROWS = (1, 4, 16, 64, 256)
# Of square matrices, 4 to 268 MB of float32; smaller ones go by their FLOP, as those of the reference model do.
WIDTHS = (1024, 1728, 2896, 4864, 8192)
GRID_ROUNDS, LONGEST_S = 3, 0.05
RAM_SHARE = 0.25  # of what is free, for the largest matrix


def measure_few_rows(device: torch.device, dtype: torch.dtype) -> dict[str, Grid]:
    """The grid of each kind of product: by the transposed weight as in forward, and by the weight as in backward."""
    import torch

    widths = [n for n in WIDTHS if n * n * dtype.itemsize <= RAM_SHARE * _free_bytes(device)]
    if not widths:
        return {}
    # Laid out as a slot is: kernels choose by alignment, and the kernel gives it huge pages.
    memory = _memory(max(widths) ** 2 * dtype.itemsize, device).view(dtype).fill_(0.01)
    grids = {"matmul_transposed": torch.nn.functional.linear, "matmul": torch.matmul}
    with torch.no_grad():
        return {kind: _grid(function, memory, widths, device) for kind, function in grids.items()}


def _grid(function: Product, memory: torch.Tensor, widths: list[int], device: torch.device) -> Grid:
    """Rows -> its curve. More rows than those whose smallest matrix takes half of LONGEST_S are left out, as where a format
    is emulated: the rest of their FLOP goes by the rate of many rows."""
    grid: dict[int, Curve] = {}
    for rows in ROWS:
        pieces = _pieces(function, memory, rows, widths)
        grid[rows] = time_all(pieces, device, rounds=GRID_ROUNDS, longest_s=LONGEST_S)
        if grid[rows].points[0][1] > LONGEST_S / 2:
            break
    return grid


def _pieces(
    function: Product, memory: torch.Tensor, rows: int, widths: list[int]
) -> dict[float, Run]:
    """FLOP -> so many rows by a square matrix."""
    import torch

    pieces: dict[float, Run] = {}
    for width in widths:
        values = torch.ones(rows, width, dtype=memory.dtype, device=memory.device)
        pieces[2.0 * rows * width * width] = by_next(function, values, memory, (width, width))
    return pieces


def _memory(num_bytes: int, device: torch.device) -> torch.Tensor:
    import torch

    from ssdtune.swap.storage import aligned_bytes

    if device.type == "cpu":
        return aligned_bytes(num_bytes)
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _free_bytes(device: torch.device) -> int:
    found = free_device_bytes(device)
    return free_ram() if found is None else found
