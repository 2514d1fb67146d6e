"""The doctor says what is live, at what rate, and why; and leaves nothing behind."""

import functools
import os
from pathlib import Path

import pytest
import torch

from ssdtune import doctor, memory
from ssdtune.doctor import DoctorError, matmul_rate, print_doctor
from ssdtune.kernels import native
from ssdtune.probe import files
from ssdtune.swap import gds

MIB = 2**20


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PROBE_BYTES", 16 * MIB)
    monkeypatch.setattr(doctor, "CPU_WIDTH", 64)
    monkeypatch.setattr(doctor, "MATMUL_S", 0.01)
    monkeypatch.setattr(doctor, "READ_S", 0.05)


def row(text: str, label: str) -> str:
    """The line that begins with a label."""
    return next(line for line in text.splitlines() if line.startswith(label))


def test_one_page_about_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_doctor(tmp_path) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in row(text, "packages")
    assert "transformers" in row(text, "packages")
    assert "peft" in row(text, "packages")
    assert "deepspeed" in text
    assert "kvikio" in text
    assert "TFLOP/s" in row(text, "matmul")
    assert "GB/s of bfloat16" in row(text, "kernels")
    assert "free" in row(text, "RAM")
    assert "free of" in row(text, "drive")
    assert "GB/s" in row(text, "reading")
    assert "because" in text
    assert row(text, "gds")
    assert all(len(line) < 200 for line in text.splitlines())


def test_gds_is_used_or_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for open_pool, said in ((lambda: gds.GdsPool(None), "used: as it is"), (None, "no: as it is")):
        choice = gds.GdsChoice(open_pool, "as it is")
        monkeypatch.setattr(gds, "choose_gds", lambda path, choice=choice: choice)
        print_doctor(tmp_path)
        assert said in row(capsys.readouterr().out, "gds")


def test_the_measured_file_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_doctor(tmp_path)
    assert "made for it" in row(capsys.readouterr().out, "reading")
    assert list(tmp_path.iterdir()) == []


def test_a_models_own_file_is_measured_and_untouched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = os.urandom(MIB)
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "tokenizer.json").write_bytes(bytes(2 * MIB))
    print_doctor(tmp_path)
    assert "measured on model.safetensors" in row(capsys.readouterr().out, "reading")
    assert (tmp_path / "model.safetensors").read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_drive_is_said_not_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "PROBE_BYTES", 2**60)
    assert print_doctor(tmp_path) == 0
    assert "not measured: only" in row(capsys.readouterr().out, "reading")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DoctorError, match="no-such"):
        print_doctor(tmp_path / "no-such")


@pytest.mark.parametrize(
    ("name", "least", "problem"),
    [("no-such-package", (1, 0), "is missing"), ("torch", (99, 0), "is too old")],
)
def test_what_is_missing_or_too_old_fails_with_the_remedy(
    name: str,
    least: tuple[int, int],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(doctor, "NEEDED", {name: least})
    assert print_doctor(tmp_path) == 1
    line = row(capsys.readouterr().out, "problem")
    assert problem in line
    assert f"pip install '{name}>={least[0]}.{least[1]}'" in line


def test_slow_bfloat16_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {torch.float32: 1e12, torch.bfloat16: 2e10}
    monkeypatch.setattr(doctor, "matmul_rate", lambda dtype, **_: rates[dtype])
    print_doctor(tmp_path)
    text = capsys.readouterr().out
    assert "bfloat16 is 50 times slower" in text
    assert "dtype: float32" in text
    rates[torch.bfloat16] = 2e12
    print_doctor(tmp_path)
    assert "slower than" not in capsys.readouterr().out


def test_slow_kernels_are_named_with_the_reason_and_the_remedy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Of the C library itself: tests/test_native.py."""
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native, "_found", functools.cache(native._found.__wrapped__))
    print_doctor(tmp_path)
    text = capsys.readouterr().out
    assert "torch (no C compiler was found) · 4-bit weights at" in row(text, "kernels")
    assert "C is several times as fast. Install gcc." in text
    assert not [warning for warning in recwarn if warning.category is native.SlowKernelsWarning]


def test_the_rate_is_of_the_width_asked_for() -> None:
    rate = matmul_rate(torch.float32, width=64, device="cpu", seconds=0.01)
    assert 1e6 < rate < 1e15


# ------------------------------------------------------------------ memory


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A /proc of a machine with 16 GiB, 10 of them free."""
    meminfo = f"MemTotal: {16 * MIB} kB\nMemFree: 1 kB\nMemAvailable: {10 * MIB} kB\n"
    write(tmp_path / "proc", meminfo=meminfo)
    return tmp_path / "proc"


def test_without_cgroups_the_machine_counts(proc: Path, tmp_path: Path) -> None:
    assert memory.total_ram(proc) == 16 * 2**30
    assert memory.free_ram(proc, tmp_path) == 10 * 2**30
    assert memory.ram_limits(proc, tmp_path) == []


def test_a_limit_above_us_binds_too(proc: Path, tmp_path: Path) -> None:
    """cgroup v2: the own group has none, its parent 4 GiB, 3 of them used, 1 of those cache."""
    write(proc / "self", cgroup="0::/box/job\n")
    root = tmp_path / "cg"
    write(root / "box/job", memory__max="max\n", memory__current="5\n", memory__stat="")
    stat = f"anon 7\ninactive_file {2**30}\n"
    write(
        root / "box",
        memory__max=f"{4 * 2**30}\n",
        memory__current=f"{3 * 2**30}\n",
        memory__stat=stat,
    )
    assert memory.free_ram(proc, root) == 2 * 2**30
    assert memory.ram_limits(proc, root) == [memory.Limit(4 * 2**30, 2 * 2**30)]


def test_version_one_and_its_way_to_say_no_limit(proc: Path, tmp_path: Path) -> None:
    write(proc / "self", cgroup="3:cpu,memory:/a\n0::/\n")
    root = tmp_path / "cg" / "memory"
    files = {"memory.usage_in_bytes": f"{2**20}", "memory.stat": "total_inactive_file 0\n"}
    write(root / "a", **files, **{"memory.limit_in_bytes": f"{2**30}"})
    write(root, **files, **{"memory.limit_in_bytes": f"{2**63 - 4096}"})
    assert memory.ram_limits(proc, root.parent) == [memory.Limit(2**30, 2**20)]


def test_this_machine_has_memory() -> None:
    assert 0 < memory.free_ram() <= memory.total_ram()
