"""Operators by kind and size: matrix products, passes over values, fused attention, and pages of new memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ssdtune.probe.matrices import by_next
from ssdtune.probe.timing import Run, time_all
from ssdtune.schedule.curve import Curve, curve_of

if TYPE_CHECKING:
    import torch

# (tokens, width in, width out) of matrix products, from an adapter's of few tokens to a large model's layers
PRODUCTS = (
    (16, 256, 16),
    (128, 576, 16),
    (16, 576, 576),
    (64, 576, 576),
    (128, 576, 1536),
    (512, 576, 1536),
    (512, 1024, 4096),
    (1024, 2048, 4096),
    (1024, 4096, 8192),
)
LENGTHS = (32, 128, 256, 512, 1024)  # of attention, 8 heads of 64
PASS_BYTES = (2**12, 2**16, 2**19, 2**21, 2**23, 2**25, 2**27)
FRESH_SIZES = (2**25, 3 * 2**24, 2**26, 3 * 2**25, 2**27)


def measure_operators(device: torch.device, dtype: torch.dtype) -> dict[str, Curve]:
    """All kinds of operators in one number format."""
    import torch

    made: dict[str, Any] = {"device": device, "dtype": dtype}
    with torch.no_grad():
        curves = _products(made, device)
        passes: dict[float, Run] = {}
        specials: dict[float, Run] = {}
        for num_bytes in PASS_BYTES:
            values = torch.randn(num_bytes // (3 * dtype.itemsize), **made)
            out = torch.empty_like(
                values
            )  # memory that has its pages: fresh ones are measured apart
            passes[num_bytes] = partial(torch.mul, values, values.clone(), out=out)
            specials[num_bytes * 2 / 3] = partial(torch.ops.aten.silu.out, values, out=out)
        curves["pointwise"] = time_all(passes, device, is_compute=True)
        curves["special"] = time_all(specials, device, is_compute=True)
    return curves | _attention(made, device)


def measure_fresh() -> Curve:
    """What the pages of large new tensors in RAM take, in any number format: writing one just made, less writing one
    that is there."""
    import torch

    cpu = torch.device("cpu")
    there: dict[float, Run] = {}
    made: dict[float, Run] = {}
    for num_bytes in FRESH_SIZES:
        there[num_bytes] = partial(torch.zeros(num_bytes, dtype=torch.uint8).fill_, 1)
        made[num_bytes] = partial(_made_and_written, num_bytes)
    new, old = (time_all(pieces, cpu, is_compute=True) for pieces in (made, there))
    least = 1e-12  # a curve's times are above 0
    return curve_of((n, max(new.seconds(n) - old.seconds(n), least * n)) for n, _ in new.points)


def _made_and_written(num_bytes: int) -> None:
    import torch

    torch.empty(num_bytes, dtype=torch.uint8).fill_(1)


def _products(made: Mapping[str, Any], device: torch.device) -> dict[str, Curve]:
    """Both products of a layer: values by the transposed weight, and gradients by the weight. Their layouts differ, and
    so do their rates, many times over where a format is emulated."""
    import torch

    forward: dict[float, Run] = {}
    backward: dict[float, Run] = {}
    memory = torch.randn(max(wide * out for _, wide, out in PRODUCTS), **made)
    for tokens, wide, out in PRODUCTS:
        flop, shape = 2.0 * tokens * wide * out, (out, wide)
        values, gradients = (torch.randn(tokens, width, **made) for width in (wide, out))
        forward[flop] = by_next(torch.nn.functional.linear, values, memory, shape)
        backward[flop] = by_next(torch.matmul, gradients, memory, shape)
    return {
        "matmul_transposed": time_all(forward, device, is_compute=True),
        "matmul": time_all(backward, device, is_compute=True),
    }


def _attention(made: Mapping[str, Any], device: torch.device) -> dict[str, Curve]:
    import torch

    from ssdtune.visit.counting import BACKWARD_FLOP

    forward: dict[float, Run] = {}
    both: dict[float, Run] = {}
    for length in LENGTHS:
        q, k, v = (torch.randn(1, 8, length, 64, **made).requires_grad_() for _ in range(3))
        ahead = _attend(q.detach(), k.detach(), v.detach())
        flop = 2.0 * 8 * length * length * 64
        forward[flop] = ahead
        both[flop] = _attend_and_back(q, k, v)
    one, two = (time_all(runs, device, is_compute=True) for runs in (forward, both))
    back = {
        flop * BACKWARD_FLOP: max(seconds - one.seconds(flop), seconds / 10)
        for flop, seconds in two.points
    }
    return {"attention": one, "attention_backward": curve_of(back.items())}


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Run:
    import torch

    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _attend_and_back(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Run:
    import torch

    ahead = _attend(q, k, v)
    return lambda: torch.autograd.grad(ahead().sum(), (q, k, v))
