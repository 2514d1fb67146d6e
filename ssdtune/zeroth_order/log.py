"""The log of a zeroth-order run: a line for each step, and from them and the base any step's weights again.

    {"format": ..., "generator": ..., "base": ..., "reading": ..., "dtype": ..., "seed": ..., "kind": ..., "rank": ...,
     "window": ..., "mask": {...}, "rule": {...}, "trains": ..., "adapter": ..., "crc": ...}
    {"step": 0, "loss": ..., "gradients": [...], "rate": ..., "decay": ..., "crc": ...}
    {"step": 1, "loss": ..., "skipped": true, "crc": ...}

JSON, numbers as Python writes them (which reads back every bit), a CRC of the rest on each line. A step's line is on
the drive before the next step begins. The last line may be cut off by a crash: then that step did not happen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ssdtune.durable import DurableError, write_file_atomically
from ssdtune.errors import SSDTuneError, reason_of
from ssdtune.kernels.noise import KINDS
from ssdtune.zeroth_order.masks import ALL_MOVE, Mask
from ssdtune.zeroth_order.rules import FOLLOW, Rule, Update
from ssdtune.zeroth_order.updates import Family

FORMAT = "ssdtune zeroth-order log 4"
# What z and rounding are made from: another would make other weights from the same log.
GENERATOR = "philox4x32-10, 64 lanes, 256 quantiles, BLAKE2b keys"
# What trains; codes: all weights, those of packed ones; masters: all weights, those of 16 bits in float32; low_rank: all
# weights, LOZO's windows as matrices of low rank.
ALL, CODES, MASTERS, LOW_RANK = "all", "codes", "masters", "low_rank"
ADAPTERS = "adapters"
TRAINS = (ALL, CODES, MASTERS, LOW_RANK, ADAPTERS)
_WAY_ON = "Make room on the drive, and resume from a checkpoint with the model opened anew."


class LogError(SSDTuneError):
    """A log that can't be read, or that belongs to something else."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a log's updates hang on.

    base: fingerprint of the files that the weights come from; None: unknown. reading: in how many bits their nested codes
    are read; None: there are none. dtype: the weights', which steps are rounded to: "bfloat16", or all that the model has:
    "bfloat16, float32". kind, rank, window, mask: of the directions' family. rule: what steps make of estimates. trains: one
    of TRAINS. adapter: fingerprint of the values that an adapter begins with; None: all weights train, or it is unknown."""

    base: str | None
    reading: str | None = None
    dtype: str
    seed: int
    kind: str
    rank: int = 0
    window: int = 0
    mask: Mask = ALL_MOVE
    rule: Rule = FOLLOW
    trains: str
    adapter: str | None = None

    @property
    def family(self) -> Family:
        """What the directions look like."""
        return Family(self.kind, self.rank, self.window, self.mask)

    def differences(
        self, other: Header, *, there: str = "in the log", here: str = "here"
    ) -> list[str]:
        """What is not as in another, in words. What an adapter begins with is not compared: whoever goes on has its values
        of a later step. there: where the other's are; here: where these are."""
        names = {"base": "the base model's files", "kind": "kind of directions"}
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return [
            f"{names.get(name, name)}: {theirs[name]!r} {there}, {mine[name]!r} {here}"
            for name in mine
            if name != "adapter" and mine[name] != theirs[name]
        ]


@dataclasses.dataclass(frozen=True)
class Log:
    """A log as read. updates: of the steps that changed something. is_cut: whether its last line was incomplete."""

    header: Header
    updates: tuple[Update, ...]
    num_steps: int
    is_cut: bool


class LogWriter:
    """Writes a log, from the start or on from steps that are there. What was written is on the drive alone. A log that a
    finished run left there stays as it is before the first step, and beside the new one after it (`replace_log`)."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        told = {"format": FORMAT, "generator": GENERATOR, **dataclasses.asdict(header)}
        self._begun: bytes | None = _line(told)  # not written yet; None: the file goes on
        self._is_whole = True  # whether the steps that were to be written have been

    def check(self) -> None:
        """Raises LogError where a step of the run is not in the log: those after it would say nothing of the weights."""
        if not self._is_whole:
            raise LogError(f"{self.path} lacks a step that the weights have taken.\n{_WAY_ON}")

    def append(self, step: int, loss: float, update: Update | None) -> None:
        """One more step, on the drive when this returns. update: None for one that was skipped. Raises LogError where it
        can't be written, or one before it could not: the log then ends with the last whole line."""
        self.check()
        told: dict[str, Any] = {"step": step, "loss": loss}
        if update is None:
            told["skipped"] = True
        else:
            told |= {"gradients": update.gradients, "rate": update.rate, "decay": update.decay}
        self._is_whole = False
        try:
            self._write(_line(told))
        except (OSError, DurableError) as error:
            why = f"{reason_of(error)}." if isinstance(error, OSError) else str(error)
            raise LogError(
                f"{self.path}: step {step} could not be written: {why} The weights have taken it.\n{_WAY_ON}"
            ) from error
        self._is_whole = True

    def _write(self, line: bytes) -> None:
        if self._begun is not None:
            goes_on = self._begun.count(b"\n") > 1
            replace_log(self.path, self._begun + line, makes_again=goes_on)
            self._begun = None
            return
        size = self.path.stat().st_size
        try:
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fdatasync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):  # else it ends amid a line, which counts for nothing
                os.truncate(self.path, size)
            raise

    def go_on(self, content: bytes) -> None:
        """The steps of another log's content instead of what was written."""
        self._begun, self._is_whole = content, True

    def content(self) -> bytes:
        """All of it."""
        return self.path.read_bytes() if self._begun is None else self._begun


def replace_log(path: Path, content: bytes, *, makes_again: bool = False) -> None:
    """Makes this the log at `path`. One that is there and has steps besides is kept beside it, under a name with a number:
    of all weights it is all that there is of them. makes_again: but not where those would follow on these, as after a kill.
    """
    old = path.read_bytes() if path.is_file() else b""
    if not (content.startswith(old) or (makes_again and old.startswith(content))):
        names = (path.with_suffix(f".{number}{path.suffix}") for number in itertools.count(1))
        write_file_atomically(next(name for name in names if not name.exists()), old)
    write_file_atomically(path, content)


def read_log(content: bytes, where: str) -> Log:
    """A log's content. where: its file, for messages. Raises LogError naming the line."""
    lines = content.splitlines(keepends=True)
    is_cut = bool(lines) and not lines[-1].endswith(b"\n")
    if is_cut:
        lines.pop()
    records = list(_records(lines, where))
    if not records:
        raise LogError(f"{where} is empty: there is no log in it.")
    header = _header(records[0], where)
    steps = [_step(record, number, where) for number, record in enumerate(records[1:])]
    updates = tuple(update for update in steps if update is not None)
    return Log(header, updates, len(steps), is_cut)


def _records(lines: Sequence[bytes], where: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            crc = record.pop("crc")
        except (ValueError, KeyError, AttributeError, RecursionError):
            record, crc = {}, None
        if crc is None or crc != _crc(record):
            raise LogError(
                f"{where}, line {number}: damaged, its checksum is not that of its content.\n"
                "Take the log of a checkpoint from before it, or start anew."
            )
        yield record


def _header(record: dict[str, Any], where: str) -> Header:
    if record.get("format") != FORMAT:
        raise LogError(
            f"{where}, line 1: is no zeroth-order log of this version ({FORMAT}).\n"
            "Replay it with the version of ssdtune that wrote it."
        )
    if record.get("generator") != GENERATOR:
        raise LogError(
            f"{where}: its directions come from {record.get('generator')!r}, here they would from {GENERATOR!r}.\n"
            "Replay it with the version of ssdtune that wrote it."
        )
    told: dict[str, Any] = {f.name: record.get(f.name) for f in dataclasses.fields(Header)}
    told |= {"mask": Mask(**record["mask"]), "rule": Rule(**record["rule"])}
    header = Header(**told)
    if header.kind not in KINDS or header.trains not in TRAINS:
        raise LogError(
            f"{where}, line 1: unknown kind {header.kind!r} or trains {header.trains!r}."
        )
    return header


def _step(record: dict[str, Any], number: int, where: str) -> Update | None:
    if record.get("step") != number:
        raise LogError(
            f"{where}, line {number + 2}: step {record.get('step')} where {number} was to come."
        )
    if record.get("skipped"):
        return None
    gradients = tuple(map(float, record["gradients"]))
    return Update(number, gradients, float(record["rate"]), float(record["decay"]))


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps({**record, "crc": _crc(record)}).encode() + b"\n"


def _crc(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record).encode())
