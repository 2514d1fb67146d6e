"""Widths by tensor for a target in bits a weight over the whole model, scales, headers and what stays as it is counted.

The widths are those with the least sum of the tensors' relative squared errors, each weighted (`choice.py`). That the loss
grows, at medium widths, with a weighted sum of layers' relative squared errors is the linearity theorem of Malinovskii
et al. (arXiv 2411.17525), who make this knapsack of it. Their weights want many evaluations of the model. Here the number
of a tensor's elements stands for them, which wants no data; or, with a text, its squares times the mean of its Fisher
information there: then the sum is in proportion to what the loss is expected to grow by (fidelity/fisher.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from ssdtune.kernels.affine import Affine
from ssdtune.packing.choice import Option, choose, smallest
from ssdtune.packing.convert import header_bytes
from ssdtune.packing.errors import WIDTHS, Errors, Sampled, affine, rounded
from ssdtune.packing.layout import Group, PackError, file_parts, part_bytes, shards
from ssdtune.swap.header import TensorEntry

NOT_PACKED = 99  # behind all widths


def weights_of(
    groups: Sequence[Group], found: Mapping[str, Sampled], fisher: Mapping[str, float] | None = None
) -> dict[str, float]:
    """How much the relative error of each tensor that may be packed counts. fisher: mean Fisher information of tensors'
    weights, by name; None: there is no text."""
    sizes = {t.name: math.prod(t.shape) for g in groups for t in g.tensors if t.name in g.formats}
    if fisher is None:
        return {name: float(numel) for name, numel in sizes.items()}
    return {n: fisher[n] * found[n].mean_square * numel for n, numel in sizes.items()}


def within(
    groups: Sequence[Group],
    target_bpw: float,
    group_size: int,
    found: Mapping[str, Sampled],
    weights: Mapping[str, float],
) -> list[Group]:
    """The groups with the formats that are best within the target.

    groups: as `groups_of` makes them for any affine format: what they pack may be packed. Tensors may also stay as they
    are, without an error. found: their errors. weights: as `weights_of` has them. Raises PackError where even the
    smallest is larger, naming its bits a weight, and where all would stay as it is.
    """
    entries = [t for g in groups for t in g.tensors if t.name in g.formats]
    options = [
        _options(entry, group_size, found[entry.name].errors, weights[entry.name])
        for entry in entries
    ]
    num_weights = sum(math.prod(t.shape) for g in groups for t in g.tensors)
    fixed = _fixed_bytes(groups, group_size)
    allowed = target_bpw * num_weights / 8 - fixed
    if not smallest(options) <= allowed:  # NaN neither
        least = math.ceil(800 * (fixed + smallest(options)) / num_weights) / 100
        raise PackError(
            f"--target_bpw {target_bpw:g}: {least:g} bits a weight are the least for this model: {WIDTHS[0]} bits with a "
            f"scale for every {group_size} weights, and what stays as it is.\nGive --target_bpw {least:g} or more."
        )
    chosen = choose(options, int(min(allowed, _most(options))))
    widths = {e.name: WIDTHS[i] for e, i in zip(entries, chosen, strict=True) if i < len(WIDTHS)}
    if not widths:
        stored = 8 * sum(t.num_bytes for g in groups for t in g.tensors) / num_weights
        raise PackError(
            f"--target_bpw {target_bpw:g}: the model has {stored:g} bits a weight, and nothing would be packed.\n"
            "Give fewer."
        )
    return with_widths(groups, widths, group_size)


def with_widths(groups: Sequence[Group], widths: Mapping[str, int], group_size: int) -> list[Group]:
    """The groups with each tensor packed in the bits that it has there; tensors without any stay as they are."""
    return [
        dataclasses.replace(
            g, formats={n: affine(widths[n], group_size) for n in g.formats if n in widths}
        )
        for g in groups
    ]


def widths_in(groups: Sequence[Group]) -> dict[str, int]:
    """What `with_widths` makes the same groups of again."""
    formats = {name: format for group in groups for name, format in group.formats.items()}
    return {name: f.bits for name, f in formats.items() if isinstance(f, Affine)}


def _most(options: Sequence[Sequence[Option]]) -> int:
    """Bytes beyond which nothing can be used."""
    return sum(max(option.num_bytes for option in each) for each in options)


def _options(entry: TensorEntry, group_size: int, errors: Errors, weight: float) -> list[Option]:
    """A width of WIDTHS each, and the tensor as it is."""
    packed = [
        Option(_num_bytes(entry, bits, group_size), rounded(weight * errors[bits]))
        for bits in WIDTHS
    ]
    return [*packed, Option(entry.num_bytes, 0.0)]


def _num_bytes(entry: TensorEntry, bits: int, group_size: int) -> int:
    return sum(part_bytes(part) for part in file_parts(affine(bits, group_size), entry.shape))


def _fixed_bytes(groups: Sequence[Group], group_size: int) -> int:
    """What is not chosen: tensors that are not worth packing, and headers, at their longest."""
    kept = sum(t.num_bytes for g in groups for t in g.tensors if t.name not in g.formats)
    most_parts = max(WIDTHS, key=lambda bits: len(affine(bits, group_size).parts((1,))))
    longest = {
        g.label: dataclasses.replace(
            g, formats=dict.fromkeys(g.formats, affine(most_parts, group_size))
        )
        for g in groups
    }
    # Packed groups fill no more shards than the same ones as they are.
    parted = shards([dataclasses.replace(g, formats={}) for g in groups])
    return kept + sum(header_bytes([longest[g.label] for g in shard]) for shard in parted)


def shares(groups: Sequence[Group]) -> dict[str, float]:
    """Share of the weights that is stored at each width, the narrowest first: {"3 bits": 0.6, …, "as it is": 0.01}."""
    counts: dict[int, int] = {}
    for group in groups:
        for entry in group.tensors:
            format = group.formats.get(entry.name)
            bits = format.bits if isinstance(format, Affine) else NOT_PACKED
            counts[bits] = counts.get(bits, 0) + math.prod(entry.shape)
    total = sum(counts.values())
    words = {bits: f"{bits} bits" if bits != NOT_PACKED else "as it is" for bits in counts}
    return {words[bits]: counts[bits] / total for bits in sorted(counts)}
