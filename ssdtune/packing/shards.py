"""Writes one safetensors file from front to end, tensor by tensor, its header last."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch

from ssdtune.durable import rename_flushed
from ssdtune.errors import SSDTuneError, reason_of

CACHE_LINE = 64
PARTIAL = ".partial"  # ending of a file that is not whole


class ShardError(SSDTuneError):
    """A shard could not be written; nothing half-made has its name."""


def data_offset(header_bytes: int) -> int:
    """Where tensors begin behind a header of so many bytes: on a cache line."""
    return 8 + header_bytes + -(8 + header_bytes) % CACHE_LINE


class ShardWriter:
    """A file that gets its name when it is whole.

    header_bytes: what the header may take; it is filled up with spaces, to where data lie on cache lines. Use as a
    context: left without `finish`, nothing stays. Raises ShardError where the file can't be made.
    """

    def __init__(self, path: Path, header_bytes: int) -> None:
        self.path = path
        self._partial = path.with_name(path.name + PARTIAL)
        self._header_bytes = data_offset(header_bytes) - 8
        self._tensors: dict[str, dict[str, object]] = {}
        self._end = 0
        try:
            self._file = self._partial.open("wb")
        except OSError as error:
            raise self._refused(error) from error
        self._file.seek(8 + self._header_bytes)

    def add(self, name: str, dtype: str, values: torch.Tensor) -> None:
        """Appends a tensor, contiguous, on the CPU. dtype: as safetensors names it. ShardError where the drive is full."""
        num_bytes = values.nbytes
        try:
            self._file.write(values.reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise self._refused(error) from error
        span = [self._end, self._end + num_bytes]
        self._tensors[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": span}
        self._end += num_bytes

    def finish(self, metadata: Mapping[str, str]) -> int:
        """Writes the header, flushes, and gives the file its name; its bytes. ShardError where the drive is full."""
        text = json.dumps({"__metadata__": dict(metadata), **self._tensors}, separators=(",", ":"))
        header = text.encode()
        assert len(header) <= self._header_bytes, (len(header), self._header_bytes)
        try:
            self._file.seek(0)
            self._file.write(self._header_bytes.to_bytes(8, "little"))
            self._file.write(header.ljust(self._header_bytes))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            rename_flushed(self._partial, self.path)
        except OSError as error:
            raise self._refused(error) from error
        return 8 + self._header_bytes + self._end

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        # A full drive takes what is buffered no more than before, and nobody wants it.
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):  # the same packing writes over it
            self._partial.unlink()

    def _refused(self, error: OSError) -> ShardError:
        return ShardError(
            f"{self.path} could not be written: {reason_of(error)}.\n"
            "The shards before it stay; the same command goes on from them."
        )
