"""What widths by tensor cost in held-out loss: chosen by the weights' errors alone, or weighed by a text, beside one width.

    python -m benchmarks.mixed [--targets 3.5 4.5] [--uniform 3 4] [--json out.json]

The choices are those of `ssdtune pack --target_bpw X [--text FILE]`, made by the same functions, embedding and head
counted; so are the codes. The text that weighs is the quickstart's training text, the loss that of the text kept out of
it (`held_out.py`), of SmolLM2 as `off_grid.py` left it: weights that were never quantized.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import ssdtune
from benchmarks.held_out import language_model
from benchmarks.machine import describe, print_result
from benchmarks.off_grid import off_grid_model, tensors_of
from ssdtune.assets import prepare_text
from ssdtune.cache import cache_folder
from ssdtune.fidelity.fisher import fisher
from ssdtune.fidelity.text import load_text
from ssdtune.kernels.affine import Affine
from ssdtune.kernels.quantize import decoded
from ssdtune.kernels.quantize_affine import quantize_affine
from ssdtune.packing.errors import Sampled, affine, sampled_errors
from ssdtune.packing.layout import Group, groups_of
from ssdtune.packing.mixed import shares, weights_of, within
from ssdtune.visit.build import MetaModel, build_meta

GROUP = 64
Chosen = Sequence[Group]


class Codes:
    """The source's matrices and what they come back as, encoded once for each format that is asked for."""

    def __init__(self, folder: Path) -> None:
        self.source = {n: t.float() for n, t in tensors_of(folder)}
        self._made: dict[tuple[str, Affine], dict[str, torch.Tensor]] = {}

    def decoded(self, name: str, format: Affine) -> torch.Tensor:
        """float32, of the tensor's shape."""
        weight = self.source[name]
        if (name, format) not in self._made:
            self._made[name, format] = quantize_affine(
                weight, format.order, format.group, is_nested=format.is_nested
            )
        return decoded(format, self._made[name, format], tuple(weight.shape))

    @torch.no_grad()
    def put(self, model: torch.nn.Module, chosen: Chosen) -> None:
        """Gives the model what the packed files stand for."""
        formats = {name: format for group in chosen for name, format in group.formats.items()}
        for name, parameter in model.named_parameters():
            format = formats.get(name)
            parameter.copy_(
                self.decoded(name, format) if isinstance(format, Affine) else self.source[name]
            )


def fisher_of(folder: Path, meta: MetaModel) -> Mapping[str, float]:
    """Mean Fisher information of all tensors, on the training text."""
    text, _ = prepare_text(cache_folder())
    rows = load_text(str(text), str(folder))
    model: Any = ssdtune.stream(folder, micro_batch_size=1)
    try:
        return fisher(model, meta, rows)
    finally:
        model.ssdtune.close()


def choices(
    meta: MetaModel,
    found: Mapping[str, Sampled],
    fisher: Mapping[str, float],
    targets: Sequence[float],
) -> Iterator[tuple[str, Chosen]]:
    """Name and formats of each way to reach each target."""
    groups = groups_of(meta, affine(2, GROUP))
    for target in targets:
        for words, given in (("errors of weights", None), ("weighed by gradients", fisher)):
            weights = weights_of(groups, found, given)
            yield f"{target:g}, {words}", within(groups, target, GROUP, found, weights)


def bits_per_weight(chosen: Chosen, num_weights: int) -> float:
    """Scales and what stays as it is counted, headers not."""
    return 8 * sum(group.num_bytes for group in chosen) / num_weights


def main() -> None:
    """Prints a row as it comes; the last line is JSON."""
    parser = argparse.ArgumentParser(description="Held-out loss of widths by tensor.")
    parser.add_argument("--targets", type=float, nargs="+", default=[3.5, 4.5])
    parser.add_argument("--uniform", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    folder = off_grid_model()
    meta, codes = build_meta(folder), Codes(folder)
    num_weights = sum(t.numel() for t in codes.source.values())
    model, loss = language_model(folder)
    groups = groups_of(meta, affine(2, GROUP))
    found = sampled_errors(groups, GROUP)
    ways: list[tuple[str, Chosen]] = [
        (f"{bits} bits", groups_of(meta, affine(bits, GROUP))) for bits in asked.uniform
    ]
    ways += list(choices(meta, found, fisher_of(folder, meta), asked.targets))
    with torch.no_grad():
        whole = loss()
    print(f"{folder.name}: {whole:.4f} with all bits", flush=True)
    rows: list[dict[str, Any]] = []
    for name, chosen in ways:
        codes.put(model, chosen)
        with torch.no_grad():
            row = {
                "way": name,
                "bits_per_weight": bits_per_weight(chosen, num_weights),
                "loss": loss(),
                "shares": shares(chosen),
            }
        rows.append(row)
        print(told(row, whole), flush=True)
    machine = describe(folder, num_threads=torch.get_num_threads())
    print_result({"model": folder.name, "loss": whole, "rows": rows, **machine}, asked.json)


def told(row: dict[str, Any], whole: float) -> str:
    """A row as printed."""
    of_each = ", ".join(f"{words} {share:.1%}" for words, share in row["shares"].items())
    return (
        f"{row['bits_per_weight']:6.3f} {row['loss']:8.4f} {row['loss'] / whole - 1:+8.2%}  {row['way']}"
        f" ({of_each})"
    )


if __name__ == "__main__":
    main()
