"""Where every parameter of a model comes from: which piece of which file tensor goes where.

A checkpoint and a model name and cut their tensors differently: experts are separate in the files
and one tensor in the model, gate and up are joined, names have another prefix. transformers owns
that mapping. Here its own code runs on tensors without storage (`moves`), and what comes out is
data movement that a slot can be filled by:

    checkpoint = open_checkpoint(folder)
    placements = place(model, checkpoint.tensors)        # model on meta; headers only
    for name, placement in placements.items():           # each parameter, each persistent buffer
        fill(placement, read, out)                       # the reference; swap/ does it in slots

What would need arithmetic (dequantization) is refused by name, and so is a parameter that no file
holds: transformers would fill it with random numbers.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ssdtune.errors import SSDTuneError
from ssdtune.swap.header import TensorEntry
from ssdtune.swap.packed import PackedEntry
from ssdtune.visit.moves import NotAMove, Ranges, Traced, boxes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
CASTABLE = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
NAMES_SHOWN = 5


class PlacementError(SSDTuneError):
    """The files do not hold what the model needs, or not in a form that can be moved in place."""


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """One copy: source[source_slices].reshape(view).permute(permute) -> target[target_slices].

    Slices are (start, stop) per dimension; None means whole, or leave out that step. The permuted
    piece has as many elements as the target region, whose shape it takes. `view` is set only where
    a dimension of the source must be taken apart before it is permuted (rotary halves).
    """

    source: str
    source_slices: Ranges | None = None
    permute: tuple[int, ...] | None = None
    target_slices: Ranges | None = None
    view: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """How the parameter `target` is filled; `pieces` cover each of its elements exactly once."""

    target: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # what the parameter has; the files' dtype is in their TensorEntry
    pieces: tuple[Piece, ...]


class Placements(dict[str, Placement]):
    """By parameter name, in the model's order; tied parameters once, under the first name.

    unused: file tensors that the model has no place for and does not declare as harmless.
    """

    unused: tuple[str, ...] = ()


def place(model: PreTrainedModel, tensors: Mapping[str, TensorEntry | PackedEntry]) -> Placements:
    """Say for every parameter and persistent buffer where its elements lie in the files.

    model: on the meta device, as `build_meta` makes it. Reads no file. A parameter that may be
    absent (`_keys_to_ignore_on_load_missing`) and is absent keeps the value it has in the model.
    Notes the conversions used on the model, as `from_pretrained` does, for `save_pretrained`.
    Raises PlacementError where a tensor is missing, has another shape, or would need arithmetic.
    """
    needed: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    routes, unused = _routes(model, tensors, needed)
    traced = {name: _run(route, model, tensors) for name, route in routes.items()}
    first_names = _first_names(needed)
    made = {}
    for outcome in traced.values():
        for name, tensor in outcome.items():
            if name in needed:
                made.setdefault(first_names[name], (name, tensor))
    _check_missing(model, [n for n in needed if first_names[n] == n and n not in made])
    placements = Placements()
    for name in needed:
        if name in made:
            found_as, tensor = made[name]
            _check_sources(name, needed[name], (found_as, tensor), tensors)
            placements[name] = _placement(name, needed[name], tensor, tensors)
    placements.unused = tuple(unused)
    return placements


def plain_targets(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Model names of those file tensors that are only renamed: {model name: file name}."""
    needed = model.state_dict(keep_vars=True)
    routes, _ = _routes(model, dict.fromkeys(names), needed)
    return {name: route.sources[0] for name, route in routes.items() if route.converter is None}


# The reference executor, and what a faster one may ask


def fill(placement: Placement, read: Callable[[str], torch.Tensor], out: torch.Tensor) -> None:
    """Fill `out` (of the placement's shape; any dtype: values are cast) from file tensors.

    read: gives a file tensor by name, in the shape it is stored in.
    """
    for piece in placement.pieces:
        source = sliced(read(piece.source), piece.source_slices)
        if piece.view is not None:
            source = source.reshape(piece.view)
        if piece.permute is not None:
            source = source.permute(piece.permute)
        region = sliced(out, piece.target_slices)
        with torch.no_grad():
            region.copy_(source.reshape(region.shape))


def sliced(tensor: torch.Tensor, slices: Ranges | None) -> torch.Tensor:
    """tensor[a:b, c:d, …]; the tensor itself for None."""
    return tensor if slices is None else tensor[tuple(slice(a, b) for a, b in slices)]


def is_identity(placement: Placement, entries: Mapping[str, TensorEntry | PackedEntry]) -> bool:
    """Whether the parameter is one file tensor as it lies: it can be a view of the file's bytes."""
    if len(placement.pieces) != 1:
        return False
    entry = entries[placement.pieces[0].source]
    if isinstance(entry, PackedEntry):
        return False
    is_whole = placement.pieces[0] == Piece(entry.name)
    same_dtype = FILE_DTYPES.get(entry.dtype) == placement.dtype
    return is_whole and same_dtype and tuple(entry.shape) == placement.shape


# The library's mapping, run on names


@dataclasses.dataclass
class _Route:
    """File tensors on their way to one parameter (or to several: a tensor that is split)."""

    target: str
    converter: Any | None  # transformers' WeightConverter, an own copy; None: only renamed
    sources: list[str] = dataclasses.field(default_factory=list)
    patterns: list[str] = dataclasses.field(default_factory=list)
    dtype: torch.dtype = torch.float32


def _routes(
    model: PreTrainedModel, tensors: Mapping[str, Any], needed: Mapping[str, torch.Tensor]
) -> tuple[dict[str, _Route], list[str]]:
    """Routes by first target, and names that lead nowhere.

    The same walk as transformers.core_model_loading.convert_and_load_state_dict_in_model: sorted by
    `dot_natural_key`, which fixes the order of experts; renamings, then at most one converter.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    routes: dict[str, _Route] = {}
    unused = []
    is_harmless = _harmless_extras(model)
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = _renamed(model, name, (renamings, converters), needed)
        route = routes.get(target)
        is_taken = route is not None and (pattern is None or route.converter is None)
        if target not in needed or is_taken:
            if not is_harmless(target):
                unused.append(name)
            continue
        if route is None:
            converter = None if pattern is None else copy.deepcopy(by_pattern[pattern])
            route = routes[target] = _Route(target, converter, dtype=needed[target].dtype)
        route.sources.append(name)
        route.patterns.append(pattern or name)
    vars(model)["_weight_conversions"] = [t for t in transforms if t.was_used()]
    return routes, unused


def _renamed(
    model: PreTrainedModel, name: str, transforms: tuple[list, list], needed: Mapping[str, Any]
) -> tuple[str, str | None]:
    """The parameter a file tensor goes to, and the converter's pattern that it matched, if any."""
    from transformers.core_model_loading import rename_source_key

    prefix = model.base_model_prefix
    target, pattern = rename_source_key(name, *transforms, prefix, needed)  # type: ignore[arg-type]
    if target not in needed and name in needed:  # named as in the model already
        return rename_source_key(name, [], [], prefix, needed)  # type: ignore[arg-type]
    return target, pattern


def _harmless_extras(model: PreTrainedModel) -> Callable[[str], bool]:
    """Which names the model class expects to find in files without using them.

    Beside what the class says: tables that older releases of the library saved as buffers.
    """
    patterns: set[str] = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda name: any(pattern.search(name) for pattern in compiled)


def _run(
    route: _Route, model: PreTrainedModel, tensors: Mapping[str, TensorEntry | PackedEntry]
) -> dict[str, Traced]:
    """Lets the library's converter work on traced tensors: {parameter: what it is made of}."""
    entries = [tensors[name] for name in route.sources]
    # The library casts on reading, before it converts, so traced tensors have the final dtype.
    sources = [Traced.of(entry.name, entry.shape, route.dtype) for entry in entries]
    if route.converter is None:
        return {route.target: sources[0]}
    for entry, pattern, tensor in zip(entries, route.patterns, sources, strict=True):
        route.converter.add_tensor(route.target, entry.name, pattern, tensor)
    try:
        made = route.converter.convert(route.target, model=model, config=model.config)
        made = {name: x[0] if isinstance(x, list) else x for name, x in made.items()}
    except NotAMove as error:
        raise PlacementError(
            f"{_some(route.sources)} cannot be moved into {route.target} as stored: {error}.\n"
            "Convert the checkpoint once: load it with transformers and save_pretrained it."
        ) from error
    except (ValueError, IndexError, KeyError, RuntimeError, AttributeError) as error:
        shapes = {tuple(entry.shape) for entry in entries}
        raise PlacementError(
            f"{_some(route.sources)} (shapes {_shown(shapes)}) do not make up {route.target}:\n"
            f"{error}"
        ) from error
    return made


# From traced tensors to placements


def _check_sources(
    name: str,
    parameter: torch.Tensor,
    found: tuple[str, torch.Tensor],
    tensors: Mapping[str, TensorEntry | PackedEntry],
) -> None:
    """What was found for a parameter is moved, has its shape, and needs at most a plain cast."""
    found_as, traced = found
    if not isinstance(traced, Traced):
        raise PlacementError(f"{found_as} is computed by its conversion, not moved from the files.")
    sources = traced.sources
    if traced.shape != parameter.shape:
        files = sorted({tensors[source].path.name for source in sources})
        raise PlacementError(
            f"{name} has shape {list(parameter.shape)} in the model, but {list(traced.shape)} in "
            f"the files\n({_some(sources)} in {_some(files)}).\n"
            "The config is not this checkpoint's, or a tensor is missing."
        )
    for source in sources:
        _check_dtype(name, parameter.dtype, tensors[source])


def _placement(
    name: str,
    parameter: torch.Tensor,
    traced: Traced,
    tensors: Mapping[str, TensorEntry | PackedEntry],
) -> Placement:
    shape = tuple(parameter.shape)
    try:
        pieces = tuple(_pieces(traced, shape, tensors))
    except NotAMove as error:
        sources = _some(traced.sources)
        raise PlacementError(f"{sources} cannot be moved into {name}: {error}.") from error
    return Placement(target=name, shape=shape, dtype=parameter.dtype, pieces=pieces)


def _pieces(
    traced: Traced, shape: tuple[int, ...], tensors: Mapping[str, TensorEntry | PackedEntry]
) -> Iterable[Piece]:
    whole_target = tuple((0, n) for n in shape)
    for box in boxes(traced):
        whole_source = tuple((0, n) for n in tensors[box.source].shape)
        yield Piece(
            source=box.source,
            source_slices=None if box.slices == whole_source else box.slices,
            permute=box.order,
            target_slices=None if box.region == whole_target else box.region,
            view=box.view,
        )


def _check_dtype(name: str, dtype: torch.dtype, entry: TensorEntry | PackedEntry) -> None:
    """Between the plain float formats the copy casts; anything else would need a scale."""
    stored = FILE_DTYPES.get(entry.dtype)
    if stored == dtype or (stored in CASTABLE and dtype in CASTABLE):
        return
    raise PlacementError(
        f"{entry.name} in {entry.path.name} holds {entry.dtype} values, {name} needs {dtype}.\n"
        "This looks like a quantized checkpoint whose config.json lacks its quantization_config.\n"
        "Use the config.json that belongs to it, or the unquantized model, by `ssdtune pack`."
    )


def _first_names(needed: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For each name the first one of the same tensor: tied parameters have several."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in needed.items()}


def _check_missing(model: PreTrainedModel, missing: Sequence[str]) -> None:
    """Absent is fine only for what the class declares so, and what has a value without the files."""
    may_be_absent = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
    state = model.state_dict(keep_vars=True)
    absent = [
        name
        for name in missing
        if state[name].is_meta or not any(p.search(name) for p in may_be_absent)
    ]
    if absent:
        count = "1 tensor" if len(absent) == 1 else f"{len(absent)} tensors"
        raise PlacementError(
            f"{count} that the model needs found in no file: {_some(absent)}.\n"
            "The download may be incomplete, or the config is not this checkpoint's."
        )


def _some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:NAMES_SHOWN])
    more = len(names) - NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _shown(shapes: Iterable[tuple[int, ...]]) -> str:
    return ", ".join(str(list(shape)) for shape in sorted(shapes))
