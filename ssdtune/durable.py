"""Files and folders that are wholly there or not there at all, whatever happens.

Everything is written beside its place under a temporary name, flushed with fsync, renamed, and the
parent folder is flushed too: rename alone survives a killed process, not a power cut (ALICE,
OSDI'14). A reader therefore finds the old content or the new, never a mix. This is the only module
that renames, and the only one that deletes folders; kernels/compiling.py alone, which imports nothing
of ours, renames what it compiles, for a library that a crash has cut is compiled again.

What is deleted was provably made here: a folder carries a marker file, written first, that says so
and, once committed, lists what the folder holds. Links are neither followed nor created.

A failed fsync is final: the kernel marks the pages clean after an I/O error, so that a second fsync
would report success for lost bytes (Rebello et al., ATC'20). Nothing here retries.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssdtune.errors import SSDTuneError, reason_of

MARKER_NAME = ".made-by-ssdtune.json"
LOCK_NAME = ".ssdtune-lock"
_TEMPORARY_FILE = re.compile(r"\.ssdtune-[0-9a-f]{16}\.tmp")
_TEMPORARY_FOLDER = re.compile(r"\.ssdtune-[0-9a-f]{16}\.(tmp|old)")
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_RENAME_EXCHANGE = 2  # linux/fs.h, for renameat2(2)
_AT_FDCWD = -100  # fcntl.h
_OLD_OR_NEW = "Until the drive is well, it may hold the old content or the new, either one whole."


class DurableError(SSDTuneError):
    """Something could not be saved, replaced or removed; the message says what is intact."""


def write_file_atomically(path: Path, content: bytes) -> None:
    """Make `path` hold `content`: after a crash it holds the old bytes or the new ones.

    The folder must exist. A link at `path` is replaced, its target untouched. On return the bytes
    and the name are on the drive. Raises DurableError; the old file is then intact.
    """
    path = Path(path)
    temporary = path.parent / f".ssdtune-{secrets.token_hex(8)}.tmp"
    with _explained("cannot save", path, "The previous version, if any, is intact."):
        try:
            _write_new_file(temporary, content)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    with _explained("cannot flush", path, _OLD_OR_NEW):
        _fsync_folder(path.parent)


def rename_flushed(written: Path, path: Path) -> None:
    """Make `path` the file `written` beside it, whose bytes are on the drive already; then the name is too.

    For files too large to be handed over as bytes: whoever wrote them has called fsync, since a failure may go unseen
    through another descriptor. Raises OSError; `path` is then the old file or the new one.
    """
    os.replace(written, path)
    _fsync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make it and its missing parents, durably; one that is there is fine. Raises DurableError."""
    with _explained("cannot make the folder", folder, "Nothing was written there."):
        _make_parents(Path(folder))


def new_temporary_folder(beside: Path, *, is_private: bool = False) -> Path:
    """An empty folder, marked as ours, on the file system where `beside` will stand.

    Missing parents of `beside` are made, durably. is_private: mode 0700, for bytes that no other
    user of the machine should see. Fill it, then call commit_folder(it, beside).
    """
    beside = Path(beside)
    with _explained("cannot make a temporary folder beside", beside, "Nothing was changed."):
        _make_parents(beside.parent)
        folder = beside.parent / f".ssdtune-{secrets.token_hex(8)}.tmp"
        folder.mkdir(mode=0o700 if is_private else 0o777)
        _write_new_file(folder / MARKER_NAME, _marker(files=None))
        _fsync_folder(folder)
        _fsync_folder(folder.parent)
    return folder


def commit_folder(temporary: Path, final: Path) -> None:
    """Flush everything in `temporary` and make it appear as `final` in one rename.

    temporary: from new_temporary_folder, on the same file system. final: absent, an empty folder,
    or a folder committed here before, which is exchanged in one step and then removed. Raises
    DurableError, with `final` as it was before, if it is anything else, if `temporary` holds a link
    or a device, or if the drive fails.
    """
    temporary, final = Path(temporary), Path(final)
    with _explained("cannot save", final, f"{final.name} is as it was before."):
        _require_ours(temporary)
        is_replacement = _holds_something(final)
        if is_replacement:
            _refuse_foreign_content(final, "replace")
        files = _flush_tree(temporary)
        replacement = temporary / f".ssdtune-{secrets.token_hex(8)}.tmp"
        _write_new_file(replacement, _marker(files=files))
        os.replace(replacement, temporary / MARKER_NAME)
        _fsync_folder(temporary)
        _make_parents(final.parent)
        if is_replacement:
            _exchange(temporary, final)
        else:
            os.replace(temporary, final)
    with _explained("cannot flush", final, _OLD_OR_NEW):
        _fsync_folder(final.parent)
        if temporary.parent != final.parent:
            _fsync_folder(temporary.parent)
    if is_replacement:  # the old content, now under the temporary name
        remove_folder_we_made(temporary)


def remove_folder_we_made(path: Path) -> None:
    """Delete a folder made by new_temporary_folder, committed or not; absent is fine.

    It is renamed out of sight first and its marker goes last, so that a crash leaves either the
    whole folder or remains that remove_abandoned recognises. Raises DurableError, having removed
    nothing, for a link, a folder without the marker, or one that holds files that were added
    after it was committed: those are somebody else's.
    """
    path = Path(path)
    with _explained("cannot remove", path, "Remove it by hand if you don't need it."):
        if not os.path.lexists(path):
            return
        _refuse_foreign_content(path, "remove")
        hidden = path
        if not _TEMPORARY_FOLDER.fullmatch(path.name):
            hidden = path.parent / f".ssdtune-{secrets.token_hex(8)}.old"
            os.replace(path, hidden)
            _fsync_folder(path.parent)
        _delete_tree(hidden)
        _fsync_folder(path.parent)


def remove_abandoned(folder: Path) -> list[Path]:
    """Remove what a killed run left half-written directly in `folder`; returns what went.

    Only for a caller that holds lock_folder(folder): nobody else may be writing there. Names and
    markers decide; a folder of a temporary name without our marker stays, unless it is empty but
    for a torn marker: there the kill came between mkdir and the marker.
    """
    removed: list[Path] = []
    with _explained("cannot clean", folder, "Nothing else was touched."):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_file(follow_symlinks=False) and _TEMPORARY_FILE.fullmatch(entry.name):
                os.unlink(entry.path)
            elif entry.is_dir(follow_symlinks=False) and _TEMPORARY_FOLDER.fullmatch(entry.name):
                is_empty = set(os.listdir(entry.path)) <= {MARKER_NAME}
                if not is_empty and _read_marker(Path(entry.path)) is None:
                    continue
                _delete_tree(Path(entry.path))
            else:
                continue
            removed.append(Path(entry.path))
        _fsync_folder(folder)
    return removed


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; a second process is refused at once, with our pid.

    The kernel drops the lock when the process ends, however it ends. Raises DurableError.
    """
    path = Path(folder) / LOCK_NAME
    with _explained("cannot lock", folder, "Nothing was changed."):
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(path, flags, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(lock, 20, 0)
            pid = holder.decode() if holder.isdigit() else "unknown"
            raise DurableError(
                f"{folder} is in use by another ssdtune process (pid {pid}).\n"
                "Wait for it, stop it, or choose another folder."
            ) from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(lock)


def committed_files(folder: Path) -> dict[str, int] | None:
    """Relative name -> bytes of what `folder` held when it was committed; None if it was not.

    A checkpoint whose files are missing or of another length can thus be named as incomplete.
    """
    marker = _read_marker(Path(folder))
    return None if marker is None else marker["files"]


# ------------------------------------------------------------------ writing and flushing


def _write_new_file(path: Path, content: bytes) -> None:
    descriptor = os.open(path, _NEW_FILE, 0o666)
    try:
        remaining = memoryview(content)
        while remaining:  # write(2) may take less than it is given, on a full drive above all
            remaining = remaining[os.write(descriptor, remaining) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_tree(folder: Path) -> dict[str, int]:
    """fsync every file and every folder below, deepest first; relative name -> bytes."""
    files: dict[str, int] = {}
    for parent, folders, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(parent) / name
            if path == folder / MARKER_NAME:
                continue
            files[path.relative_to(folder).as_posix()] = _flush_file(path)
        for name in folders:
            if (Path(parent) / name).is_symlink():
                raise DurableError(f"{Path(parent) / name} is a link; only files are saved.")
        _fsync_folder(Path(parent))
    return files


def _flush_file(path: Path) -> int:
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise DurableError(f"{path} is a link or a device; only plain files are saved.")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)  # flushes what any process wrote to this file, not only us
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_parents(folder: Path) -> None:
    """mkdir -p that is durable: each new folder's own parent is flushed."""
    if folder.is_dir():
        return
    _make_parents(folder.parent)
    folder.mkdir(exist_ok=True)
    _fsync_folder(folder.parent)


def _exchange(first: Path, second: Path) -> None:
    """Swap two folders in one step: renameat2 with RENAME_EXCHANGE, Linux 3.15, glibc 2.28."""
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, "this system cannot exchange two folders in one step")
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(second))


# ------------------------------------------------------------------ what is ours


def _marker(files: dict[str, int] | None) -> bytes:
    return json.dumps({"made_by": "ssdtune", "files": files}, indent=1).encode()


def _read_marker(folder: Path) -> dict[str, Any] | None:
    """The marker's content, or None where there is none that we could have written."""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(folder / MARKER_NAME, flags), "rb") as file:
            marker = json.loads(file.read(2**24))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(marker, dict) or marker.get("made_by") != "ssdtune":
        return None
    files = marker.get("files")
    return marker if files is None or _is_file_list(files) else None


def _is_file_list(files: object) -> bool:
    return isinstance(files, dict) and all(type(size) is int for size in files.values())


def _holds_something(path: Path) -> bool:
    if not os.path.lexists(path):
        return False
    return path.is_symlink() or not path.is_dir() or bool(os.listdir(path))


def _require_ours(folder: Path) -> dict[str, Any]:
    marker = None
    if not folder.is_symlink() and folder.is_dir():
        marker = _read_marker(folder)
    if marker is None:
        raise DurableError(
            f"{folder} was not made by ssdtune (no {MARKER_NAME} in it): it is left alone.\n"
            "Choose another output_dir, or move that folder away."
        )
    return marker


def _refuse_foreign_content(folder: Path, verb: str) -> None:
    files = _require_ours(folder)["files"]
    if files is None:  # never committed: whatever is in it was being written by us
        return
    foreign = sorted(set(_all_files(folder)) - set(files) - {MARKER_NAME})
    if foreign:
        names = ", ".join(ascii(name)[1:-1] for name in foreign[:3])
        raise DurableError(
            f"cannot {verb} {folder}: it holds {len(foreign)} file(s) that ssdtune did not write: "
            f"{names}.\nMove them elsewhere, or remove the folder by hand."
        )


def _all_files(folder: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in [*names, *links]:
            yield (Path(parent) / name).relative_to(folder).as_posix()


def _delete_tree(folder: Path) -> None:
    """Delete a folder, its marker last, so that a half-deleted one is still known as ours."""
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)  # does not follow links
        elif entry.name != MARKER_NAME:
            os.unlink(entry.path)
    _fsync_folder(folder)  # the marker's removal must not reach the drive before the others'
    (folder / MARKER_NAME).unlink(missing_ok=True)
    folder.rmdir()


@contextlib.contextmanager
def _explained(act: str, path: Path, consequence: str) -> Iterator[None]:
    """Turn an OSError inside into a DurableError that names the file, the errno and the remedy."""
    try:
        yield
    except OSError as error:
        raise DurableError(
            f"{act} {path}: {reason_of(error)}.\n"
            f"{consequence} {_REMEDIES.get(error.errno or 0, 'Check the drive and the path.')}"
        ) from error


_REMEDIES = {
    errno.ENOSPC: "The drive is full: free some space or choose another folder.",
    errno.EDQUOT: "Your quota is used up: free some space or choose another folder.",
    errno.EACCES: "You may not write there: change the permissions or choose another folder.",
    errno.EROFS: "It is mounted read-only: choose another folder.",
    errno.EIO: "The drive reports an error: look at dmesg before trusting it again.",
    errno.EXDEV: "Both must lie on one file system.",
    errno.ENOENT: "Make the folder first.",
    errno.EEXIST: "A file has that name, or a parent's: choose another folder.",
    errno.EINVAL: "This file system cannot do it: choose another folder.",
    errno.ENOSYS: "Remove the old folder, or choose another one.",
}
