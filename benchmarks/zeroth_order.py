"""What a zeroth-order step costs: beside two plain forwards, and beside the MeZO loop as its authors write it.

    python benchmarks/zeroth_order.py --packed
    python benchmarks/zeroth_order.py [--model FOLDER] [--rows 2] [--length 512] [--rounds 5] [--json out.json]

All in one process, taking turns: two forwards of the model in memory, and of the model with the adapter; MeZO in memory
(normal numbers by torch, added and taken away in place); ours from the drive with no layer kept, over all weights, with
a working copy every so many steps, and over an adapter. The step of ours is also taken apart: what of it is making
variants and updates, measured by the same calls on the same blocks.

--packed: instead, steps over all weights of the model packed to 4 bits, by each way to have its slots; seconds on the
process's processors, which others on the machine change less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import inputs, measures  # noqa: E402

EPS, RATE = 1e-3, 1e-7
STEP_BAR, NOISE_BAR = 1.10, 0.10


class Plain:
    """The model in memory: two forwards, or a MeZO step (arXiv 2305.17333, Alg. 1) with torch's generator."""

    def __init__(self, folder: Path, rows: Any, *, has_adapter: bool = False) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if has_adapter:
            model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
        self.model: Any = model.eval()
        self.rows, self.num_steps = rows, 0

    def loss(self) -> float:
        """Of all rows, one at a time as ours takes them."""
        num_items = self.rows.numel() - len(self.rows)
        return sum(
            float(
                self.model(
                    input_ids=r, labels=r, use_cache=False, num_items_in_batch=num_items
                ).loss
            )
            for r in self.rows.split(1)
        )

    def two_forwards(self) -> None:
        """What a two-sided estimate can't do without."""
        self.loss()
        self.loss()

    def shift(self, seed: int, scale: float) -> None:
        """theta += scale z, in place."""
        import torch

        torch.manual_seed(seed)
        for parameter in self.model.parameters():
            parameter.add_(torch.normal(0.0, 1.0, parameter.shape), alpha=scale)

    def mezo(self) -> None:
        """One step."""
        self.num_steps += 1
        seed = self.num_steps
        self.shift(seed, EPS)
        up = self.loss()
        self.shift(seed, -2 * EPS)
        down = self.loss()
        self.shift(seed, EPS)
        self.shift(seed, -RATE * (up - down) / (2 * EPS))


class Streamed:
    """Ours. fold: of all weights' working copy; None: an adapter trains."""

    def __init__(self, folder: Path, rows: Any, fold: Any) -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        from benchmarks.contestants import streaming_options
        from ssdtune.swap.storage import choose_storage
        from ssdtune.visit.assemble import assemble
        from ssdtune.visit.build import build_meta
        from ssdtune.zeroth_order import MeZO, ZerothOrder

        meta = build_meta(folder, dtype=torch.float32)
        spec = {"micro_rows": 1, "prefetch": 2, "chunk_tokens": 4096}
        options = streaming_options(meta, choose_storage(folder).storage, spec)
        base: Any = assemble(meta, options)
        self.streamer = base.ssdtune
        if fold is None:
            base = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
        self.method = ZerothOrder(base, MeZO(eps=EPS), fold=fold)
        self.rows = rows

    def step(self) -> None:
        """One step."""
        num_items = self.rows.numel() - len(self.rows)
        calls = [
            lambda r=r: self.method.model(input_ids=r, labels=r, num_items_in_batch=num_items)
            for r in self.rows.split(1)
        ]
        self.method.step(calls, learning_rate=RATE)

    def noise_s(self) -> float:
        """Seconds of all that is drawn and added in a step: each block's update and its two variants."""
        from ssdtune.zeroth_order.rules import Term

        weights, engine = self.method.weights, self.streamer.engine
        if not weights.trains_blocks:
            return 0.0
        start = perf_counter()
        update = weights.updates[-1]
        for block, recipe in enumerate(engine.recipes):
            made = weights._views_of(block)
            names = self.streamer.names(block)
            assert len(recipe.tensors) == len(names)
            for name, tensor in zip(names, made, strict=True):
                weights.directions.apply(tensor, name, [update])
                for side in (EPS, -EPS):
                    weights.directions.make(tensor, tensor, name, Term(0, 0, side))
        return perf_counter() - start

    def written_bytes(self) -> int:
        """To the drive, in the last step, by the trace."""
        from ssdtune.schedule.plan import Lane

        engine = self.streamer.engine
        ops = [op for op in engine.trace if op.step == engine.step]
        return sum(op.num_bytes for op in ops if op.lane is Lane.NVME_WRITE)

    def close(self) -> None:
        """Ends threads, removes the working copy."""
        self.streamer.close()
        self.method.close()


def measure(folder: Path, scratch: Path, options: Any) -> dict[str, Any]:
    """Medians of each, in turns; the first two turns warm up."""
    import torch

    from ssdtune.zeroth_order import Fold

    text = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 40_000, (options.rows, options.length), generator=text)
    plain, adapted = Plain(folder, rows), Plain(folder, rows, has_adapter=True)
    ours = Streamed(folder, rows, Fold(scratch, options.fold))
    adapter = Streamed(folder, rows, None)
    turns: dict[str, Callable[[], None]] = {
        "two forwards in memory": plain.two_forwards,
        "two forwards in memory, with the adapter": adapted.two_forwards,
        "MeZO in memory": plain.mezo,
        "ours, all weights": ours.step,
        "ours, adapter": adapter.step,
    }
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    noise: list[float] = []
    with torch.no_grad():
        for turn in range(options.rounds + 2):  # the second step of ours makes the working copy
            for name, take in turns.items():
                start = perf_counter()
                take()
                if turn >= 2:
                    seconds[name].append(perf_counter() - start)
            if turn >= 2:
                noise.append(ours.noise_s())
    written = {"ours, all weights": ours.written_bytes(), "ours, adapter": adapter.written_bytes()}
    ours.close()
    adapter.close()
    base = {
        name: statistics.median(seconds["two forwards in memory" + more])
        for name, more in (("ours, adapter", ", with the adapter"), ("", ""))
    }
    step = statistics.median(seconds["ours, all weights"])
    return {
        "rows": [
            {
                "name": name,
                "seconds": statistics.median(times),
                "ratio": statistics.median(times) / base.get(name, base[""]),
            }
            for name, times in seconds.items()
        ],
        "noise_share": statistics.median(noise) / step,
        "written_bytes_per_step": written,
    }


class Packed(Streamed):
    """Ours over all weights of a packed model. way: what its slots hold."""

    def __init__(self, folder: Path, rows: Any, fold: Any, way: str) -> None:
        from benchmarks.contestants import streaming_options
        from ssdtune.swap.storage import choose_storage
        from ssdtune.visit.assemble import assemble
        from ssdtune.visit.build import build_meta
        from ssdtune.zeroth_order import MeZO, ZerothOrder

        meta = build_meta(folder)
        spec = {"micro_rows": 1, "prefetch": 2, "chunk_tokens": 4096}
        options = streaming_options(meta, choose_storage(folder).storage, spec)
        base: Any = assemble(meta, options)
        self.streamer = base.ssdtune
        self.method = ZerothOrder(base, MeZO(eps=EPS), fold=fold, packed=way)
        self.rows = rows

    def weights_bytes(self) -> int:
        """Of slots, buffers, and the place for a variant."""
        plan, more = self.streamer.engine.plan, self.method.extra_bytes()
        return plan.slot_bytes + plan.buffer_bytes + more["a variant of a block"]


def measure_packed(options: Any) -> dict[str, Any]:
    """A row for each way: the first step, whose variants come from pristine weights, later ones, and memory."""
    import torch

    from ssdtune.zeroth_order import Fold

    text = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 40_000, (options.rows, options.length), generator=text)
    with tempfile.TemporaryDirectory(dir=inputs.cache_folder()) as made:
        scratch, fold = Path(made), Fold(Path(made), options.fold)
        folder = packed_to_4_bits(options.model, scratch / "packed")
        ways = {"decoded": fold, "kept": None, "moved": fold}
        ours = {way: Packed(folder, rows, of, way) for way, of in ways.items()}
        num_bytes = {way: each.weights_bytes() for way, each in ours.items()}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        with torch.no_grad():
            for _ in range(options.rounds + 2):
                for way, each in ours.items():
                    start = process_time()
                    each.step()
                    seconds[way].append(process_time() - start)
        written = {way: each.written_bytes() for way, each in ours.items()}
        for each in ours.values():
            each.close()
    return {
        "packed": [
            {
                "name": way,
                "first_s": times[0],
                "later_s": statistics.median(times[2:]),
                "last_s": times[-1],
                "weights_bytes": num_bytes[way],
                "written_bytes": written[way],
            }
            for way, times in seconds.items()
        ]
    }


def packed_to_4_bits(model: Path, out: Path) -> Path:
    """The model packed, in the new folder `out`."""
    from ssdtune.packing.convert import pack
    from ssdtune.packing.layout import groups_of
    from ssdtune.packing.wanted import Wanted
    from ssdtune.swap.storage import choose_storage
    from ssdtune.visit.build import build_meta

    meta = build_meta(model)
    pack(meta, groups_of(meta, Wanted().chosen()), out, storage=choose_storage(model).storage)
    return out


def packed_lines(result: dict[str, Any]) -> Iterator[str]:
    """Markdown."""
    yield "| slots | first step, s | later ones, s | last one, s | slots, buffers, variant, MB | written a step, MB |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in result["packed"]:
        sizes = f"{row['weights_bytes'] / 1e6:.1f} | {row['written_bytes'] / 1e6:.1f}"
        times = " | ".join(f"{row[key]:.2f}" for key in ("first_s", "later_s", "last_s"))
        yield f"| {row['name']} | {times} | {sizes} |"


def lines(result: dict[str, Any]) -> Iterator[str]:
    """Markdown."""
    yield "| what | s | of two forwards of the same model |"
    yield "| --- | --- | --- |"
    for row in result["rows"]:
        yield f"| {row['name']} | {row['seconds']:.2f} | {row['ratio']:.2f} |"
    yield f"making variants and updates: {result['noise_share']:.1%} of the step of all weights"
    for name, num_bytes in result["written_bytes_per_step"].items():
        yield f"written in the last step, {name}: {num_bytes / 1e6:.0f} MB"


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was promised and what came out."""
    ratio = {row["name"]: row["ratio"] for row in result["rows"]}
    return [
        measures.bar("a step of all weights / two forwards", ratio["ours, all weights"], STEP_BAR),
        measures.bar("a step of an adapter / two forwards", ratio["ours, adapter"], STEP_BAR),
        measures.bar("variants and updates, of a step", result["noise_share"], NOISE_BAR),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = inputs.cache_folder() / "smollm2-135m-instruct"
    parser.add_argument("--model", type=Path, default=default)
    parser.add_argument("--packed", action="store_true", help="ways to have a packed base")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--fold", type=int, default=1, help="steps after which a block is written back"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if options.packed:
        result, told = measure_packed(options), packed_lines
        result["bars"] = []
    else:
        folder = inputs.in_dtype(options.model, "float32", lambda line: None)
        result, told = measure(folder, inputs.cache_folder(), options), lines
        result["bars"] = bars(result)
    for line in told(result):
        print(line, flush=True)
    for bar in result["bars"]:
        verdict = "met" if bar["passed"] else "**not met**"
        print(f"- {bar['bar']}: {bar['value']:.2f} (bar {bar['limit']:.2f}): {verdict}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
