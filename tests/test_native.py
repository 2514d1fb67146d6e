"""The C library: built into a wheel or compiled once, taken where it is what these sources make, and said where not."""

import functools
import os
import select
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from ssdtune.kernels import compiling, native
from ssdtune.kernels.checksum import checksum
from ssdtune.kernels.compiling import compile_into, library_name
from ssdtune.kernels.native import SlowKernelsWarning, live

ROOT = Path(__file__).parent.parent
CONTENT = torch.arange(100_003).to(torch.uint8)
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, compiling.COMPILERS)), reason="there is no compiler here"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one. The library is of one source, for any processor, not optimized: a moment's work."""
    monkeypatch.setattr(compiling, "SOURCES", ("checksum.c",))
    monkeypatch.setattr(compiling, "FLAGS", ("-std=c11", "-fPIC"))
    monkeypatch.setattr(compiling, "VARIANTS", {})
    monkeypatch.setattr(native, "FOLDER", tmp_path / "package")
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_found", functools.cache(native._found.__wrapped__))
    return tmp_path / "cache"


def compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Makes this the only compiler that is found; $REAL is the real one."""
    real = next(filter(None, map(shutil.which, compiling.COMPILERS)), "")
    folder.mkdir()
    (folder / "gcc").write_text(f"#!/bin/sh\nPATH={os.environ['PATH']}\nREAL={real}\n{script}\n")
    (folder / "gcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))


# ------------------------------------------------------------------------------------ taken


@needs_compiler
def test_what_came_with_the_wheel_is_taken(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = compile_into(native.FOLDER)
    no_compiler(tmp_path / "bin", monkeypatch)
    found = live()
    assert found.reason == "built into the package"
    assert found.library is not None
    assert found.library.path == built
    assert found.library.suffixes == ("_plain",)
    assert checksum(CONTENT) == checksum(CONTENT, suffix="")
    assert not cache.exists()
    assert os.listdir(native.FOLDER) == [built.name]


@needs_compiler
@pytest.mark.parametrize(
    ("name", "value"), [("ABI", 0), ("FLAGS", ("-std=gnu11", "-fPIC")), ("HEADERS", ("native.h",))]
)
def test_what_was_made_of_something_else_is_compiled_anew(
    name: str, value: object, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(compiling, name, value)
        compile_into(native.FOLDER)
    found = live()
    assert found.reason == "compiled here"
    assert found.library is not None
    assert found.library.path == cache / library_name()
    assert checksum(CONTENT) == checksum(CONTENT, suffix="")


@needs_compiler
@pytest.mark.parametrize("folder", ["package", "cache"])
def test_what_cannot_be_loaded_is_compiled_anew(folder: str, tmp_path: Path) -> None:
    """As on a system with another C library, or after a power cut."""
    (tmp_path / folder).mkdir()
    (tmp_path / folder / library_name()).write_bytes(b"\x7fELF of somebody else")
    assert live().reason == "compiled here"
    assert checksum(CONTENT) == checksum(CONTENT, suffix="")


@pytest.mark.parametrize("name", compiling.COMPILERS)
def test_a_library_needs_the_c_library_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (shutil.which(name) and shutil.which("readelf")):
        pytest.skip(f"there is no {name} or no readelf here")
    monkeypatch.setattr(compiling, "COMPILERS", (name,))
    assert needed_by(compile_into(tmp_path)) <= {"libc.so.6"}


def needed_by(library: Path) -> set[str]:
    """Names of the libraries that it is linked to."""
    said = subprocess.check_output(["readelf", "-d", library], text=True)
    lines = [line for line in said.splitlines() if "(NEEDED)" in line]
    return {line.split("[")[1].rstrip("]") for line in lines}


@needs_compiler
def test_what_is_compiled_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = live().library
    native._found.cache_clear()
    no_compiler(tmp_path / "bin", monkeypatch)
    second = live().library
    assert first is not None
    assert second is not None
    assert first is not second
    assert first.path == second.path


@needs_compiler
def test_processes_compile_it_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(
        tmp_path / "bin", monkeypatch, f'echo x >>{tmp_path}/calls; sleep 0.3; exec $REAL "$@"'
    )
    code = (
        "from ssdtune.kernels import compiling, native\n"
        "compiling.SOURCES, compiling.VARIANTS = ('checksum.c',), {}\n"
        "print(native.live().reason)"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(3)
    ]
    assert [run.communicate(timeout=60)[0].strip() for run in runs] == ["compiled here"] * 3
    assert (tmp_path / "calls").read_text().split() == ["x", "x"]  # one source, one library
    assert {path.suffix for path in cache.iterdir()} == {".so", ".lock"}


# ------------------------------------------------------------------------------------- said


def warned() -> str:
    """What is said where there is no library: once, however often it is asked for."""
    with pytest.warns(SlowKernelsWarning) as warnings:
        found = [native.library() for _ in range(3)]
    assert found == [None] * 3
    [only] = warnings
    assert checksum(CONTENT) == checksum(CONTENT, suffix="")
    return str(only.message)


def test_a_missing_compiler_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_compiler(tmp_path / "bin", monkeypatch)
    message = warned()
    assert "no C compiler was found" in message
    assert "Install gcc" in message


@needs_compiler
def test_a_compiler_that_takes_too_long_is_said(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = tmp_path / "alive"
    os.mkfifo(alive)
    ends = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    os.close(os.open(alive, os.O_WRONLY))
    compiler(tmp_path / "bin", monkeypatch, f"exec 9>{alive}; sleep 600; true")
    monkeypatch.setattr(compiling, "BUILD_S", 0.2)
    message = warned()
    assert "gcc was not done with checksum.c after 0.2 s" in message
    assert "`ssdtune doctor`" in message
    # Nothing that it started goes on: a pipe is at its end when the last who may write to it has ended.
    assert select.select([ends], [], [], 30)[0]
    assert os.read(ends, 1) == b""
    os.close(ends)
    assert {path.suffix for path in cache.iterdir()} == {".lock"}


def test_a_compiler_that_fails_is_said(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tmp_path / "bin", monkeypatch, "echo fatal: no such option >&2; exit 1")
    message = warned()
    assert "gcc failed on checksum.c: fatal: no such option" in message
    assert str(tmp_path / "bin" / "gcc") in message
    assert {path.suffix for path in cache.iterdir()} == {".lock"}


def test_a_cache_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SSDTUNE_CACHE", str(tmp_path / "file" / "cache"))
    message = warned()
    assert f"{tmp_path}/file/cache: Not a directory (ENOTDIR)" in message
    assert "SSDTUNE_CACHE" in message


@needs_compiler
def test_a_compiler_that_takes_long_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler(tmp_path / "bin", monkeypatch, 'sleep 0.5; exec $REAL "$@"')
    monkeypatch.setattr(compiling, "PROGRESS_S", 0.1)
    assert live().library is not None
    assert "ssdtune compiles its C code, once: 0 of 1 files" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ wheels


def wheel(tmp_path: Path) -> tuple[Path, str]:
    """Built as pip does, from a copy of the sources; and what was said."""
    pytest.importorskip("setuptools.command.bdist_wheel")
    tree = tmp_path / "tree"
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ssdtune", tree / "ssdtune", ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    code = f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r})"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    [made] = tmp_path.glob("*.whl")
    return made, run.stdout + run.stderr


def test_a_wheel_without_a_compiler_is_for_any_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_compiler(tmp_path / "bin", monkeypatch)
    made, said = wheel(tmp_path)
    assert made.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(made).namelist()
    assert {"ssdtune/kernels/checksum.c", "ssdtune/kernels/native.h"} <= set(names)
    assert not any(name.endswith(".so") for name in names)
    assert "no compiled C code in this build, for no C compiler was found. Install gcc." in said


@pytest.mark.slow  # compiles all sources
@needs_compiler
def test_a_wheel_carries_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = wheel(tmp_path)
    assert "-py3-none-linux_" in made.name
    zipfile.ZipFile(made).extractall(tmp_path / "site")
    [library] = (tmp_path / "site" / "ssdtune" / "kernels").glob("kernels-*.so")
    if shutil.which("readelf"):
        assert needed_by(library) == {"libc.so.6"}
    no_compiler(tmp_path / "bin", monkeypatch)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    code = (
        "import torch\n"
        "from ssdtune.kernels import checksum, native\n"
        "print(native.live().reason, native.library().path, sep=chr(10))\n"
        "print(checksum.checksum(torch.arange(100_003).to(torch.uint8)))"
    )
    said = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path)
    assert said.splitlines() == [
        "built into the package", str(library), str(checksum(CONTENT, suffix=""))
    ]  # fmt: skip
