"""A scratch file: bytes that a process puts on a drive for a while, gone when it ends, however it ends.

The file has no name: it is made in a folder of its own (0700, the file 0600, never through a link) and both are
unlinked before the first byte is written, so that nothing is left after a crash and nobody else can open it. Space is
reserved before it is used: a full drive is an error at the reservation, not in the middle of a step.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

from ssdtune.errors import SSDTuneError, reason_of
from ssdtune.memory import nearest_folder
from ssdtune.sizes import format_size
from ssdtune.swap.storage import MIN_ALIGNMENT, aligned_bytes, direct_alignment

PROBE_BYTES = 2 * MIN_ALIGNMENT
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = _FLAGS | os.O_CREAT | os.O_EXCL


class ScratchError(SSDTuneError):
    """A scratch file that cannot be made, grown, written or read; names the folder, the bytes and the errno."""


class Space:
    """Which bytes of [0, `limit`) are taken. First fit; neighbours that are free become one."""

    def __init__(self, limit: int = 2**62) -> None:
        self.limit = limit
        self.used = 0
        self.end = 0  # nothing is taken from here on
        self._free: list[
            tuple[int, int]
        ] = []  # (start, stop) below `end`, in order, never adjacent

    def take(self, num_bytes: int) -> int | None:
        """The start of a range that is now taken; None where there is no room."""
        for i, (start, stop) in enumerate(self._free):
            if stop - start >= num_bytes:
                self._free[i : i + 1] = (
                    [(start + num_bytes, stop)] if stop - start > num_bytes else []
                )
                self.used += num_bytes
                return start
        if self.end + num_bytes > self.limit:
            return None
        start, self.end = self.end, self.end + num_bytes
        self.used += num_bytes
        return start

    def give(self, start: int, num_bytes: int) -> None:
        """The range, as `take` gave it out, is free again."""
        self.used -= num_bytes
        stop = start + num_bytes
        at = bisect_left(self._free, (start, stop))
        if at < len(self._free) and self._free[at][0] == stop:
            stop = self._free.pop(at)[1]
        if at > 0 and self._free[at - 1][1] == start:
            at -= 1
            start = self._free.pop(at)[0]
        if stop == self.end:
            self.end = start
        else:
            self._free.insert(at, (start, stop))


class ScratchFile:
    """A nameless file in `folder`, which is made where it is missing. what: it is for, in messages. Raises ScratchError.

    Attributes:
        place: how messages name it.
        alignment: of offsets, lengths and addresses in `read` and `write`.
        is_direct: whether I/O passes the page cache by; where direct I/O does not give back what it was given, it
            goes through the cache.
        num_bytes: reserved so far.
    """

    def __init__(self, folder: Path, what: str = "block inputs") -> None:
        self.folder, self._what = Path(folder), what
        self.place = f"a scratch file in {self.folder}"
        self.num_bytes = 0
        self._plain, self._direct, self.alignment = _open_nameless(self.folder)
        try:
            self.reserve(max(PROBE_BYTES, self.alignment))
            if self._direct is not None and not self._gives_back():
                os.close(self._direct)
                self._direct = None
        except BaseException:
            self.close()
            raise

    @property
    def is_direct(self) -> bool:
        """See the class."""
        return self._direct is not None

    def reserve(self, num_bytes: int) -> None:
        """Blocks of the drive for the first `num_bytes` bytes, from now on; what is reserved stays so."""
        if num_bytes <= self.num_bytes:
            return
        try:
            os.posix_fallocate(self._plain, self.num_bytes, num_bytes - self.num_bytes)
        except OSError as error:
            os.ftruncate(self._plain, self.num_bytes)  # a failed reservation may keep what it got
            why = no_room(num_bytes, self._what, self.folder, error)
            raise ScratchError(f"{why} or train on fewer tokens a step.") from error
        self.num_bytes = num_bytes

    def write(self, offset: int, content: memoryview) -> None:
        """Writes aligned bytes at an aligned offset, all of them. Raises OSError."""
        write_all(self._fd(), offset, content)

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fills an aligned buffer from an aligned offset. Raises OSError, also where the file ends."""
        fd, done = self._fd(), 0
        while done < len(buffer):
            got = os.preadv(fd, [buffer[done:]], offset + done)
            if got <= 0:
                raise OSError(errno.EIO, "the file ends")
            done += got
        if not self.is_direct:
            os.posix_fadvise(fd, offset, len(buffer), os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Gives the drive its space back."""
        for fd in (self._plain, self._direct):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._plain, self._direct = -1, None

    def _fd(self) -> int:
        return self._plain if self._direct is None else self._direct

    def _gives_back(self) -> bool:
        """Whether what is written directly comes back the same way."""
        num_bytes = max(PROBE_BYTES, self.alignment)
        out, back = (aligned_bytes(num_bytes).numpy().data for _ in range(2))
        out[:] = os.urandom(num_bytes)
        try:
            self.write(0, out)
            self.read(0, back)
        except OSError:
            return False
        return out == back


def no_room(num_bytes: int, what: str, folder: Path, error: OSError) -> str:
    """What is said where a drive has no room, up to the last way out, which is whoever's asks."""
    try:
        room = os.statvfs(folder)
        free = f"{format_size(room.f_bavail * room.f_frsize)} are free there"
    except OSError:
        free = "how much is free there is unknown"
    return (
        f"cannot reserve {format_size(num_bytes)} ({num_bytes:,} bytes) for {what} in {folder}: "
        f"{reason_of(error)}; {free}.\n"
        "Free some space, point offload.path to another drive,"
    )


def write_all(fd: int, offset: int, content: memoryview) -> None:
    """Writes all bytes at an offset. Raises OSError."""
    done = 0
    while done < len(content):
        written = os.pwritev(fd, [content[done:]], offset + done)
        if written <= 0:
            raise OSError(errno.EIO, "nothing was written")
        done += written


def lies_in_ram(folder: Path) -> bool:
    """Whether files in this folder (or where it would be made) take RAM rather than a drive: /tmp often does."""
    device = os.stat(nearest_folder(folder)).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    kinds = [line.partition(" - ")[2].split()[0] for line in mounts if line.split()[2] == number]
    return any(kind in ("tmpfs", "ramfs") for kind in kinds)


def nameless_file(folder: Path) -> int:
    """A descriptor of a new, empty file in `folder` that has no name. `path_of` it opens the file again. Raises
    ScratchError."""
    with _name_for_a_moment(folder) as path:
        return os.open(path, _NEW_FILE, 0o600)


def path_of(fd: int) -> Path:
    """Where this process finds the file of a descriptor, though it has no name (proc(5))."""
    return Path(f"/proc/self/fd/{fd}")


@contextlib.contextmanager
def _name_for_a_moment(folder: Path) -> Iterator[Path]:
    """Where a file can be made in `folder`, in a folder of its own; afterwards both names are gone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(prefix=".ssdtune-scratch-", dir=folder))  # 0700
    except OSError as error:
        raise ScratchError(
            f"cannot make a scratch file in {folder}: {reason_of(error)}.\n"
            "Set offload.path to a folder on a fast drive that you may write to."
        ) from error
    path = own / "scratch"
    try:
        yield path
    except OSError as error:
        raise ScratchError(
            f"cannot make a scratch file in {folder}: {reason_of(error)}."
        ) from error
    finally:
        path.unlink(missing_ok=True)
        own.rmdir()


def _open_nameless(folder: Path) -> tuple[int, int | None, int]:
    """Descriptors of a new file without a name, plain and direct (None where there is no such I/O); the alignment."""
    with _name_for_a_moment(folder) as path:
        plain = os.open(path, _NEW_FILE, 0o600)
        alignment = direct_alignment(path)
        direct = None
        if alignment and hasattr(os, "O_DIRECT"):
            try:
                direct = os.open(path, _FLAGS | os.O_DIRECT)
            except OSError:
                direct = None  # this file system has none
        return plain, direct, max(alignment, MIN_ALIGNMENT)
