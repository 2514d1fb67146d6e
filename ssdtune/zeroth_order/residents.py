"""Parameters that train and lie in memory: adapters, and the few of a model that lie outside of blocks.

Those inside a block are shifted like the block, when it is visited and in one place for all blocks; of those outside of
blocks all variants are kept for the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from ssdtune.swap.recipe import HALVES
from ssdtune.visit.streamer import Streamer
from ssdtune.zeroth_order.estimators import Shift
from ssdtune.zeroth_order.rules import Update
from ssdtune.zeroth_order.updates import Directions
from ssdtune.zeroth_order.windows import Windows

ALIGNMENT = 256  # of tensors beside each other, as slots have it on a device


class Residents:
    """Of one streamed model. parameters: by name. directions: of the run. has_masters: whether those of 16 bits train in
    float32.

    Where what is stored of a parameter is not what it is now, that is kept beside it.
    """

    def __init__(
        self,
        streamer: Streamer,
        parameters: Mapping[str, torch.Tensor],
        directions: Directions,
        *,
        has_masters: bool = False,
    ) -> None:
        self._parameters, self._directions = dict(parameters), directions
        self.inside, self.outside = by_place(streamer, parameters)
        self._stored: dict[str, torch.Tensor] = {}
        if has_masters:
            self._stored = {name: _widened(p.data) for name, p in parameters.items()}
        elif isinstance(directions, Windows):
            self._stored = {name: p.data.clone() for name, p in parameters.items()}
        self._plain: dict[str, torch.Tensor] = {}
        self._shifted: dict[int, dict[str, torch.Tensor]] = {}  # those outside, by variant
        self._scratch: torch.Tensor | None = None
        self._step = 0

    @property
    def kept_bytes(self) -> int:
        """Of what is stored of them and kept beside them."""
        return sum(tensor.nbytes for tensor in self._stored.values())

    @property
    def inside_bytes(self) -> int:
        """Of the place where those of a block are shifted."""
        return max((inside_bytes(p.values()) for p in self.inside.values()), default=0)

    def shapes(self) -> list[tuple[int, ...]]:
        """Of all of them."""
        return [tuple(p.shape) for p in self._parameters.values()]

    def begin(self, step: int, shifts: Sequence[Shift | None]) -> None:
        """A step's variants of those outside of blocks, numbered as in `shifts`."""
        self._step = step
        self._shifted.clear()
        self._plain = {name: p.data for name, p in self._parameters.items()}
        for variant, shift in enumerate(shifts):
            if shift is not None:
                made = {name: torch.empty_like(self._plain[name]) for name in self.outside}
                for name, to in made.items():
                    self._make(to, name, shift)
                self._shifted[variant] = made

    def take(self, changes: Sequence[Update]) -> None:
        """Changes of what is stored of them; then they are what the weights are now. Between steps."""
        self._shifted.clear()
        for name, parameter in self._parameters.items():
            stored = self._stored.get(name)
            self._directions.apply(parameter.data if stored is None else stored, name, changes)
            if stored is not None:
                self._directions.make(parameter.data, stored, name, None)

    def use_outside(self, variant: int | None) -> None:
        """Those outside of blocks as in a variant; None: all as they are."""
        if variant is None:
            for name, parameter in self._parameters.items():
                parameter.data = self._plain[name]
            return
        made = self._shifted.get(variant, self._plain)
        for name, parameter in self.outside.items():
            parameter.data = made[name]

    def use_inside(self, block: int, shift: Shift | None) -> None:
        """The block's as in a variant; what is left in those of another block is never read."""
        parameters = self.inside.get(block, {})
        if shift is None:
            for name, parameter in parameters.items():
                parameter.data = self._plain[name]
            return
        at = 0
        for name, parameter in parameters.items():
            plain = self._plain[name]
            to = self._memory(plain.device)[at : at + plain.nbytes].view(plain.dtype)
            to = to.view(plain.shape)
            self._make(to, name, shift)
            parameter.data = to
            at += _padded(plain.nbytes)

    def _make(self, to: torch.Tensor, name: str, shift: Shift) -> None:
        base = self._stored.get(name, self._plain[name])
        self._directions.make(to, base, name, shift.term(self._step))

    def _memory(self, device: torch.device) -> torch.Tensor:
        if self._scratch is None:
            self._scratch = torch.empty(self.inside_bytes, dtype=torch.uint8, device=device)
        return self._scratch


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    """Another one; of 16 bits, in float32."""
    return tensor.to(torch.float32 if tensor.dtype in HALVES else tensor.dtype, copy=True)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def inside_bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Of the place where a block's parameters in memory are shifted."""
    return sum(_padded(p.nbytes) for p in parameters)


def by_place(
    streamer: Streamer, parameters: Mapping[str, torch.Tensor]
) -> tuple[dict[int, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Parameters by the block whose modules hold them, and those outside of blocks."""
    block_of = {id(p): m.block for m in streamer.meetings for p in m.module.parameters()}
    inside: dict[int, dict[str, torch.Tensor]] = {}
    outside: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        block = block_of.get(id(parameter))
        (outside if block is None else inside.setdefault(block, {}))[name] = parameter
    return inside, outside
