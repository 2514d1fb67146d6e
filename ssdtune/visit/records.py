"""What transformers records by hooks while a block runs (router logits, attentions), carried out of the visit.

`transformers.utils.output_capturing` appends to lists in a context variable. Inside a visit's forward the tensors have
no graph, and recompute would append them again; so the block writes into a scratch collector, its new entries leave
the visit as outputs, and `add` appends those to the real one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class Recorded:
    """The scratch collector of one run of a block."""

    def __init__(self, real: dict[str, Any] | None) -> None:
        copied = {k: list(v) if isinstance(v, list) else v for k, v in (real or {}).items()}
        self.scratch = None if real is None else copied
        self._before = {k: len(v) for k, v in copied.items() if isinstance(v, list)}

    def new(self) -> dict[str, list[Any]]:
        """The entries that the block added, by key."""
        if self.scratch is None:
            return {}
        added = {k: self.scratch[k][n:] for k, n in self._before.items()}
        return {k: v for k, v in added.items() if v}


def _collector() -> Any:
    from transformers.utils import output_capturing

    return output_capturing._active_collector


@contextlib.contextmanager
def scratch() -> Iterator[Recorded]:
    """Puts a scratch collector in the place of the real one, where there is one."""
    collector = _collector()
    real = collector.get()
    recorded = Recorded(real)
    if real is None:
        yield recorded
        return
    token = collector.set(recorded.scratch)
    try:
        yield recorded
    finally:
        collector.reset(token)


def add(recorded: dict[str, list[Any]]) -> None:
    """Appends what a visit carried out to the real collector."""
    if not recorded:
        return
    real = _collector().get()
    for key, values in recorded.items():
        real[key].extend(values)
