"""The probe's arithmetic, and one whole small measurement."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ssdtune import probe
from ssdtune.cli import main
from ssdtune.probe import copies, drive, in_model, machine, operators, timing
from ssdtune.probe.timing import time_all
from ssdtune.profiles import load_profile
from ssdtune.schedule.profile import FRESH, OPERATORS, InModel, Profile, ProfileError


def test_overhead_and_factor_are_found_again() -> None:
    visits = ((60, 0, 1e-3), (60, 0, 1e-2), (60, 100, 3e-2), (60, 100, 1e-4))
    points = [in_model.Point(n, a, s, 3e-5 * n + 1e-5 * a + 1.2 * s) for n, a, s in visits]
    found = in_model.fit_in_model(points, is_hidden=False)
    assert found.overhead_s == pytest.approx(3e-5)
    assert found.autograd_overhead_s == pytest.approx(1e-5)
    assert found.factor == pytest.approx(1.2)


def test_curves_that_do_not_hold_give_a_factor_alone() -> None:
    points = [
        in_model.Point(60, a, s, m) for a, s, m in ((0, 1e-3, 5e-4), (0, 1e-2, 4e-3), (9, 1e-3, 6e-4))
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
    out = tmp_path / "deep" / "profile.yaml"
    assert main(["probe", str(tmp_path), "--out", str(out)]) == 0
    profile = load_profile(out)
    assert set(profile.operators["float32"]) == {*OPERATORS, FRESH}
    assert {"nvme_read", "nvme_write", "unpack"} <= set(profile.transfers)
    assert isinstance(profile.in_model["float32"], InModel)
    assert profile.transfers["nvme_read"].rate > 1e6
    assert "written" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["deep"], "nothing is left behind"


def test_a_machine_whose_cache_is_not_there_yet_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, calls = tmp_path / "cache" / "ssdtune", []
    monkeypatch.setenv("SSDTUNE_CACHE", str(cache))
    monkeypatch.setattr(probe, "print_probe", lambda *given: calls.append(given) or 0)
    assert main(["probe"]) == 0
    assert calls == [(cache, cache / "profile.yaml", None)]
    assert cache.is_dir()


def test_a_busy_machine_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another process at work for all of the measurement."""

    def measured(*given: object) -> Profile:
        code = "import time\nwhile time.process_time() < 0.6: pass"
        subprocess.run([sys.executable, "-c", code], check=True, start_new_session=True)
        time.sleep(0.05)
        return Profile(name="made up", operators={}, transfers={})

    # A child's time would be ours.
    monkeypatch.setattr(probe, "measure", measured)
    own = os.times
    monkeypatch.setattr(
        machine.os, "times", lambda: os.times_result((*own()[:2], 0.0, 0.0, own().elapsed))
    )
    assert probe.print_probe(tmp_path, tmp_path / "p.yaml") == 0
    assert "measure again when the machine is idle" in capsys.readouterr().out


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
