"""Drives that fill and folders that can't be written: one error that names the file, nothing half-made, and the user's
files as they were."""

import os
from pathlib import Path

import pytest
import torch

from ssdtune.packing.shards import ShardError, ShardWriter

FULL = Path("/dev/full")  # takes no byte, as a full drive does
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


# ------------------------------------------------------------------ a shard


def write_shard(path: Path) -> None:
    with ShardWriter(path, 1000) as writer:
        writer.add("t", "F32", torch.zeros(4))
        writer.finish({})


@needs_full
def test_a_drive_that_fills_under_buffered_bytes_is_one_error(tmp_path: Path) -> None:
    """What Python has buffered is refused once more where the file is closed."""
    path = tmp_path / "model.safetensors"
    path.with_name("model.safetensors.partial").symlink_to(FULL)
    with pytest.raises(ShardError, match="ENOSPC") as caught:
        write_shard(path)
    assert str(path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_is_flushed_before_it_has_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, log = tmp_path / "model.safetensors", []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        log.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def replace(written: Path, name: Path) -> None:
        log.append("replace")
        real_replace(written, name)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_shard(path)
    assert log == [f"{path}.partial", "replace", str(tmp_path)]
