"""Which modules of a model are blocks: what is streamed, and where micro-batches meet.

The rule: every topmost `nn.ModuleList` whose members are all layers that transformers can checkpoint or does not
split; the input and output embeddings; and any other module that alone holds much (Gemma 3n's per-layer embeddings).
The rest (norms, projectors, small tables) stays in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ssdtune.errors import SSDTuneError

LARGE_LEFTOVER_BYTES = 4 * 1024 * 1024


class BlocksError(SSDTuneError):
    """No blocks were found in a model."""


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """A module where micro-batches meet; its parameters (those of all its submodules) are streamed."""

    name: str
    module: nn.Module


def find_points(model: PreTrainedModel) -> list[Point]:
    """The meeting points in the order in which a forward is likely to come to them: embeddings, layers, head."""
    layers = list(_layers(model))
    if not layers:
        raise BlocksError(
            f"found no list of layers in {type(model).__name__} to stream: its layers are neither "
            f"GradientCheckpointingLayer nor named in _no_split_modules. This model can't be streamed."
        )
    names = {module: name for name, module in model.named_modules()}
    inside = {module for point in layers for module in point.module.modules()}
    head = model.get_output_embeddings()
    first, last = [], []
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Module) and embedding not in inside and embedding is not head:
        first.append(Point(names[embedding], embedding))
    if isinstance(head, nn.Module) and head not in inside:
        last.append(Point(names[head], head))
    taken = inside | {p.module for p in first + last}
    large = [
        Point(name, module)
        for name, module in model.named_modules()
        if module not in taken
        and _own_bytes(module) >= LARGE_LEFTOVER_BYTES
        and not list(module.children())
    ]
    order = {module: i for i, module in enumerate(names)}
    tied = list(_tied_to(model, {p.module for p in first + large + last}, inside))
    return [*first, *large, *sorted([*layers, *tied], key=lambda point: order[point.module]), *last]


def _tied_to(
    model: PreTrainedModel, chosen: set[nn.Module], inside: set[nn.Module]
) -> Iterator[Point]:
    """Other modules that hold a chosen one's parameter: an encoder's and a decoder's own views of one embedding."""
    shared = {id(p) for module in chosen for p in module.parameters(recurse=False)}
    for name, module in model.named_modules():
        holds = any(id(p) in shared for p in module.parameters(recurse=False))
        if holds and module not in chosen and module not in inside:
            yield Point(name, module)


def _layers(model: PreTrainedModel) -> Iterator[Point]:
    not_split = set(getattr(model, "_no_split_modules", None) or ())
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside or not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if all(
            isinstance(m, GradientCheckpointingLayer) or type(m).__name__ in not_split
            for m in module
        ):
            inside.update(module.modules())
            for i, member in enumerate(module):
                yield Point(f"{name}.{i}", member)


def _own_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.dtype.itemsize for p in module.parameters(recurse=False))
