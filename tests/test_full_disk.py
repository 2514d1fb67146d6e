"""Drives that fill and folders that can't be written: one error that names the file, nothing half-made, and the user's
files as they were."""

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from support import digests
from test_packing import FORMATS, packed

from ssdtune import cli, probe
from ssdtune.cli import main
from ssdtune.durable import DurableError
from ssdtune.packing.convert import header_bytes, most_bytes, pack
from ssdtune.packing.layout import PackError, groups_of, shards
from ssdtune.packing.shards import ShardError, ShardWriter
from ssdtune.swap.beside import bytes_beside, copy_beside
from ssdtune.swap.storage import choose_storage
from ssdtune.visit.build import build_meta
from ssdtune.visit.saving import SaveError, write_weights

FULL = Path("/dev/full")  # takes no byte, as a full drive does
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_models.save(
        tiny_models.build("llama", dtype=torch.bfloat16), tmp_path / "source", "100KB"
    )


@contextmanager
def no_file_longer_than(num_bytes: int) -> Iterator[None]:
    """Writes beyond it fail, as on a drive that fills."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def free_are(monkeypatch: pytest.MonkeyPatch, *free: int) -> None:
    """So many bytes are free, each time that somebody asks."""
    usage, answers = shutil.disk_usage("/"), iter(free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=next(answers)))


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


# ------------------------------------------------------------------ a packing


@pytest.mark.parametrize("kind", ["4", "lossless"])
def test_the_room_that_is_asked_for_holds_what_is_written(
    kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssdtune.packing.layout.SHARD_BYTES", 60_000)
    there = packed(source, tmp_path / "packed", FORMATS[kind])
    written = sum(path.stat().st_size for path in there.iterdir())
    parted = list(shards(groups_of(build_meta(source), FORMATS[kind].chosen())))
    needed = most_bytes(parted) + bytes_beside(source)
    assert len(parted) > 1
    assert written <= needed
    if kind != "lossless":  # whose tensors may turn out as large as they were
        assert needed <= written + sum(map(header_bytes, parted))
    free_are(monkeypatch, written - 1)
    with pytest.raises(PackError, match=r"are missing\. Nothing was written"):
        packed(source, tmp_path / "deeper" / "again", FORMATS[kind])
    assert not (tmp_path / "deeper").exists()


@needs_full
def test_a_drive_that_fills_meanwhile_is_told_with_what_is_missing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssdtune.packing.layout.SHARD_BYTES", 30_000)
    meta, before, out = build_meta(source), digests(source), tmp_path / "packed"
    groups, storage = groups_of(meta, FORMATS["4"].chosen()), choose_storage(source).storage

    second = out / f"model-00002-of-{len(list(shards(groups))):05d}.safetensors"

    def fill_the_drive(num_bytes: int) -> None:
        second.with_name(f"{second.name}.partial").symlink_to(FULL)

    with monkeypatch.context() as patched:
        free_are(patched, 10**12, 1000)
        with pytest.raises(ShardError, match="ENOSPC") as caught:
            pack(meta, groups, out, storage=storage, on_progress=fill_the_drive)
    message = str(caught.value)
    assert str(second) in message
    assert "1.00 KB are free" in message
    assert "are missing" in message
    assert [path.name[:11] for path in out.glob("*.safetensors*")] == ["model-00001"]
    assert not (out / "config.json").exists()
    assert digests(source) == before
    pack(meta, groups, out, storage=storage)
    assert build_meta(out).checkpoint.tensors.keys() == meta.checkpoint.tensors.keys()


def test_what_a_killed_packing_has_left_takes_no_room_from_the_next(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta, out = build_meta(source), tmp_path / "packed"
    groups, storage = groups_of(meta, FORMATS["4"].chosen()), choose_storage(source).storage

    def stopped(*given: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(meta, groups, out, storage=storage, encode=stopped)
    (out / "model-00001-of-00001.safetensors.partial").write_text("cut")
    (out / ".ssdtune-0123456789abcdef.tmp").write_text("cut")
    free_are(monkeypatch, 0)
    with pytest.raises(PackError, match="are missing"):
        pack(meta, groups, out, storage=storage)
    assert {path.name for path in out.iterdir()} == {".packing.json", ".ssdtune-lock"}


def test_a_config_that_can_not_be_written_whole_is_none(tmp_path: Path) -> None:
    """Whoever finds a config takes the folder for finished."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "config.json").write_text('{"filler": "' + "x" * 10**6 + '"}')
    with no_file_longer_than(500_000), pytest.raises(DurableError, match=r"config\.json"):
        copy_beside(source, out, quantization={"quant_method": "ssdtune"})
    assert list(out.iterdir()) == []


# ------------------------------------------------------------------ the command line


@pytest.fixture
def taken(tmp_path: Path) -> Path:
    """A file where a folder is wanted: not even root can write below it."""
    path = tmp_path / "taken"
    path.write_text("mine")
    return path


def test_a_folder_that_can_not_be_made_is_named(source: Path, taken: Path, capsys: Any) -> None:
    assert main(["pack", str(source), "--out", str(taken / "packed"), "--bits", "4"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert any(
        line.startswith(f"error: cannot make the folder {taken / 'packed'}") for line in told
    )
    assert "choose another folder" in told[-1]
    assert taken.read_text() == "mine"


def test_a_probe_measures_nothing_for_a_file_that_can_not_be_written(
    tmp_path: Path, taken: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(probe, "measure", lambda *given: pytest.fail("measured"))
    assert main(["probe", str(tmp_path), "--out", str(taken / "profile.yaml")]) == 2
    assert f"cannot make the folder {taken}" in capsys.readouterr().err


def test_what_the_system_refuses_is_a_message(
    taken: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def refused(words: list[str]) -> None:
        (taken / "file").write_text("")

    monkeypatch.setattr(cli, "VERBS", {"train": refused})
    assert main(["train"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {taken / 'file'}: Not a directory (ENOTDIR).\n")


def test_what_a_library_calls_an_error_of_the_system_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failed(words: list[str]) -> None:
        raise OSError("a tokenizer without words")

    monkeypatch.setattr(cli, "VERBS", {"train": failed})
    with pytest.raises(OSError, match="without words"):
        main(["train"])


def test_weights_that_can_not_be_written_whole_are_not_there(
    source: Path, tmp_path: Path, stream: Callable[..., Any]
) -> None:
    model = stream(source)
    (tmp_path / "out").mkdir()
    with no_file_longer_than(20_000), pytest.raises(SaveError, match="weights could not be"):
        write_weights(model, tmp_path / "out" / "weights")
    assert list((tmp_path / "out").iterdir()) == []
