"""What a zeroth-order step costs: beside two plain forwards, and beside the MeZO loop as its authors write it.

    python benchmarks/zeroth_order.py --packed
    python benchmarks/zeroth_order.py --reading 1 [--directions 4]
    python benchmarks/zeroth_order.py [--model FOLDER] [--dtype bfloat16] [--rows 2] [--length 512] [--json out.json]

All in one process, taking turns: two forwards of the model in memory, and of the model with the adapter; MeZO in memory
(normal numbers by torch, added and taken away in place); ours from the drive with no layer kept, over all weights, with
a working copy every so many steps, over an adapter, and over all weights in LOZO's windows as matrices of low rank. Each
step of ours is also taken apart: what of it is making variants and updates, measured by the same calls on the same blocks.

Taking one step of the log once more is timed too, over all blocks.

--reading R: instead, a drive so slow that reading takes R times what a step's forwards take in memory, FZOO's along each of
--directions and one more, or LOZO's on both sides of half as many: what a step takes of the reading alone. Steps follow one
another, as in a run.

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

from benchmarks import inputs, machine, measures  # noqa: E402

EPS, RATE = 1e-3, 1e-7
STEP_BAR, NOISE_BAR = 1.10, 0.10
READING_BAR = 1.15  # a step / the reading of its blocks, where that takes longer than its forwards
NOT_SLOWED = 1e15  # bytes a second
# Blocks read ahead on a slow drive: while the head, a sixth of a forward, is computed, reading goes on with a fifth of the
# layers. With 2 it would wait.
AHEAD = 6


class Plain:
    """The model in memory: two forwards, or a MeZO step (arXiv 2305.17333, Alg. 1) with torch's generator."""

    def __init__(self, folder: Path, rows: Any, *, has_adapter: bool = False) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
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
    """Ours. fold: of all weights' working copy. has_adapter: LoRA trains, not all weights. can_slow: whether `slow` may be
    called."""

    def __init__(
        self,
        folder: Path,
        rows: Any,
        *,
        estimator: Any,
        fold: Any = None,
        has_adapter: bool = False,
        low_rank: bool = False,
        can_slow: bool = False,
    ) -> None:
        from peft import LoraConfig, get_peft_model

        from benchmarks.contestants import streaming_options
        from ssdtune.swap.storage import ThrottledStorage, choose_storage
        from ssdtune.visit.assemble import assemble
        from ssdtune.visit.build import build_meta
        from ssdtune.zeroth_order import ZerothOrder

        meta = build_meta(folder)
        ahead = AHEAD if can_slow else 2
        spec = {"micro_rows": 1, "prefetch": ahead, "chunk_tokens": 4096}
        self.storage: Any = choose_storage(folder).storage
        if can_slow:
            self.storage = ThrottledStorage(self.storage, NOT_SLOWED)
        base: Any = assemble(meta, streaming_options(meta, self.storage, spec))
        self.streamer = base.ssdtune
        if has_adapter:
            base = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
        self.method = ZerothOrder(base, estimator, fold=fold, low_rank=low_rank)
        self.rows, self.update = rows, None

    def step(self) -> None:
        """One step."""
        num_items = self.rows.numel() - len(self.rows)
        calls = [
            lambda r=r: self.method.model(input_ids=r, labels=r, num_items_in_batch=num_items).loss
            for r in self.rows.split(1)
        ]
        self.update = self.method.step(calls, learning_rate=RATE).update

    def replayed_s(self) -> float:
        """Seconds of taking the last step once more, as each block of all weights does where its copy lacks it."""
        directions, start = self.method.weights.directions, perf_counter()
        for block in range(len(self.streamer.engine.recipes)):
            for name, tensor in self._made(block):
                directions.apply(tensor, name, [self.update])
        return perf_counter() - start

    def noise_s(self) -> float:
        """Seconds of all that is drawn and added in a step: variants of each block, and the last step's update, which a
        window of low rank has in its sums."""
        weights, residents = self.method.weights, self.method.weights.residents
        start = perf_counter()
        if weights.trains_blocks and not self.method.low_rank:
            self.replayed_s()
        for block in range(len(self.streamer.engine.recipes)):
            for shift in self.method.estimator.variants:
                residents.use_inside(block, shift)
                if weights.trains_blocks:
                    term = shift.term(self.method.num_steps)
                    for name, tensor in self._made(block):
                        weights.directions.make(tensor, tensor, name, term)
        if not weights.trains_blocks:
            residents.take([self.update])
        seconds = perf_counter() - start
        residents.use_outside(None)
        return seconds

    def _made(self, block: int) -> Iterator[tuple[str, Any]]:
        """Tensors of the place for variants, by the names of the block's."""
        names, made = self.streamer.names(block), self.method.weights._views_of(block)
        return zip(names, made, strict=True)

    def slow(self, reading_s: float) -> None:
        """From now on a step's blocks take so many seconds to be read."""
        read_bytes = self.streamer.engine.plan.sequences["forward"].read_bytes
        self.storage.bytes_per_s = read_bytes / reading_s

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


def text_of(options: Any) -> Any:
    """Token ids of the rows, the same in every run."""
    import torch

    text = torch.Generator().manual_seed(0)
    return torch.randint(3, 40_000, (options.rows, options.length), generator=text)


def measure(folder: Path, scratch: Path, options: Any) -> dict[str, Any]:
    """Medians of each, in turns; the first two turns warm up."""
    import torch

    from ssdtune.zeroth_order import LOZO, Fold, MeZO

    rows = text_of(options)
    plain, adapted = Plain(folder, rows), Plain(folder, rows, has_adapter=True)
    mezo, fold = MeZO(eps=EPS), Fold(scratch, options.fold)
    ours = {
        "all weights": Streamed(folder, rows, estimator=mezo, fold=fold),
        "adapter": Streamed(folder, rows, estimator=mezo, has_adapter=True),
        "low rank": Streamed(folder, rows, estimator=LOZO(eps=EPS), low_rank=True),
    }
    turns: dict[str, Callable[[], None]] = {
        "two forwards in memory": plain.two_forwards,
        "two forwards in memory, with the adapter": adapted.two_forwards,
        "MeZO in memory": plain.mezo,
        **{f"ours, {name}": each.step for name, each in ours.items()},
    }
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    noise: dict[str, list[float]] = {name: [] for name in ours}
    replayed = list[float]()
    with torch.no_grad():
        for turn in range(options.rounds + 2):  # the second step of ours makes the working copy
            for name, take in turns.items():
                start = perf_counter()
                take()
                if turn >= 2:
                    seconds[name].append(perf_counter() - start)
            for name, each in ours.items():
                if turn >= 2:
                    noise[name].append(each.noise_s())
            if turn >= 2:
                replayed.append(ours["all weights"].replayed_s())
    written = {name: each.written_bytes() for name, each in ours.items()}
    for each in ours.values():
        each.close()
    median = {name: statistics.median(times) for name, times in seconds.items()}
    own = {"ours, adapter": "two forwards in memory, with the adapter"}
    return {
        "rows": [
            {
                "name": name,
                "seconds": took,
                "ratio": took / median[own.get(name, "two forwards in memory")],
            }
            for name, took in median.items()
        ],
        "noise_shares": {
            name: statistics.median(times) / median[f"ours, {name}"]
            for name, times in noise.items()
        },
        "written_bytes_per_step": written,
        "replayed_s": statistics.median(replayed),
    }


# --------------------------------------------------------------------------- a slow drive


def measure_reading(folder: Path, options: Any) -> dict[str, Any]:
    """A row for each of what trains: steps one after the other while reading takes as long as was asked for.

    All weights take the steps that they have missed as each block comes: one more in each step, none in the first.
    """
    import torch

    from ssdtune.zeroth_order import FZOO, LOZO

    rows, found = text_of(options), []
    fzoo = FZOO(eps=EPS, num_directions=options.directions)
    lozo = LOZO(eps=EPS, num_directions=-(-options.directions // 2))
    for name, estimator, more in (
        ("adapter, FZOO", fzoo, {"has_adapter": True}),
        ("low rank, LOZO", lozo, {"low_rank": True}),
        ("all weights, FZOO from the log", fzoo, {}),
    ):
        plain = Plain(folder, rows, has_adapter="has_adapter" in more)
        ours = Streamed(folder, rows, estimator=estimator, can_slow=True, **more)
        num = len(estimator.variants)
        with torch.no_grad():
            plain.loss()
            forwards_s = num * statistics.median(timed(plain.loss) for _ in range(options.rounds))
            reading_s = options.reading * forwards_s
            ours.slow(reading_s)
            ours.step()  # some of its blocks were read before the drive was slowed
            took = statistics.median(timed(ours.step) for _ in range(options.rounds))
        ours.close()
        row = {
            "name": name,
            "num": num,
            "forwards_s": forwards_s,
            "reading_s": reading_s,
            "seconds": took,
        }
        found.append({**row, "ratio": took / reading_s})
    bars = [
        measures.bar(
            f"{row['num']} forwards a fetch, {row['name']} / reading", row["ratio"], READING_BAR
        )
        for row in found
    ]
    return {"reading": found, "bars": bars}


def timed(take: Callable[[], Any]) -> float:
    """Seconds."""
    start = perf_counter()
    take()
    return perf_counter() - start


def reading_lines(result: dict[str, Any]) -> Iterator[str]:
    """Markdown."""
    yield "| what trains | forwards in memory, s | reading, s | a step, s | of reading |"
    yield "| --- | --- | --- | --- | --- |"
    for row in result["reading"]:
        times = " | ".join(f"{row[key]:.2f}" for key in ("forwards_s", "reading_s", "seconds"))
        yield f"| {row['name']} | {times} | {row['ratio']:.2f} |"


# --------------------------------------------------------------------------- a packed base


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
        self.rows, self.update = rows, None

    def weights_bytes(self) -> int:
        """Of slots, buffers, and the place for a variant."""
        plan, more = self.streamer.engine.plan, self.method.extra_bytes()
        return plan.slot_bytes + plan.buffer_bytes + more["a variant of a block"]


def measure_packed(options: Any) -> dict[str, Any]:
    """A row for each way: the first step, whose variants come from pristine weights, later ones, and memory."""
    import torch

    from ssdtune.zeroth_order import Fold

    rows = text_of(options)
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
    for name, share in result["noise_shares"].items():
        yield f"making variants and updates, {name}: {share:.1%} of the step"
    for name, num_bytes in result["written_bytes_per_step"].items():
        yield f"written in the last step, {name}: {num_bytes / 1e6:.0f} MB"
    share = result["replayed_s"] / result["rows"][0]["seconds"]
    yield f"taking a step of the log once more: {result['replayed_s']:.3f} s, {share:.1%} of two forwards"


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What was promised and what came out."""
    ratio = {row["name"]: row["ratio"] for row in result["rows"]}
    shares = result["noise_shares"]
    return [
        *(
            measures.bar(f"a step, {name} / two forwards", ratio[f"ours, {name}"], STEP_BAR)
            for name in shares
        ),
        *(
            measures.bar(f"variants and updates, {name}, of a step", share, NOISE_BAR)
            for name, share in shares.items()
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = inputs.cache_folder() / "smollm2-135m-instruct"
    parser.add_argument("--model", type=Path, default=default)
    parser.add_argument("--dtype", choices=machine.DTYPES, default="float32")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--packed", action="store_true", help="ways to have a packed base")
    kind.add_argument(
        "--reading", type=float, metavar="R", help="read R times as long as the forwards take"
    )
    parser.add_argument("--directions", type=int, default=4, help="of FZOO, with --reading")
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
    elif options.reading:
        folder = inputs.in_dtype(options.model, options.dtype, lambda line: None)
        result, told = measure_reading(folder, options), reading_lines
    else:
        folder = inputs.in_dtype(options.model, options.dtype, lambda line: None)
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
