"""Structs of the C sources for ctypes, read from the sources: a field stands once, in C.

What C code takes is always a pointer to a struct. The sources lie beside this file wherever the package is installed,
since they may have to be compiled there.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

NUMBERS: dict[str, Any] = {
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "uint32_t": ctypes.c_uint32,
    "float": ctypes.c_float,
}
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_QUALIFIER = re.compile(r"\b(const|struct)\b")
_DECLARATOR = re.compile(r"([*\s]*)(\w+)(?:\[(\w+)\])?\s*")


@cache
def struct(name: str, source: str) -> type[ctypes.Structure]:
    """`struct name` of that source, its fields of the same names. Pointers are addresses; an array takes a tuple."""
    text = _COMMENT.sub("", (Path(__file__).parent / source).read_text())
    found = re.search(rf"\bstruct {name} {{(.*?)}};", text, re.DOTALL)
    assert found, f"{source} has no struct {name}"
    fields = [
        field for line in found[1].split(";") if line.strip() for field in _declared(line, text)
    ]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def _declared(declaration: str, text: str) -> Iterator[tuple[str, Any]]:
    """The fields of one declaration: `const uint8_t *lower, *codes[2]`. text: where an array's size may have its name."""
    kind, declarators = _QUALIFIER.sub("", declaration).split(maxsplit=1)
    for declarator in declarators.split(","):
        parts = _DECLARATOR.fullmatch(declarator)
        assert parts, declaration
        stars, name, size = parts.groups()
        held = ctypes.c_void_p if "*" in stars else NUMBERS[kind]
        yield name, held if size is None else held * _size(size, text)


def _size(size: str, text: str) -> int:
    """Of an array: a number, or the name of a constant that an enum gives it."""
    if size.isdigit():
        return int(size)
    found = re.search(rf"\b{size} = (\d+)", text)
    assert found, f"{size} is no constant of the same file"
    return int(found[1])
