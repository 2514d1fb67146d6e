"""A file to measure a drive with, gone afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ssdtune.errors import SSDTuneError
from ssdtune.sizes import format_size

PROBE_BYTES = 256 * 2**20  # the drive's own cache holds less of it than is read
CHUNK_BYTES = 16 * 2**20


@contextlib.contextmanager
def random_file(folder: Path) -> Iterator[Path]:
    """A file of PROBE_BYTES to measure with, gone afterwards. Raises OSError, SSDTuneError where there is little room."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < 2 * PROBE_BYTES:
        raise SSDTuneError(
            f"only {format_size(free_bytes)} are free in {folder} for a file to measure with.\n"
            f"Free {format_size(2 * PROBE_BYTES)}, or measure a folder on another drive."
        )
    with tempfile.NamedTemporaryFile(prefix=".ssdtune-probe-", suffix=".tmp", dir=folder) as file:
        chunk = os.urandom(CHUNK_BYTES)  # zeros would measure a file system's compression
        for _ in range(PROBE_BYTES // CHUNK_BYTES):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        yield Path(file.name)
