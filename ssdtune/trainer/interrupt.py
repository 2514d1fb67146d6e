"""Ctrl-C and SIGTERM during training: finish the step, save it, stop. A second one stops at once."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Notes that a signal came. `callback` makes the trainer save and stop at the step's end.

    is_requested: whether one came to this process. has_stopped: whether training stops for one that came to any.
    """

    def __init__(self) -> None:
        self.is_requested = self.has_stopped = False
        self.callback = _StopAtStepEnd(self)
        self._before: dict[int, Any] = {}

    @contextlib.contextmanager
    def watched(self, *, is_enabled: bool) -> Iterator[None]:
        """Signals are noted for a `with` block; outside the main thread they can't be."""
        self.is_requested = self.has_stopped = False
        if not is_enabled or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            self._restore()

    def _note(self, number: int, frame: Any) -> None:
        self.is_requested = True
        self._restore()  # the next one does what it did before: it ends the process
        name = signal.Signals(number).name
        sys.stderr.write(
            f"\n{name}: saving when this step is done, then stopping. Once more stops at once.\n"
        )
        sys.stderr.flush()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}


class _StopAtStepEnd(TrainerCallback):
    """Asks for a checkpoint and the end of training once a signal came to any process."""

    def __init__(self, interruption: Interruption) -> None:
        self.interruption = interruption

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Between two steps: weights, optimizer and position belong together."""
        if self._is_requested_anywhere(args) and state.global_step < state.max_steps:
            self.interruption.has_stopped = True
            control.should_save = True
            control.should_training_stop = True

    def _is_requested_anywhere(self, args: Any) -> bool:
        """Signals come to the processes at different moments, and all must leave at the same step: one that comes while
        they ask one another waits for the next."""
        is_requested = self.interruption.is_requested
        if args.world_size > 1:
            flag = torch.tensor(int(is_requested), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            is_requested = bool(flag.item())
        return is_requested
