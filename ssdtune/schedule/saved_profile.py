"""Profiles read back from the plain values that they were saved as, or that somebody wrote: every entry is checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ssdtune.schedule.curve import (
    Curve,
    ProfileError,
    curve_from,
    curves_from,
    is_positive,
    mapping,
)
from ssdtune.schedule.products import Grid
from ssdtune.schedule.profile import InModel, Profile
from ssdtune.sizes import SizeError, parse_size


def profile_from(content: Any, where: str) -> Profile:
    """The profile that a mapping holds. `where`: its file. Raises ProfileError naming the entry."""
    entries = mapping(content, where)
    known = {field.name for field in dataclasses.fields(Profile)} - {"refit"}
    for key in entries:
        if key not in known:
            names = ", ".join(sorted(known))
            raise ProfileError(
                f"{where}: {key!r} is no entry of a profile: {names}.\n"
                "Measure this machine anew with `ssdtune probe`."
            )
    operators = {
        str(dtype): curves_from(curves, f"{where}: operators.{dtype}")
        for dtype, curves in mapping(entries.get("operators"), f"{where}: operators").items()
    }
    price: Any = entries.get("price_per_hour")
    if price is not None and not is_positive(price):
        raise ProfileError(f"{where}: price_per_hour is {price!r}; it is in dollars, above 0.")
    optimizer: Any = entries.get("optimizer") or {}
    return Profile(
        price_per_hour=None if price is None else float(price),
        name=str(entries.get("name", where)),
        operators=operators,
        transfers=curves_from(entries.get("transfers"), f"{where}: transfers"),
        decoding=_decoding(entries.get("decoding"), f"{where}: decoding"),
        in_model=_in_model(entries.get("in_model"), f"{where}: in_model"),
        reading_takes=_not_negative(entries, "reading_takes", "seconds a byte", where),
        copy_overlap=_overlap_of(entries, "copy_overlap", where),
        products=_products(entries.get("products"), f"{where}: products"),
        optimizer=curves_from(optimizer, f"{where}: optimizer") if optimizer else {},
        busy_cores=_not_negative(entries, "busy_cores", "cores", where),
        device_bytes=_size_of(entries, "device_bytes", where),
    )


def _optional(found: Any, where: str) -> dict[Any, Any]:
    """Entries that may be left out, or empty."""
    return mapping(found, where) if found else {}


def _not_negative(entries: Mapping[Any, Any], name: str, unit: str, where: str) -> float:
    found: Any = entries.get(name, 0.0)
    if not isinstance(found, int | float) or not 0 <= found < math.inf:
        raise ProfileError(f"{where}: {name} is {found!r}; it is in {unit}, 0 or more.")
    return float(found)


def _overlap_of(entries: Mapping[Any, Any], name: str, where: str) -> float | None:
    found: Any = entries.get(name)
    if found is None:
        return None
    if not is_positive(found) or not 1 <= found <= 2:
        raise ProfileError(
            f"{where}: {name} is {found!r}; it is from 1, two things take turns, to 2, neither slows the other."
        )
    return float(found)


def _size_of(entries: Mapping[Any, Any], name: str, where: str) -> int | None:
    try:
        return parse_size(entries.get(name))
    except SizeError as error:
        raise ProfileError(f"{where}: {name}: {error}") from error


def _decoding(found: Any, where: str) -> dict[str, dict[str, float]]:
    made: dict[str, dict[str, float]] = {}
    for name, factors in _optional(found, where).items():
        for kind, factor in mapping(factors, f"{where}.{name}").items():
            if not is_positive(factor):
                raise ProfileError(
                    f"{where}.{name}.{kind} is {factor!r}; it is a number of times as long, above 0."
                )
            made.setdefault(str(name), {})[str(kind)] = float(factor)
    return made


def _products(found: Any, where: str) -> dict[str, dict[str, Grid]]:
    made: dict[str, dict[str, Grid]] = {}
    for dtype, kinds in _optional(found, where).items():
        grids = made[str(dtype)] = {}
        for kind, grid in mapping(kinds, f"{where}.{dtype}").items():
            grids[str(kind)] = _grid(grid, f"{where}.{dtype}.{kind}")
    return made


def _grid(found: Any, where: str) -> Grid:
    grid: dict[int, Curve] = {}
    for rows, points in mapping(found, where).items():
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise ProfileError(f"{where}: {rows!r} is no number of rows; they are 1 or more.")
        grid[rows] = curve_from(points, f"{where}.{rows}")
    return grid


def _in_model(found: Any, where: str) -> dict[str, InModel]:
    made: dict[str, InModel] = {}
    for dtype, content in _optional(found, where).items():
        each = mapping(content, f"{where}.{dtype}")
        overheads = [each.get(name, 0.0) for name in ("overhead_s", "autograd_overhead_s")]
        unrecorded, its_factor = each.get("no_grad_overhead_s"), each.get("no_grad_factor")
        overheads += [] if unrecorded is None else [unrecorded]
        factor = each.get("factor", 1.0)
        factors = [factor] if its_factor is None else [factor, its_factor]
        if not all(o == 0 or is_positive(o) for o in overheads) or not all(
            map(is_positive, factors)
        ):
            raise ProfileError(
                f"{where}.{dtype}: overheads must be 0 or more and factors above 0, got {each!r:.80}."
            )
        made[str(dtype)] = InModel(
            overhead_s=float(overheads[0]),
            autograd_overhead_s=float(overheads[1]),
            factor=float(factor),
            is_hidden=bool(each.get("is_hidden")),
            no_grad_overhead_s=None if unrecorded is None else float(unrecorded),
            no_grad_factor=None if its_factor is None else float(its_factor),
        )
    return made
