"""A step of AdamW on the CPU, on tensors like an adapter's and like a block's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssdtune.probe.timing import Run, time_all
from ssdtune.schedule.curve import Curve

if TYPE_CHECKING:
    import torch

ADAPTERS = tuple((num, (16, 576)) for num in (10, 60, 240))  # tensors, shape: rank 16
BLOCKS = tuple((4, (width, width)) for width in (1024, 2048))
WAYS = ("foreach", "fused")  # of torch


def measure_optimizer() -> dict[str, Curve]:
    """Way -> parameters to seconds; states and gradients in float32."""
    import torch

    cpu = torch.device("cpu")
    found: dict[str, Curve] = {}
    for way in WAYS:
        pieces: dict[float, Run] = {}
        for num, shape in (*ADAPTERS, *BLOCKS):
            parameters = [_parameter(shape) for _ in range(num)]
            optimizer = torch.optim.AdamW(
                parameters, foreach=way == "foreach", fused=way == "fused"
            )
            pieces[float(sum(p.numel() for p in parameters))] = optimizer.step
        found[way] = time_all(pieces, cpu)
    return found


def _parameter(shape: tuple[int, ...]) -> torch.nn.Parameter:
    import torch

    parameter = torch.nn.Parameter(torch.ones(shape))
    parameter.grad = torch.full(shape, 1e-3)
    return parameter
