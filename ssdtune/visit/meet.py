"""Meeting points: several micro-batches go through one model's own forward and meet at every block.

Each runs in a greenlet. A block's wrapper switches to the hub and waits there; when every micro-batch waits, the hub
makes the weights of one block present and lets those through that wait for it. Descending order: autograd runs the
latest-made ready node first, so that backward comes back ascending and adds gradients in the order in which plain
accumulation adds them. Same order, same bits.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from typing import Any

import greenlet

from ssdtune.visit.thread_state import ThreadState, inference_guard


class Hub:
    """One run of several micro-batches. `present(point)` is called when the micro-batches that meet there may pass,
    `resume(m)` whenever micro-batch m is about to go on."""

    def __init__(
        self,
        present: Callable[[int], None],
        name_of: Callable[[int], str],
        resume: Callable[[int], None] | None = None,
    ) -> None:
        self._present, self._name_of, self._resume = present, name_of, resume
        self._greenlet = greenlet.getcurrent()
        self._base = ThreadState.capture()
        self._lets: list[greenlet.greenlet] = []
        self._at: list[int | None] = []

    def run(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """The results of all calls, in their order. An error of one ends the others and names block and micro-batch."""
        results: list[Any] = [None] * len(calls)

        def body(m: int) -> None:
            results[m] = calls[m]()

        for m in range(len(calls)):
            let = greenlet.greenlet(lambda m=m: body(m))
            let.gr_context = (
                contextvars.copy_context()
            )  # a new greenlet starts with an empty context
            self._lets.append(let)
            self._at.append(None)
        try:
            for m in reversed(range(len(calls))):
                self._go(m)
            while any(point is not None for point in self._at):
                self._let_through(min(point for point in self._at if point is not None))
        finally:
            self._unwind()
        return results

    def wait(self, point: int) -> None:
        """Called by a micro-batch at a meeting point: returns when its turn has come."""
        mine = ThreadState.capture()
        guard = inference_guard(self._base.inference, mine.inference)
        self._base.install()
        self._greenlet.switch(point)
        del guard
        mine.install()

    def is_mine(self) -> bool:
        """Whether the running greenlet is one of this run's micro-batches."""
        return greenlet.getcurrent() in self._lets

    def _let_through(self, point: int) -> None:
        waiting = [m for m in reversed(range(len(self._lets))) if self._at[m] == point]
        if self._resume is not None:
            self._resume(waiting[0])  # the block is made present for the one that goes first
        self._present(point)
        for m in waiting:
            self._go(m)

    def _go(self, m: int) -> None:
        """Runs micro-batch m up to its next meeting point, or its end."""
        came_from = self._at[m]
        if self._resume is not None:
            self._resume(m)
        try:
            reached = self._lets[m].switch()
        except Exception as error:
            after = (
                "before its first block"
                if came_from is None
                else f"in or after {self._name_of(came_from)}"
            )
            error.add_note(f"ssdtune: in micro-batch {m} of {len(self._lets)}, {after}")
            raise
        finally:
            self._base.install()
        self._at[m] = None if self._lets[m].dead else reached

    def _unwind(self) -> None:
        """Ends what is still waiting, so that its frames let go of their tensors and the model is usable again."""
        for let in self._lets:
            if let and not let.dead:
                let.throw(greenlet.GreenletExit)
        self._base.install()
