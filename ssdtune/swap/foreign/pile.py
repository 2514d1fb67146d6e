"""The tensors of a quantized checkpoint, while they are put together to the weights that they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import torch

from ssdtune.kernels.formats import Format, num_elements
from ssdtune.swap.header import TensorEntry, opened, pread_exactly, quoted, refuse
from ssdtune.swap.packed import PackedEntry

FLOATS: Final = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
FLOAT_DTYPES: Final = tuple(FLOATS.values())
NARROW: Final = (
    "F4",
    "F6_",
    "F8_",
)  # dtypes that no model computes in: such a tensor needs a scale
READABLE: Final = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F32": torch.float32,
}
MAX_READ_BYTES: Final = 1 << 24  # of one small tensor that decides on a format
OTHER_MODEL: Final = (
    "Nothing was loaded. Use the model as its author published it, or the unquantized one."
)


class Pile:
    """Tensors by name. What is found for a weight is taken; what is left at the end passes through."""

    def __init__(self, tensors: Mapping[str, TensorEntry], config_path: Path) -> None:
        self.config_path = config_path
        self._tensors = tensors
        self._taken: set[str] = set()
        self._made: dict[str, PackedEntry] = {}  # by the name of the first part

    def bases(self, suffix: str) -> list[str]:
        """What stands before the suffix in names of tensors that are left, in the files' order."""
        return [name.removesuffix(suffix) for name in self.left if name.endswith(suffix)]

    @property
    def left(self) -> list[str]:
        """Names of tensors that nothing has taken yet, in the files' order."""
        return [name for name in self._tensors if name not in self._taken]

    def find(self, name: str) -> TensorEntry | None:
        """Takes the tensor, if it is there."""
        self._taken.add(name)
        return self._tensors.get(name)

    def look(self, name: str) -> TensorEntry | None:
        """The tensor, if it is there, not taken."""
        return self._tensors.get(name)

    def take(
        self, name: str, *, of: str, rank: int | None = None, dtypes: Collection[str] | None = None
    ) -> TensorEntry:
        """Takes the tensor; refuses the weight `of` where it is missing, or has another number of dimensions or dtype."""
        found = self.find(name)
        if found is None:
            near = next((t for n, t in self._tensors.items() if n.startswith(of + ".")), None)
            refuse(
                near.path if near else self.config_path, f"{quoted(name)} is missing.", tensor=of
            )
        if rank is not None and len(found.shape) != rank:
            refuse(
                found.path, f"it has shape {list(found.shape)}, not {rank} dimensions.", tensor=name
            )
        if dtypes is not None and found.dtype not in dtypes:
            refuse(found.path, f"it is {found.dtype}, not {' or '.join(dtypes)}.", tensor=name)
        return found

    def drop(self, *suffixes: str) -> None:
        """Takes tensors that serve nothing here, by the ends of their names."""
        self._taken.update(name for name in self._tensors if name.endswith(suffixes))

    def values(self, entry: TensorEntry) -> torch.Tensor:
        """The data of a small tensor. Refuses one that is not small, and dtypes that are not of READABLE."""
        if entry.dtype not in READABLE:
            self._refuse_to_read(entry)
        raw = self._read(entry)
        if not raw:
            return torch.empty(entry.shape, dtype=READABLE[entry.dtype])
        return torch.frombuffer(bytearray(raw), dtype=READABLE[entry.dtype]).view(entry.shape)

    def is_zero(self, entry: TensorEntry) -> bool:
        """Whether all elements of a small tensor are 0, whatever its dtype. Refuses one that is not small."""
        raw = self._read(entry)
        return raw.count(0) == len(raw)

    def _read(self, entry: TensorEntry) -> bytes:
        if entry.num_bytes > MAX_READ_BYTES:
            self._refuse_to_read(entry)
        with opened(entry.path) as fd:
            return pread_exactly(entry.path, fd, entry.num_bytes, entry.start)

    def _refuse_to_read(self, entry: TensorEntry) -> NoReturn:
        refuse(
            entry.path,
            f"{entry.dtype} {list(entry.shape)} is not what it should be.",
            tensor=entry.name,
        )

    def groups_of(self, entry: TensorEntry, width: int, group: int, num: int) -> bool:
        """Whether a g_idx says something: False where column i is in group i // group.

        Refuses one that is not int32 [width], or names a group that is not one of `num`.
        """
        if (entry.dtype, entry.shape) != ("I32", (width,)):
            refuse(
                entry.path,
                f"{entry.dtype} {list(entry.shape)} does not say which of its groups each of {width} columns is in.",
                tensor=entry.name,
            )
        numbers = self.values(entry)
        if bool(((numbers < 0) | (numbers >= num)).any()):
            refuse(entry.path, f"it names groups that are not one of {num}.", tensor=entry.name)
        return not torch.equal(numbers.long(), torch.arange(width) // group)

    def put(
        self,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        format: Format,
        entries: Sequence[TensorEntry],
    ) -> None:
        """A weight is found. entries: as `format.parts` says, but for dimensions of 1 at the end, which are brought to
        what it says.

        Refuses entries that are of another dtype or shape, and a weight without elements or there twice.
        """
        if not num_elements(shape):
            refuse(entries[0].path, f"shape {list(shape)} has no element.", tensor=name)
        if name in self._tensors and name not in self._taken:
            refuse(self._tensors[name].path, "it is there both quantized and not.", tensor=name)
        parts: list[TensorEntry] = []
        for part, entry in zip(format.parts(shape), entries, strict=True):
            if entry.dtype != part.dtype or not is_alike(entry.shape, part.shape):
                refuse(
                    entry.path,
                    f"{quoted(entry.name)} is {entry.dtype} {list(entry.shape)}; {format.label} of shape "
                    f"{list(shape)} needs {part.dtype} {list(part.shape)}.",
                    tensor=name,
                    way_out=OTHER_MODEL,
                )
            parts.append(dataclasses.replace(entry, shape=part.shape))
        made = PackedEntry(name, entries[0].path, dtype, shape, format, tuple(parts))
        self._made[entries[0].name] = made

    def result(self) -> dict[str, TensorEntry | PackedEntry]:
        """Weights in the place of their first part, and what is left. Refuses what is left of narrow dtypes."""
        result: dict[str, TensorEntry | PackedEntry] = {}
        for name, entry in self._tensors.items():
            if name in self._made:
                made = self._made[name]
                result[made.name] = made
            elif name not in self._taken:
                if entry.dtype.startswith(NARROW):
                    refuse(
                        entry.path,
                        f"{entry.dtype} without a scale.",
                        tensor=name,
                        way_out=OTHER_MODEL,
                    )
                result[name] = entry
        return result

    def refuse_left(self, *suffixes: str) -> None:
        """Refuses parts of quantized weights that belong to none that was found."""
        for name in self.left:
            if name.endswith(suffixes):
                refuse(
                    self._tensors[name].path,
                    "the quantized weight that it belongs to is not there.",
                    tensor=name,
                    way_out=OTHER_MODEL,
                )

    def refuse_config(self, what: str) -> NoReturn:
        """Refuses what quantization_config says."""
        refuse(self.config_path, f"its quantization_config {what}.", way_out=OTHER_MODEL)

    def integer(
        self, config: Mapping[str, Any], key: str, allowed: Collection[int], default: Any = None
    ) -> int:
        """A whole number of the config that is one of those allowed."""
        value = config.get(key, default)
        if type(value) is not int or value not in allowed:
            shown = ", ".join(map(str, allowed)) if len(allowed) < 10 else "such a number"
            self.refuse_config(f"has {key} {quoted(value)}; {shown} is supported")
        return value


def is_alike(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether shapes are the same but for dimensions of 1 at their ends: (n), (n, 1)."""
    stripped: list[list[int]] = []
    for shape in (one, other):
        last = max((i for i, n in enumerate(shape) if n != 1), default=-1)
        stripped.append(list(shape[: last + 1]))
    return stripped[0] == stripped[1]


def flat(entry: TensorEntry) -> TensorEntry:
    """The same bytes in one dimension."""
    return dataclasses.replace(entry, shape=(num_elements(entry.shape),))


def weight_dtype(config: Mapping[str, Any], scale: str) -> str:
    """The dtype of a weight as safetensors names it: what the config says, else that of its scales, else bfloat16:
    scales of float32 do not mean that the model is."""
    stated = FLOATS.get(
        str(config.get("torch_dtype") or config.get("dtype")).removeprefix("torch.")
    )
    return stated or (scale if scale in ("BF16", "F16") else "BF16")
