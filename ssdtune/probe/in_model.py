"""What operators take inside a model beyond their curves: a small reference model is trained and its visits are fitted."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from ssdtune.probe import timing
from ssdtune.probe.steady import pace
from ssdtune.schedule.curve import Curve
from ssdtune.schedule.plan import Direction, Lane
from ssdtune.schedule.profile import InModel, Profile

if TYPE_CHECKING:
    import torch

    from ssdtune.schedule.trace import TraceOp

# A model of no particular kind: what its blocks take, beyond their operators' curves, is taken for any model's.
REFERENCE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "vocab_size": 1024,
}
REFERENCE_TOKENS = (16, 64, 256)
LEAST_FACTOR = 1.0  # within a model nothing is faster than alone
WARM_UPS = 2  # steps that allocate
LONG_PASSES_S = 1.0  # all steps at a length: beyond it FEW_ROUNDS do
REFERENCE_STEP_S = 0.6  # a number format whose step takes longer gets no more tokens


class Point(NamedTuple):
    """A visit: operators that the model's code and that autograd calls, seconds by their curves, seconds measured.
    is_recorded: for a backward pass."""

    num_calls: int
    num_autograd_calls: int
    curves_s: float
    seconds: float
    is_recorded: bool = True


def measure_visits(
    device: torch.device, dtype: torch.dtype, operators: dict[str, Curve]
) -> list[Point]:
    """Trains an adapter on a small random model, streamed with all weights in place, at several lengths; what a layer's
    visits took, for `fit_in_model`."""
    import warnings

    import torch

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries about one another
        model = _reference(Path(folder), device, dtype)
        points: list[Point] = []
        try:
            for tokens in REFERENCE_TOKENS:
                ids = torch.randint(3, REFERENCE["vocab_size"], (1, tokens), device=device)
                found = _passes(model, ids, operators)
                points += found
                layer_s = sum(point.seconds for point in found)
                if REFERENCE["num_hidden_layers"] * layer_s > REFERENCE_STEP_S:
                    break
        finally:
            model.get_base_model().ssdtune.close()
    return points


def _reference(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The model, its file in `folder`, with LoRA on all linear layers."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from ssdtune.schedule.plan import Budgets
    from ssdtune.swap.storage import BufferedStorage
    from ssdtune.visit.assemble import assemble
    from ssdtune.visit.build import build_meta
    from ssdtune.visit.draft import Options

    sizes: dict[str, Any] = {**REFERENCE, "num_attention_heads": 8, "num_key_value_heads": 8}
    made: Any = LlamaForCausalLM(LlamaConfig(**sizes))
    made.to(dtype)
    made.config.save_pretrained(folder)  # `made.save_pretrained` shows a bar
    save_file(made.state_dict(), folder / "model.safetensors", {"format": "pt"})
    room = 2**30  # all of it, several times
    options = Options(
        device=device,
        budgets=Budgets(ram_bytes=room, device_bytes=room if device.type != "cpu" else 0),
        storage=BufferedStorage(),
    )
    base: Any = assemble(build_meta(folder, dtype=dtype), options)
    return get_peft_model(base, LoraConfig(r=16, target_modules="all-linear")).train()


def _passes(model: Any, ids: torch.Tensor, operators: dict[str, Curve]) -> list[Point]:
    """A layer's two passes of training and its forward alone, at this length and at the pace of the curves."""
    import torch

    from ssdtune.visit.rehearsal import rehearse

    work = rehearse(model, {"input_ids": ids}).work
    assert work is not None
    engine = model.get_base_model().ssdtune.engine
    passes = [
        ("train", Direction.FORWARD),
        ("train", Direction.BACKWARD),
        ("forward", Direction.FORWARD),
    ]
    times: dict[tuple[str, Direction], list[float]] = {each: [] for each in passes}
    start = perf_counter()
    for num in range(WARM_UPS + timing.ROUNDS):
        if num >= WARM_UPS + timing.FEW_ROUNDS and perf_counter() - start > LONG_PASSES_S:
            break
        slower = pace()
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
        for op in _layers_of_last_step(engine):
            times["train", op.direction].append((op.end_s - op.start_s - op.wait_s) / slower)
        with torch.no_grad():
            model(input_ids=ids, labels=ids)
        for op in _layers_of_last_step(engine):
            times["forward", op.direction].append((op.end_s - op.start_s - op.wait_s) / slower)
    layer = next(i for i, recipe in enumerate(engine.recipes) if ".layers." in recipe.name)
    curves = Profile(name="probe", operators={work.dtype: operators}, transfers={})
    points: list[Point] = []
    for (kind, direction), measured in times.items():
        each = work.passes[kind][layer, direction][0]
        steady = measured[WARM_UPS * REFERENCE["num_hidden_layers"] :]
        point = Point(
            each.num_calls - each.num_autograd_calls,
            each.num_autograd_calls,
            each.curves_s(curves, work.dtype),
            median(steady),
            kind == "train",
        )
        points.append(point)
    return points


def _layers_of_last_step(engine: Any) -> list[TraceOp]:
    return [
        op
        for op in list(engine.trace)
        if op.step == engine.step and op.lane is Lane.COMPUTE and ".layers." in op.block
    ]


def fit_in_model(points: Sequence[Point], *, is_hidden: bool) -> InModel:
    """Overheads and factors, relative errors as small as may be.

    Where nothing is recorded a call takes less, and what it gives is freed at once and its memory used again while
    caches hold it: such passes have an overhead and a factor of their own, at most those of recorded ones.
    """
    unrecorded = [p for p in points if not p.is_recorded]
    found = _fit_recorded([p for p in points if p.is_recorded], is_hidden=is_hidden)
    if not unrecorded or is_hidden or not found.overhead_s:
        return found
    _, _, factor = _least_squares(unrecorded, None)
    factor = min(max(LEAST_FACTOR, factor), found.factor)
    each = median((p.seconds - factor * p.curves_s) / p.num_calls for p in unrecorded)
    return dataclasses.replace(
        found,
        no_grad_overhead_s=min(max(each, 0.0), found.overhead_s),
        no_grad_factor=factor,
    )


def _fit_recorded(points: Sequence[Point], *, is_hidden: bool) -> InModel:
    if is_hidden:  # few tokens are all overhead, many all work
        few = min(points, key=lambda point: point.seconds)
        many = max(points, key=lambda point: point.seconds)
        overhead = few.seconds / (few.num_calls + few.num_autograd_calls)
        return InModel(
            overhead_s=overhead,
            autograd_overhead_s=overhead,
            factor=many.seconds / many.curves_s,
            is_hidden=True,
        )
    factor = max(LEAST_FACTOR, _least_squares(points, None)[2])
    overhead, by_autograd, _ = _least_squares(points, factor)
    if min(overhead, by_autograd) < 0:  # curves that are too slow for what was measured
        return InModel(factor=median(p.seconds / p.curves_s for p in points))
    return InModel(overhead_s=overhead, autograd_overhead_s=by_autograd, factor=factor)


def _least_squares(points: Sequence[Point], factor: float | None) -> tuple[float, float, float]:
    """Of measured = overhead * calls + overhead' * autograd's calls + factor * curves, each row over what was
    measured. factor: None: to be found as well."""
    import torch

    rows = [
        [p.num_calls / p.seconds, p.num_autograd_calls / p.seconds, p.curves_s / p.seconds]
        for p in points
    ]
    left = torch.tensor(rows, dtype=torch.float64)
    right = torch.ones(len(rows), 1, dtype=torch.float64)
    if factor is None:
        found = torch.linalg.lstsq(left, right, driver="gelsd").solution
        return found[0].item(), found[1].item(), found[2].item()
    found = torch.linalg.lstsq(left[:, :2], right - factor * left[:, 2:], driver="gelsd").solution
    return found[0].item(), found[1].item(), factor
