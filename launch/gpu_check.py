"""What `gpu_check.sh` does: names missing packages, installs them from a folder, tests, measures.

Only the standard library, pip, and what came with PyTorch are needed to start. Wheels go into a
temporary folder on PYTHONPATH: the image's own packages are neither changed nor hidden.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUDGET_S = 470.0  # 8 minutes less the start and the writing of the result
BENCHMARK_S = 200.0  # kept for the benchmark while the tests run
PASSED, FAILED, MISSING, NO_DEVICE = 0, 1, 2, 3

DEVICE_PROBE = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": []}
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found["devices"].append({"name": p.name, "memory_bytes": p.total_memory,
                                 "capability": f"{p.major}.{p.minor}"})
print(json.dumps(found))
"""


def missing_packages(folder: Path) -> list[str]:
    """The project's requirements, and pytest, that neither the image nor `folder` satisfies.

    Each as "name: needs >=3.1, not installed" or "…, has 2.9".
    """
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = []
    for text in [*project["dependencies"], "pytest>=8"]:
        requirement = Requirement(text)
        version = installed_version(requirement.name, folder)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            has = "not installed" if version is None else f"has {version}"
            lines.append(f"{requirement.name}: needs {requirement.specifier}, {has}")
    return lines


def installed_version(name: str, folder: Path) -> str | None:
    """The version in `folder`, else in the image; None if neither has the package."""
    wanted = re.sub(r"[-_.]+", "-", name).lower()
    for path in ([str(folder)], sys.path):
        for found in importlib.metadata.distributions(path=path):
            if re.sub(r"[-_.]+", "-", found.name or "").lower() == wanted:
                return found.version
    return None


def install_wheels(wheels: Path, target: Path) -> list[str]:
    """Installs into `target` each wheel that fits this Python and whose package is missing.

    Returns the names. A package that the image has is left to the image, unless it is too old for
    the project.
    """
    from packaging.tags import sys_tags
    from packaging.utils import parse_wheel_filename

    tags = set(sys_tags())
    too_old = {line.split(":")[0].lower() for line in missing_packages(target)}
    chosen = []
    for wheel in sorted(wheels.glob("*.whl")):
        name, _, _, wheel_tags = parse_wheel_filename(wheel.name)
        if tags.isdisjoint(wheel_tags):
            print(f"  skipped {wheel.name}: not for Python {platform.python_version()} here")
        elif installed_version(name, target) is None or name in too_old:
            chosen.append(wheel)
    if chosen:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        command += ["--root-user-action=ignore", "--disable-pip-version-check"]
        subprocess.run([*command, "--target", str(target), *map(str, chosen)], check=True)
    return [wheel.name for wheel in chosen]


def run(
    command: list[str], *, environment: dict[str, str], timeout_s: float
) -> tuple[int | None, str]:
    """Exit code (None: ran past `timeout_s` and was stopped) and all that the command printed."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # so that what the tests started ends with them
        )
        try:
            code: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        output.seek(0)
        return code, output.read()


def run_tests(scratch: Path, environment: dict[str, str], timeout_s: float) -> dict[str, Any]:
    """Runs `pytest -m gpu` with a configuration of its own, so that no plugin is needed."""
    configuration = scratch / "pytest.ini"
    marks = "    gpu: needs a CUDA device\n    slow: minutes\n    timeout: of pytest-timeout\n"
    configuration.write_text(f"[pytest]\nmarkers =\n{marks}")
    report = scratch / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rs", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors"]  # a missing package stops its own tests alone
    command += ["-c", str(configuration), "--rootdir", str(ROOT), f"--junitxml={report}"]
    started = time.perf_counter()
    code, output = run(
        [*command, str(ROOT / "tests")], environment=environment, timeout_s=timeout_s
    )
    print(output)
    cases = read_junit(report) if report.is_file() else []
    return {
        "exit_code": code,
        "timed_out": code is None,
        "seconds": round(time.perf_counter() - started, 1),
        "counts": {
            o: sum(c["outcome"] == o for c in cases) for o in ("passed", "failed", "skipped")
        },
        "cases": cases,
        "output_tail": output[-4000:] if code else "",
    }


def read_junit(report: Path) -> list[dict[str, Any]]:
    """One record for each test: name, outcome, seconds, and why it failed or was skipped."""
    cases = []
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        outcome, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                reason = child.get("message", "")[:500]
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        seconds = float(case.get("time", 0))
        cases.append({"test": name, "outcome": outcome, "seconds": seconds, "reason": reason})
    return cases


def run_benchmark(environment: dict[str, str], timeout_s: float) -> dict[str, Any]:
    """Runs benchmarks/gpu.py --json if it is there; its last line of output is the result."""
    script = ROOT / "benchmarks" / "gpu.py"
    if not script.is_file():
        return {"ran": False, "why": "there is no benchmarks/gpu.py"}
    started = time.perf_counter()
    command = [sys.executable, str(script), "--json"]
    code, output = run(command, environment=environment, timeout_s=timeout_s)
    print(output)
    result: dict[str, Any] = {"ran": True, "exit_code": code, "timed_out": code is None}
    result["seconds"] = round(time.perf_counter() - started, 1)
    lines = output.strip().splitlines()
    try:
        result["rows"] = json.loads(lines[-1])
    except (IndexError, ValueError):
        result["output_tail"] = output[-4000:]
    return result


def describe_machine(environment: dict[str, str]) -> dict[str, Any]:
    """Devices, driver, processors, memory, versions: what a reader needs beside the numbers."""
    code, output = run([sys.executable, "-c", DEVICE_PROBE], environment=environment, timeout_s=120)
    cuda = json.loads(output.strip().splitlines()[-1]) if code == 0 else {"error": output[-500:]}
    driver = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        _, text = run(query, environment=environment, timeout_s=30)
        driver = (text.strip().splitlines() or [None])[0]
    folder = Path(environment["PYTHONPATH"].split(os.pathsep)[0])
    packages = [
        "torch",
        "transformers",
        "accelerate",
        "peft",
        "safetensors",
        "greenlet",
        "datasets",
    ]
    return {
        "cuda": cuda,
        "driver": driver,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "packages": {
            name: installed_version(name, folder) for name in [*packages, "numpy", "triton"]
        },
    }


def commit_name() -> str | None:
    """The commit that is checked, or None outside a git checkout."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def verdict(result: dict[str, Any]) -> tuple[int, str]:
    """The exit code and the sentence that explains it."""
    tests, benchmark = result["tests"], result["benchmark"]
    failed = tests["exit_code"] not in (0, 5)  # 5: no test carries the mark
    if result["missing"] and failed:
        return MISSING, "packages are missing: " + "; ".join(result["missing"])
    if tests["timed_out"]:
        return FAILED, f"the tests were stopped after {tests['seconds']} s"
    if failed:
        num_failed, code = tests["counts"]["failed"], tests["exit_code"]
        return FAILED, f"{num_failed} GPU tests failed (pytest's exit code {code})"
    if not result["machine"]["cuda"].get("devices"):
        return NO_DEVICE, "no CUDA device was found: nothing was checked on a GPU"
    if not tests["counts"]["passed"]:
        return FAILED, "no GPU test ran"
    if unmet := benchmark.get("rows", {}).get("unmet"):
        return FAILED, f"{len(unmet)} bars are not met: " + "; ".join(unmet)
    if benchmark["ran"] and benchmark["exit_code"] != 0:
        return FAILED, "the benchmark failed or ran out of time"
    return PASSED, f"{tests['counts']['passed']} GPU tests passed"


def check(wheels: Path | None, scratch: Path) -> dict[str, Any]:
    """Everything, in order; the record that is written as JSON."""
    deadline = time.perf_counter() + BUDGET_S
    target = scratch / "packages"
    target.mkdir()
    lacking = missing_packages(target)
    print("missing from this image: " + ("; ".join(lacking) if lacking else "nothing"))
    installed = install_wheels(wheels, target) if wheels else []
    if installed:
        print(f"installed from {wheels}: {', '.join(installed)}")
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    paths = [str(target), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit_name(),
        "missing_before": lacking,
        "installed": installed,
        "missing": missing_packages(target),
        "machine": describe_machine(environment),
    }
    left = deadline - time.perf_counter()
    result["tests"] = run_tests(scratch, environment, timeout_s=max(left - BENCHMARK_S, 30))
    result["benchmark"] = {"ran": False, "why": "no CUDA device"}
    if result["machine"]["cuda"].get("devices"):
        left = deadline - time.perf_counter()
        result["benchmark"] = run_benchmark(environment, timeout_s=max(left, 30))
    return result


def main() -> int:
    """Checks, writes the JSON, says the verdict."""
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__)
    parser.add_argument("--wheels", type=Path, help="a folder of wheels for what the image lacks")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu_check.json"), help="where the JSON goes"
    )
    options = parser.parse_args()
    if options.wheels and not options.wheels.is_dir():
        parser.error(f"--wheels {options.wheels}: no such folder")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        result = check(options.wheels, Path(scratch))
    code, result["verdict"] = verdict(result)
    result["passed"] = code == PASSED
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['verdict']}\n{options.out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
