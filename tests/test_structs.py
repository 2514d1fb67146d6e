"""Structs that are read from the C sources are laid out as a C compiler lays them out."""

import ast
import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from ssdtune.kernels import structs
from ssdtune.kernels.structs import struct

FOLDER = Path(structs.__file__).parent
STRUCTS = [
    ("affine", "pieces.h"),
    ("direction", "pieces.h"),
    ("noise", "pieces.h"),
    ("checksum", "checksum.c"),
    ("ggml", "ggml.c"),
    ("integers", "integers.c"),
    ("job", "lossless.c"),
    ("nibbles", "unpack.c"),
    ("requantize", "requantize.c"),
    ("unpack_add", "unpack_add.c"),
]


@pytest.mark.parametrize(("name", "source"), STRUCTS)
def test_a_compiler_agrees_on_every_field(name: str, source: str, tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    kind = struct(name, source)
    fields = [field[0] for field in kind._fields_]
    claims = [f"sizeof(struct {name}) == {ctypes.sizeof(kind)}"]
    for field in fields:
        described = getattr(kind, field)
        claims.append(f"offsetof(struct {name}, {field}) == {described.offset}")
        claims.append(f"sizeof(((struct {name} *)0)->{field}) == {described.size}")
    lines = [f'#include "{source}"', "#include <stddef.h>"]
    lines += [f'_Static_assert({claim}, "{name}");' for claim in claims]
    made = tmp_path / "claims.c"
    made.write_text("\n".join(lines) + "\n")
    command = [compiler, "-std=c11", "-fsyntax-only", "-DSUFFIX=_x", f"-I{FOLDER}", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_no_other_struct_is_shared_with_python() -> None:
    """Every `struct("name", "source")` in the package is one of those above."""
    called = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "struct":
                called.add(tuple(ast.literal_eval(argument) for argument in node.args))
    assert called == set(STRUCTS)
