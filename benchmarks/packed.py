"""A LoRA step that waits for the drive: plain files against the same model packed, read at the same slowed rate.

    python benchmarks/packed.py [--model FOLDER] [--bits 4] [--rows 1] [--length 64] [--slowness 3] [--rounds 5]

The rate makes the packed model's reading `slowness` times as long as its step with the reader free. What packing can
gain is then the ratio of the bytes read; the bar is 0.95 of it. Also printed: losses beside those of training in memory
on the decoded weights, which must be equal, bits a weight, and what decoding took of a core. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import inputs, machine, measures  # noqa: E402
from benchmarks.contest import Entrant, take_turns  # noqa: E402

BYTES_BAR = 0.95  # speed-up / ratio of the bytes read


def say(line: str) -> None:
    """For whoever watches."""
    print(line, flush=True)


def packed_twins(model: Path, options: argparse.Namespace, scratch: Path) -> tuple[Path, Path, Any]:
    """The model packed, the weights that it stands for as plain files, and what packing says."""
    from ssdtune.packing.convert import pack
    from ssdtune.packing.layout import groups_of
    from ssdtune.packing.wanted import Wanted
    from ssdtune.swap.storage import choose_storage
    from ssdtune.visit.build import build_meta

    meta = build_meta(model)
    wanted = Wanted(bits=options.bits) if options.format == "affine" else Wanted(options.format)
    packed, plain = scratch / "packed", scratch / "plain"
    groups = groups_of(meta, wanted.chosen())
    done = pack(meta, groups, packed, storage=choose_storage(model).storage)
    write_decoded(packed, plain)
    return packed, plain, done


def write_decoded(packed: Path, plain: Path) -> None:
    """The weights that a packed folder stands for, in float32, as from_pretrained reads them."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from ssdtune.kernels.unpack import unpack
    from ssdtune.swap.beside import copy_beside
    from ssdtune.swap.packed import PackedEntry
    from ssdtune.visit.build import build_meta

    plain.mkdir()
    values: dict[str, Any] = {}
    for name, entry in build_meta(packed).checkpoint.tensors.items():
        parts = entry.parts if isinstance(entry, PackedEntry) else (entry,)
        with safe_open(entry.path, "pt") as file:
            found = [file.get_tensor(part.name) for part in parts]
        if isinstance(entry, PackedEntry):
            values[name] = torch.empty(entry.shape)
            unpack(entry.format, found, values[name])
        else:
            values[name] = found[0].float()
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    copy_beside(packed, plain)
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Runs all three; what came out."""
    model = inputs.in_dtype(options.model, "bfloat16", say)
    packed, plain, done = packed_twins(model, options, scratch)
    batch, told = inputs.token_batch(model, options.rows, options.length)
    common = {
        "batch": batch,
        "dtype": "float32",
        "threads": options.threads,
        "seed": 0,
        "learning_rate": 1e-4,
        "lora_rank": 16,
        "micro_rows": options.rows,
        "prefetch": 2,
        "chunk_tokens": 4096,
    }
    entrants = {
        "in memory, decoded": {"kind": "memory", "what": "lora", "model": str(plain), **common},
        "plain files": {"kind": "ours", "throttled": True, "model": str(model), **common},
        "packed": {"kind": "ours", "throttled": True, "model": str(packed), **common},
    }
    started = {name: Entrant(name, spec, scratch=scratch) for name, spec in entrants.items()}
    try:
        for entrant in started.values():
            entrant.wait_ready()
        for _ in range(2):
            warm = {name: e.step(counts=False) for name, e in started.items()}
        slow = warm["packed"]["planned_bytes"] / (options.slowness * warm["packed"]["seconds"])
        for name in ("plain files", "packed"):
            started[name].set(bytes_per_s=slow)
            started[name].step(counts=False)
        take_turns(list(started.values()), options.rounds, say)
        for entrant in started.values():
            entrant.finish()
    finally:
        for entrant in started.values():
            entrant.kill()
    return {
        **machine.describe(model, num_threads=options.threads),
        "tokens": told,
        "bytes_per_s": slow,
        "packed": {"bytes": done.num_bytes, "bits_per_weight": done.bits_per_weight},
        **report(started),
    }


def report(started: dict[str, Entrant]) -> dict[str, Any]:
    """Prints what is compared."""
    seconds = {name: statistics.median(e.seconds()) for name, e in started.items()}
    read = {
        n: e.steps[-1]["planned_bytes"] for n, e in started.items() if n != "in memory, decoded"
    }
    bytes_ratio = read["plain files"] / read["packed"]
    gain = seconds["plain files"] / seconds["packed"]
    count = min(len(e.losses) for e in (started["packed"], started["in memory, decoded"]))
    losses = measures.compare_losses(
        started["in memory, decoded"].losses[:count], started["packed"].losses[:count]
    )
    decoding = statistics.median([s["lane_s"].get("cpu", 0.0) for s in started["packed"].steps])
    for name in seconds:
        more = f", {read[name] / 1e6:.0f} MB read" if name in read else ""
        peak = started[name].end["peak_rss_bytes"] / 1e9
        say(f"{name:20} {seconds[name]:6.2f} s a step{more}, peak {peak:.2f} GB")
    say(f"bytes read           {bytes_ratio:.3f} times fewer")
    say(f"faster               {gain:.3f} times: {gain / bytes_ratio:.3f} of it (bar {BYTES_BAR})")
    say(f"decoding             {decoding:.2f} s of a core in a step")
    say(f"losses               off by {losses['max_difference']:g} from training in memory")
    return {
        "seconds": seconds,
        "read_bytes": read,
        "decoding_s": decoding,
        "losses": losses,
        "bars": [measures.bar("bytes ratio / speed-up", bytes_ratio / gain, 1 / BYTES_BAR)],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints."""
    import torch

    default = inputs.cache_folder() / "smollm2-135m-instruct"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=default)
    add("--format", default="affine")
    add("--bits", type=int, default=4)
    add("--rows", type=int, default=1)
    add("--length", type=int, default=64)
    add("--slowness", type=float, default=3.0)
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="ssdtune-bench-", dir="/var/tmp") as scratch:
        result = measure(options, Path(scratch))
    say(f"bits a weight        {result['packed']['bits_per_weight']:.3f} over the whole model")
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
