"""The scripts in launch/: what they refuse, and how they hand on what they were given."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parent.parent / "launch"


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu_check():
    return load_script("gpu_check")


def bash(script, *, path=None, **environment):
    variables = {"PATH": path or os.environ["PATH"], "HOME": "/nonexistent", **environment}
    return subprocess.run(
        ["/bin/bash", str(LAUNCH / script)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


def test_a_folder_that_is_no_virtual_environment_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    done = bash("test.sh", SSDTUNE_VENV=str(tmp_path))
    assert done.returncode == 1
    assert "is no virtual environment" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("answers", "words"), [(None, "no Python 3.11 or newer"), ("exit 1", "no Python 3.11 or newer")]
)
def test_a_machine_without_a_recent_python_is_told_so(tmp_path, answers, words):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("dirname", "cat", "cksum", "ls"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    if answers:
        (tools / "python3").write_text(f"#!/bin/bash\n{answers}\n")
        (tools / "python3").chmod(0o755)
    done = bash("test.sh", path=str(tools), SSDTUNE_VENV=str(tmp_path / "venv"))
    assert done.returncode == 1
    assert words in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_python_that_cannot_make_environments_is_told_apart(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("dirname", "cat", "cksum", "ls"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    (tools / "python3").write_text('#!/bin/bash\n[[ "$2" != *ensurepip* ]]\n')
    (tools / "python3").chmod(0o755)
    done = bash("test.sh", path=str(tools), SSDTUNE_VENV=str(tmp_path / "venv"))
    assert done.returncode == 1
    assert "apt-get install python3-venv" in done.stderr


def test_train_py_hands_its_arguments_to_the_train_verb():
    pytest.importorskip("ssdtune.cli")
    arguments = load_script("train").train_arguments
    assert arguments(["--config", "x.yaml", "--lora_r", "8"]) == [
        "train",
        "x.yaml",
        "--lora_r",
        "8",
    ]
    assert arguments(["--lora_r", "8", "--config=x.yaml"]) == ["train", "x.yaml", "--lora_r", "8"]
    assert arguments(["x.yaml"]) == ["train", "x.yaml"]


def test_gpu_check_names_what_is_missing(gpu_check, tmp_path, monkeypatch):
    assert gpu_check.missing_packages(tmp_path) == []
    kept = [path for path in sys.path if "site-packages" not in path]
    monkeypatch.setattr(sys, "path", kept)
    lines = gpu_check.missing_packages(tmp_path)
    assert "greenlet: needs >=3.1, not installed" in lines
    assert len(lines) >= 9


def test_gpu_check_installs_only_wheels_of_missing_packages(gpu_check, tmp_path):
    import zipfile

    for name, tag in (
        ("greenlet", "py3-none-any"),
        ("ssdtune_lacks_me", "py3-none-any"),
        ("odd", "cp27-cp27m-any"),
    ):
        info = f"{name}-9.0.dist-info"
        with zipfile.ZipFile(tmp_path / f"{name}-9.0-{tag}.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "")
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.0\n"
            )
            wheel.writestr(
                f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"
            )
            wheel.writestr(f"{info}/RECORD", "")
    target = tmp_path / "target"
    target.mkdir()
    assert gpu_check.install_wheels(tmp_path, target) == ["ssdtune_lacks_me-9.0-py3-none-any.whl"]
    assert (target / "ssdtune_lacks_me.py").is_file()
    assert not (target / "greenlet.py").exists()


def verdict_of(
    gpu_check, *, missing=(), code=0, passed=1, devices=("H",), benchmark_code=0, unmet=()
):
    counts = {"passed": passed, "failed": int(code == 1), "skipped": 0}
    tests = {"exit_code": code, "timed_out": code is None, "seconds": 1.0, "counts": counts}
    benchmark = {"ran": True, "exit_code": benchmark_code, "rows": {"unmet": list(unmet)}}
    machine = {"cuda": {"devices": list(devices)}}
    result = {"missing": list(missing), "tests": tests, "benchmark": benchmark, "machine": machine}
    return gpu_check.verdict(result)


def test_gpu_check_passes_only_when_a_gpu_test_passed(gpu_check):
    assert verdict_of(gpu_check)[0] == gpu_check.PASSED
    assert verdict_of(gpu_check, code=1)[0] == gpu_check.FAILED
    assert verdict_of(gpu_check, code=None)[0] == gpu_check.FAILED
    assert verdict_of(gpu_check, passed=0)[0] == gpu_check.FAILED
    assert verdict_of(gpu_check, benchmark_code=1)[0] == gpu_check.FAILED
    assert verdict_of(gpu_check, benchmark_code=None)[0] == gpu_check.FAILED
    assert verdict_of(gpu_check, code=2, missing=["greenlet: needs >=3.1, not installed"]) == (
        gpu_check.MISSING,
        "packages are missing: greenlet: needs >=3.1, not installed",
    )
    code, words = verdict_of(gpu_check, devices=(), passed=0)
    assert code == gpu_check.NO_DEVICE
    assert "no CUDA device was found" in words


def test_gpu_check_names_bars_that_are_not_met(gpu_check):
    assert verdict_of(gpu_check, unmet=[])[0] == gpu_check.PASSED
    missed = ["NF4: 0.55 of a copy (bar 0.7)", "1024 tokens: ours / floor: 1.30 (bar 1.1)"]
    assert verdict_of(gpu_check, benchmark_code=1, unmet=missed) == (
        gpu_check.FAILED,
        "2 bars are not met: NF4: 0.55 of a copy (bar 0.7); 1024 tokens: ours / floor: 1.30 (bar 1.1)",
    )


def test_gpu_check_stops_what_runs_too_long_with_all_it_started(gpu_check, tmp_path):
    marker = tmp_path / "still-alive"
    script = f"echo started; (sleep 2; touch {marker}) & wait"
    code, output = gpu_check.run(
        ["bash", "-c", script], environment=dict(os.environ), timeout_s=0.5
    )
    assert code is None
    assert output == "started\n"
    subprocess.run(["sleep", "2.2"], check=True)
    assert not marker.exists()


def test_gpu_check_reads_what_each_test_did(gpu_check, tmp_path):
    report = tmp_path / "junit.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.a" name="ok" time="1.5"/>'
        '<testcase classname="tests.a" name="bad" time="0.1"><failure message="assert 1 == 2"/></testcase>'
        '<testcase classname="tests.a" name="off" time="0"><skipped message="no CUDA device"/></testcase>'
        "</testsuite></testsuites>"
    )
    cases = gpu_check.read_junit(report)
    assert [case["outcome"] for case in cases] == ["passed", "failed", "skipped"]
    assert cases[0] == {"test": "tests.a::ok", "outcome": "passed", "seconds": 1.5, "reason": ""}
    assert cases[2]["reason"] == "no CUDA device"
