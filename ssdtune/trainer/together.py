"""Acts that all processes of a run do, or none: what fails in one of them has failed in all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ssdtune.errors import SSDTuneError

T = TypeVar("T")


class ProcessError(SSDTuneError):
    """Another process could not do its part."""


def together(act: Callable[[], T], what: str, num_processes: int) -> T:
    """Does it in every process, and returns when all have: what it came to in the first one. what: it is, in words.

    Raises what `act` raised here, else ProcessError where it failed in another: who went on would wait for that one until
    the launcher kills it, and its last words would not say why.
    """
    if num_processes < 2:
        return act()
    from accelerate.utils import gather_object

    mine: list[Any] = [None, None]  # what it came to, and why it failed
    error: Exception | None = None
    try:
        mine[0] = act()
    except Exception as caught:
        error, mine[1] = caught, f"{type(caught).__name__}: {caught}"
    told = gather_object([mine])
    if error is not None:
        raise error
    for number, (_, fault) in enumerate(told):
        if fault is not None:
            raise ProcessError(f"process {number} could not {what}: {fault}")
    return told[0][0]
