"""Counts what tensors take, operator by operator."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators made under it and that are still alive.

    Views of what was there before (`weight.t()`) are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        self._counts = True

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is made in a `with` block counts as having been there."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and counts what it made."""
        kwargs = kwargs or {}
        pytree.tree_map_only(torch.Tensor, lambda x: self._meet(x, is_made=False), (args, kwargs))
        out = func(*args, **kwargs)
        pytree.tree_map_only(torch.Tensor, lambda x: self._meet(x, is_made=True), out)
        return out

    def _meet(self, tensor: torch.Tensor, *, is_made: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or tensor.is_meta:
            return
        num_bytes = storage.nbytes() if is_made and self._counts else 0
        self._known.add(key)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, num_bytes)

    def _gone(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes
