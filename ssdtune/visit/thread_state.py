"""What torch keeps per thread and a micro-batch must carry along.

Micro-batches share one thread and take turns. Grad and inference mode, autocast, the device's current stream and the
stacks of function and dispatch modes belong to the thread, so each turn must leave them as the hub had them and find
them as the micro-batch left them; else a model that runs a frozen tower under `no_grad` takes the gradients of its
neighbours, in silence. (Context variables travel by greenlet's own means.)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import overrides
from torch.utils import _python_dispatch as dispatch


@dataclasses.dataclass(frozen=True, slots=True)
class ThreadState:
    """A snapshot; `install` makes the running thread equal to it."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    autocast_cache: bool
    stream: Any
    function_modes: tuple[Any, ...]
    dispatch_modes: tuple[Any, ...]

    @staticmethod
    def capture() -> ThreadState:
        """The running thread's state."""
        return ThreadState(
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            autocast=tuple(
                (d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _devices()
            ),
            autocast_cache=torch.is_autocast_cache_enabled(),
            stream=torch.cuda.current_stream() if torch.cuda.is_initialized() else None,
            function_modes=tuple(overrides._get_current_function_mode_stack()),
            dispatch_modes=tuple(dispatch._get_current_dispatch_mode_stack()),
        )

    def install(self) -> None:
        """Makes the thread's state this one; inference mode apart, which `InferenceGuard` carries."""
        torch.set_grad_enabled(self.grad)
        for device, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        if self.stream is not None:
            torch.cuda.set_stream(self.stream)
        _install_stack(self.function_modes, overrides._get_current_function_mode_stack, overrides)
        _install_stack(self.dispatch_modes, dispatch._get_current_dispatch_mode_stack, dispatch)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The state for a `with` block, and what was there before after it."""
        before = ThreadState.capture()
        guard = inference_guard(self.inference, before.inference)
        self.install()
        try:
            yield
        finally:
            before.install()
            del guard


def _install_stack(wanted: tuple[Any, ...], current: Any, stack: Any) -> None:
    """Pops down to what both stacks share, pushes the rest."""
    now = tuple(current())
    if now == wanted:
        return
    shared = 0
    while shared < min(len(now), len(wanted)) and now[shared] is wanted[shared]:
        shared += 1
    for _ in range(len(now) - shared):
        stack._pop_mode()
    for mode in wanted[shared:]:
        stack._push_mode(mode)


def _devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def inference_guard(wanted: bool, current: bool) -> Any:
    """Switches inference mode until the returned object is dropped; None where nothing is to switch.

    The guard saves and restores absolute values, so that guards of several micro-batches need not nest.
    """
    if wanted == current:
        return None
    return torch._C._InferenceMode(wanted)
