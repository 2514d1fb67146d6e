"""The probe's arithmetic, and one whole small measurement."""

import contextlib
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ssdtune import probe
from ssdtune.cli import main
from ssdtune.cores import cpu_seconds
from ssdtune.kernels.kinds import EXAMPLES, NARROW
from ssdtune.probe import (
    copies,
    drive,
    few_rows,
    in_model,
    operators,
    optimizer,
    perturbing,
    slowing,
    text,
    timing,
)
from ssdtune.probe.timing import time_all
from ssdtune.profiles import load_profile
from ssdtune.schedule.profile import (
    FRESH,
    MIXED,
    OPERATORS,
    PERTURB,
    PERTURB_SIGNS,
    SUSTAINED,
    InModel,
    Profile,
    ProfileError,
)
from ssdtune.swap.scratch import ScratchFile


def test_overhead_and_factor_are_found_again() -> None:
    visits = ((60, 0, 1e-3), (60, 0, 1e-2), (60, 100, 3e-2), (60, 100, 1e-4))
    points = [in_model.Point(n, a, s, 3e-5 * n + 1e-5 * a + 1.2 * s) for n, a, s in visits]
    found = in_model.fit_in_model(points, is_hidden=False)
    assert found.overhead_s == pytest.approx(3e-5)
    assert found.autograd_overhead_s == pytest.approx(1e-5)
    assert found.factor == pytest.approx(1.2)


def test_calls_that_nothing_records_have_an_overhead_and_a_factor_of_their_own() -> None:
    visits = ((60, 0, 1e-3), (60, 0, 1e-2), (60, 100, 3e-2), (60, 100, 1e-4))
    points = [in_model.Point(n, a, s, 3e-5 * n + 1e-5 * a + 1.2 * s) for n, a, s in visits]
    alone = [in_model.Point(60, 0, s, 2e-5 * 60 + 1.1 * s, is_recorded=False) for s in (1e-3, 1e-2)]
    found = in_model.fit_in_model([*points, *alone], is_hidden=False)
    assert found.overhead_s == pytest.approx(3e-5)
    assert found.no_grad_overhead_s == pytest.approx(2e-5)
    assert found.no_grad_factor == pytest.approx(1.1)
    assert found.seconds(60, 0, 1e-3) == pytest.approx(3e-3)
    assert found.seconds(60, 0, 1e-3, is_recorded=False) == pytest.approx(2.3e-3)


def test_a_forward_alone_has_at_most_the_factor_of_a_recorded_one_and_at_least_1() -> None:
    visits = ((60, 0, 1e-3), (60, 0, 1e-2), (60, 100, 3e-2), (60, 100, 1e-4))
    points = [in_model.Point(n, a, s, 3e-5 * n + 1e-5 * a + 1.2 * s) for n, a, s in visits]
    for factor, held in ((2.0, 1.2), (0.7, 1.0)):
        alone = [
            in_model.Point(60, 0, s, 2e-5 * 60 + factor * s, is_recorded=False)
            for s in (1e-3, 1e-2)
        ]
        found = in_model.fit_in_model([*points, *alone], is_hidden=False)
        assert found.no_grad_factor == pytest.approx(held)


def test_curves_that_do_not_hold_give_a_factor_alone() -> None:
    points = [
        in_model.Point(60, a, s, m)
        for a, s, m in ((0, 1e-3, 5e-4), (0, 1e-2, 4e-3), (9, 1e-3, 6e-4))
    ]
    found = in_model.fit_in_model(points, is_hidden=False)
    assert found.overhead_s == 0
    assert 0.3 < found.factor < 0.7


def test_on_a_device_the_longer_of_calls_and_work_counts() -> None:
    points = [in_model.Point(60, 40, 1e-4, 2e-3), in_model.Point(60, 40, 2e-2, 2.2e-2)]
    found = in_model.fit_in_model(points, is_hidden=True)
    assert found.is_hidden
    assert found.seconds(60, 40, 1e-4) == pytest.approx(2e-3)
    assert found.seconds(60, 40, 2e-2) == pytest.approx(2.2e-2)


def test_a_curve_is_measured_at_every_size_and_rises() -> None:
    values = {float(n): torch.randn(n).exp_ for n in (10**3, 10**5, 10**6)}
    curve = time_all(values, torch.device("cpu"), rounds=2)
    assert [size for size, _ in curve.points] == [1e3, 1e5, 1e6]
    assert curve.points[-1][1] > curve.points[0][1] > 0


def test_a_machine_is_measured_and_its_profile_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it, at few and small sizes."""
    monkeypatch.setattr(probe, "DTYPES", ("float32",))
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(operators, "PRODUCTS", operators.PRODUCTS[:3])
    monkeypatch.setattr(operators, "PASS_BYTES", operators.PASS_BYTES[:3])
    monkeypatch.setattr(operators, "LENGTHS", operators.LENGTHS[:2])
    monkeypatch.setattr(drive, "READ_BYTES", drive.READ_BYTES[:2])
    monkeypatch.setattr(copies, "COPY_BYTES", copies.COPY_BYTES[:2])
    monkeypatch.setattr(in_model, "REFERENCE_TOKENS", (8, 32))
    monkeypatch.setattr(few_rows, "ROWS", (1, 4))
    monkeypatch.setattr(few_rows, "WIDTHS", (64, 128))
    monkeypatch.setattr(optimizer, "BLOCKS", ())
    monkeypatch.setattr(perturbing, "ELEMENTS", perturbing.ELEMENTS[:2])
    monkeypatch.setattr(slowing, "SLOWING_ROUNDS", 1)
    monkeypatch.setattr(slowing, "COPY_ROUNDS", 1)
    out = tmp_path / "deep" / "profile.yaml"
    assert main(["probe", str(tmp_path), "--out", str(out)]) == 0
    profile = load_profile(out)
    curves = profile.operators["float32"]
    assert set(curves) == {*OPERATORS, FRESH, PERTURB, PERTURB_SIGNS}
    assert {"nvme_read", "nvme_write", MIXED, "unpack", "decode"} <= set(profile.transfers)
    assert {*profile.decoding["decode"]} == {*EXAMPLES} - {NARROW}
    assert SUSTAINED not in profile.transfers, "only where it is asked for"
    assert all(len(curve.slow) == len(curve.points) for curve in profile.transfers.values())
    assert {kind: list(grid) for kind, grid in profile.products["float32"].items()} == {
        "matmul": [1, 4],
        "matmul_transposed": [1, 4],
    }
    assert set(profile.optimizer) == {"foreach", "fused"}
    assert not profile.lacks
    assert profile.copy_overlap is not None
    assert 1 <= profile.copy_overlap <= 2
    assert isinstance(profile.in_model["float32"], InModel)
    assert profile.transfers["nvme_read"].rate > 1e6
    said = capsys.readouterr().out
    assert "written" in said
    assert f"rotated {profile.decoding['decode']['rotated']:.3g}" in said
    assert [p.name for p in tmp_path.iterdir()] == ["deep"], "nothing is left behind"


@pytest.mark.parametrize("takes_turns", [True, False])
def test_of_two_things_at_once_as_much_is_done_as_they_leave_each_other(takes_turns: bool) -> None:
    shared = threading.Lock() if takes_turns else contextlib.nullcontext()

    def work() -> None:
        with shared:
            time.sleep(5e-3)
        time.sleep(1e-4)  # lets the other have the lock

    found = statistics.median(slowing._overlap(work, work, lambda: None) for _ in range(3))
    assert (found < 1.5) == takes_turns, "1 where they take turns, 2 where they don't"


def test_a_machine_whose_cache_is_not_there_yet_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, calls = tmp_path / "cache" / "ssdtune", []
    monkeypatch.setenv("SSDTUNE_CACHE", str(cache))
    monkeypatch.setattr(probe, "print_probe", lambda *given: calls.append(given) or 0)
    assert main(["probe"]) == 0
    assert calls == [(cache, cache / "profile.yaml", None, None)]
    assert cache.is_dir()


class Noting:
    """A stream, or memory, that notes what is done with it, as if there were a device."""

    def __init__(self, name: str, notes: list[tuple[object, ...]], on: list[str]) -> None:
        self.name, self.notes, self.on = name, notes, on

    def wait_stream(self, other: "Noting") -> None:
        self.notes.append((self.name, "waits for", other.name))

    def synchronize(self) -> None:
        self.notes.append(("the host", "waits for", self.name))

    def __getitem__(self, part: slice) -> "Noting":
        return Noting(f"{self.name}[:{part.stop}]", self.notes, self.on)

    def copy_(self, of: "Noting", non_blocking: bool) -> None:
        assert non_blocking
        self.notes.append((self.on[-1], "copies", of.name, "to", self.name))


def test_both_ways_of_a_link_are_under_way_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither stream waits for the other's copy, and who waits for the device waits for both."""
    notes: list[tuple[object, ...]] = []
    on = ["main"]
    main_stream, names = Noting("main", notes, on), iter(("up", "down"))

    @contextlib.contextmanager
    def entered(stream: Noting) -> Iterator[None]:
        on.append(stream.name)
        yield
        on.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Noting(next(names), notes, on))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main_stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(copies, "COPY_BYTES", (10, 20))
    there, source, back, beside = (
        Noting(name, notes, on) for name in ("there", "source", "back", "beside")
    )
    pairs: Any = {"up": (there, source), "down": (back, beside)}
    curve = copies.measure_both_ways(torch.device("cuda", 0), **pairs)
    assert [size for size, _ in curve.points] == [20.0, 40.0], "of both ways together"
    assert notes[:7] == [
        ("up", "waits for", "main"),
        ("down", "waits for", "main"),
        ("up", "copies", "source[:10]", "to", "there[:10]"),
        ("down", "copies", "beside[:10]", "to", "back[:10]"),
        ("main", "waits for", "up"),
        ("main", "waits for", "down"),
        ("the host", "waits for", "main"),
    ]


def test_what_other_processes_use_is_counted_and_what_this_one_uses_is_not() -> None:
    before, own = cpu_seconds(), time.process_time()
    while time.process_time() < own + 0.3:
        pass
    mine = cpu_seconds() - before
    code = "import time\nwhile time.process_time() < 0.6: pass"
    busy = subprocess.Popen([sys.executable, "-c", code])
    os.waitid(os.P_PID, busy.pid, os.WEXITED | os.WNOWAIT)  # a child that was waited for is ours
    theirs = cpu_seconds() - before - mine
    busy.wait()
    assert theirs > 0.5
    assert cpu_seconds() - before < theirs + mine, "then it is"


def test_a_busy_machine_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for cores, is_said in ((1.3, True), (0.05, False)):
        found = Profile(name="made up", operators={}, transfers={}, busy_cores=cores)
        monkeypatch.setattr(probe, "measure", lambda *given, found=found: found)
        assert probe.print_probe(tmp_path, tmp_path / "p.yaml") == 0
        assert ("used 1.3 cores" in capsys.readouterr().out) == is_said


def test_a_sustained_write_is_measured_past_the_cache_and_leaves_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    curve = drive.measure_sustained(tmp_path, 4 * drive.SUSTAINED_CHUNK, said.append)
    assert curve.points[0][0] == drive.SUSTAINED_CHUNK
    assert curve.slow[0] >= curve.points[0][1] > 0
    assert "at the end of 268 MB" in said[0]
    assert list(tmp_path.iterdir()) == []


def test_a_sustained_write_counts_what_its_last_chunks_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drive whose cache holds six chunks."""
    write = ScratchFile.write

    def slower(file: ScratchFile, offset: int, content: memoryview) -> None:
        write(file, offset, content)
        if offset >= 6 * drive.SUSTAINED_CHUNK:
            time.sleep(0.02)

    monkeypatch.setattr(drive, "SUSTAINED_CHUNK", 2**16)
    monkeypatch.setattr(ScratchFile, "write", slower)
    curve = drive.measure_sustained(tmp_path, 8 * 2**16, lambda line: None)
    assert curve.points[0][1] >= 0.02


def test_a_drive_without_room_for_a_sustained_write_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe, "measure", lambda *given: pytest.fail("measured"))
    monkeypatch.setattr(ScratchFile, "write", lambda *given: pytest.fail("written"))
    assert main(["probe", str(tmp_path), "--sustained", "900000TB"]) == 2
    text = capsys.readouterr().err
    assert "are free" in text
    assert "Give --sustained a smaller size" in text
    assert list(tmp_path.iterdir()) == []


def test_a_sustained_write_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ScratchFile, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        drive.measure_sustained(tmp_path, 4 * drive.SUSTAINED_CHUNK, lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_would_take_too_long_are_left_out_and_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of one kind of product, so that the two have not the same rows."""
    monkeypatch.setattr(few_rows, "ROWS", (1, 4))
    monkeypatch.setattr(few_rows, "WIDTHS", (64,))
    monkeypatch.setattr(few_rows, "LONGEST_S", 0.05)
    plain = torch.matmul

    def slow(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return plain(left, right)

    monkeypatch.setattr(torch, "matmul", slow)
    grids = few_rows.measure_few_rows(torch.device("cpu"), torch.float32)
    assert {kind: list(grid) for kind, grid in grids.items()} == {
        "matmul": [1],
        "matmul_transposed": [1, 4],
    }
    assert re.search(r" 1: \S+ / \S+, 4: \S+ / -$", text._few_rows_line(grids))


def test_pieces_that_would_take_too_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MAX_PIECE_S", 0.2)
    ran: list[int] = []

    def sleep(num: int) -> None:
        ran.append(num)
        time.sleep(num * 1e-3)

    curve = time_all({float(n): partial(sleep, n) for n in (1, 60, 640)}, torch.device("cpu"))
    assert [size for size, _ in curve.points] == [1.0, 60.0]
    assert 640 not in ran


def test_one_slow_moment_leaves_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time of the smallest piece is a hundred times too long."""
    monkeypatch.setattr(timing, "MAX_PIECE_S", 0.02)
    slow = iter((0.0, 0.1))

    def small() -> None:
        time.sleep(next(slow, 1e-4))

    pieces = {1.0: small, 10.0: partial(time.sleep, 1e-3)}
    curve = time_all(pieces, torch.device("cpu"))
    assert [size for size, _ in curve.points] == [1.0, 10.0]


def test_the_slow_end_is_that_of_nine_rounds_in_ten() -> None:
    assert timing.quantile([5.0, 1.0, 3.0, 2.0, 4.0], 0.9) == pytest.approx(4.6)
    assert timing.quantile([2.0], 0.9) == 2.0


def test_a_folder_or_file_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["probe", str(tmp_path), "--file", str(tmp_path / "none")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_profile_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("a: [")
    with pytest.raises(ProfileError, match=r"p\.yaml: can't read it"):
        load_profile(path)
