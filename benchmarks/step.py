"""One command: a training step in memory, ours from the drive, others', in one run.

    python benchmarks/step.py [--model FOLDER|small-head] [--rows 2 8] [--length 512] [--rounds 7]
                              [--peers deepspeed,airllm] [--json out.json]

Contestants run in a process each and take turns, one step a turn, on the same batch. Floors are
printed before anything is measured, losses are compared before times. The last line is JSON;
`python benchmarks/table.py out.json` makes a table of it. What each column means: README.md here.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import inputs, machine, measures, peers  # noqa: E402
from benchmarks.contest import ContestantError, Entrant, take_turns  # noqa: E402

FREE_BAR = 1.05  # ours / in memory, reader not throttled
THROTTLED_BAR = 1.10  # ours / max(reading, in memory)
PASSES_BAR = 1.05  # ours / what forward and backward take at least, each on its own
OURS, KEPT = "ours", " keeping activations"
PEERS = ("deepspeed", "airllm")


@dataclass(frozen=True)
class Setting:
    """What all workloads of a run share."""

    options: argparse.Namespace
    folder: Path  # the model, in `dtype`
    dtype: str
    stamp: dict[str, Any]  # goes into every row
    flops_per_s: float
    read_bytes_per_s: float
    scratch: Path

    def spec(self, kind: str, batch: list[list[int]], **more: Any) -> dict[str, Any]:
        """What a contestant is built from."""
        options = self.options
        return {
            "kind": kind,
            "model": str(self.folder),
            "batch": batch,
            "dtype": self.dtype,
            "threads": options.threads,
            "seed": 0,
            "learning_rate": 1e-4,
            "lora_rank": options.lora_rank,
            "micro_rows": min(options.micro_rows, len(batch)),
            "prefetch": options.prefetch,
            "chunk_tokens": options.chunk_tokens,
            **more,
        }


def say(line: str) -> None:
    """For whoever watches."""
    print(line, flush=True)


# --------------------------------------------------------------------------- LoRA: memory, ours


def lora_rows(setting: Setting, batch: list[list[int]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Rows and bars of one workload: in memory (both ways), ours free, ours throttled."""
    names = {"in memory": setting.spec("memory", batch, what="lora")}
    if len(batch) > setting.options.micro_rows:
        whole = setting.spec("memory", batch, what="lora", micro_rows=len(batch))
        names["in memory, whole batch"] = whole
    throttled: dict[str, float] = {}
    for kept in (0, setting.options.activations) if setting.options.activations else (0,):
        free = f"{OURS}{KEPT if kept else ''}"
        names[free] = setting.spec("ours", batch, throttled=False, activation_bytes=kept)
        for reading in setting.options.reading:
            name = f"{free}, reading at {reading:g}"
            names[name] = setting.spec("ours", batch, throttled=True, activation_bytes=kept)
            throttled[name] = reading
    with started(setting, names) as entrants:
        warm_up(entrants, setting.options.warm_up)
        rates = throttle(entrants, throttled)
        floors = predict(setting, entrants, batch, rates)
        take_turns(list(entrants.values()), setting.options.rounds, say)
    return report(setting, entrants, batch=batch, rates=rates, floors=floors)


@contextmanager
def started(
    setting: Setting, specs: dict[str, dict[str, Any]], packages: Path | None = None
) -> Iterator[dict[str, Entrant]]:
    """All processes built; ended in order if the body succeeds, killed otherwise."""
    entrants = {
        name: Entrant(
            name,
            spec,
            scratch=setting.scratch,
            packages=packages,
            timeout_s=setting.options.timeout,
        )
        for name, spec in specs.items()
    }
    try:
        for entrant in entrants.values():
            entrant.wait_ready()
        yield entrants
        for entrant in entrants.values():
            entrant.finish()
    finally:
        for entrant in entrants.values():
            entrant.kill()


def warm_up(entrants: dict[str, Entrant], num_steps: int) -> None:
    """Steps that don't count; the first pays for allocation, and ours learns the order of visits."""
    for turn in range(num_steps):
        took = [f"{e.name} {e.step(counts=False)['seconds']:.2f}" for e in entrants.values()]
        say(f"warm-up {turn + 1}/{num_steps}: {', '.join(took)}")


def throttle(entrants: dict[str, Entrant], wanted: dict[str, float]) -> dict[str, float]:
    """Slows the readers so that a step's bytes take `wanted` times a step in memory; bytes/s by name."""
    in_memory = [e for name, e in entrants.items() if name.startswith("in memory")]
    step_s = min(e.step(counts=False)["seconds"] for e in in_memory)
    rates = {}
    for name, ratio in wanted.items():
        planned = entrants[name].warm_ups[-1]["planned_bytes"]
        rates[name] = planned / (ratio * step_s)
        entrants[name].set(bytes_per_s=rates[name])
    return rates


def predict(
    setting: Setting, entrants: dict[str, Entrant], batch: list[list[int]], rates: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Each contestant's floor, printed before it is measured."""
    shape = entrants["in memory"].about["flop_shape"]
    length = len(batch[0])
    flops = measures.step_flops(shape, num_rows=len(batch), length=length, trains_weights=False)
    floors = {}
    for name, entrant in entrants.items():
        lanes = {"compute": (flops, setting.flops_per_s)}
        if "planned_bytes" in entrant.warm_ups[-1]:
            rate = min(rates.get(name, float("inf")), setting.read_bytes_per_s)
            lanes["nvme_read"] = (entrant.warm_ups[-1]["planned_bytes"], rate)
        floors[name] = measures.floor(lanes)
        told = ", ".join(f"{lane} {s:.2f} s" for lane, s in floors[name]["lanes"].items())
        free = name.partition(", reading")[0]  # the same without a slowed reader
        if visits := entrants[free].warm_ups[-1]["visits"] if name.startswith(OURS) else []:
            rate = lanes["nvme_read"][1]
            predicted = measures.predict_step([visit[:3] for visit in visits], rate)
            floors[name]["predicted_s"] = predicted
            told += f"; predicted from the plan and the warm-up's visits {predicted:.2f} s"
        say(f"floor of {name}: {floors[name]['seconds']:.2f} s ({told})")
    return floors


def report(
    setting: Setting,
    entrants: dict[str, Entrant],
    *,
    batch: list[list[int]],
    rates: dict[str, float],
    floors: dict[str, dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Losses first, then times: rows and bars of one workload."""
    in_memory = [e for name, e in entrants.items() if name.startswith("in memory")]
    base = min(in_memory, key=lambda e: statistics.median(e.seconds()))
    rows, bars = [], []
    workload = f"{len(batch)} x {len(batch[0])}"
    for name, entrant in entrants.items():
        row = make_row(setting, entrant, batch=batch, base=base, twin=entrants["in memory"])
        row["floor"] = floors[name]
        row["over_floor"] = row["seconds"]["p50"] / floors[name]["seconds"]
        if name.startswith(OURS):
            difference = row["losses"]["max_difference"]
            bars.append(measures.bar(f"{workload}: losses of {name} off by", difference, 0.0))
            layers = row["about"]["resident_layers"]
            bars.append(measures.bar(f"{workload}: layers resident in {name}", layers, 0))
        if name in (OURS, OURS + KEPT):
            ratio = row["ratio"]["p50"]
            bars.append(measures.bar(f"{workload}: {name} / in memory", ratio, FREE_BAR))
        if name in rates:
            add_reading(row, entrant, rate=rates[name], base=base)
            bars.append(measures.bar(f"{workload}: {name}", row["ratio_to_limit"], THROTTLED_BAR))
            bound = f"{workload}: {name}, to the bound of passes"
            bars.append(measures.bar(bound, row["ratio_to_passes"], PASSES_BAR))
        rows.append(row)
    return rows, bars


def add_reading(row: dict[str, Any], entrant: Entrant, *, rate: float, base: Entrant) -> None:
    """What a throttled row is held against: the longer of reading and computing, as they came out."""
    in_memory = statistics.median(base.seconds())
    reading = statistics.median([s["planned_bytes"] for s in entrant.steps]) / rate
    row["throttled_to_bytes_per_s"] = rate
    row["reading_s"] = reading
    row["reading_over_in_memory"] = reading / in_memory
    row["ratio_to_limit"] = row["seconds"]["p50"] / max(reading, in_memory)
    bounds = [measures.bound_of_passes(_passes(step["visits"]), rate) for step in entrant.steps]
    row["passes_s"] = statistics.median(bounds)
    row["ratio_to_passes"] = row["seconds"]["p50"] / row["passes_s"]


def _passes(visits: list[tuple[int, int, float, str]]) -> dict[str, tuple[float, int]]:
    """Of forward, of the visit at its end and of backward: seconds of compute and bytes read."""
    passes: dict[str, tuple[float, int]] = {}
    turn = max(i for i, visit in enumerate(visits) if visit[3] == "F")
    for i, (_, num_bytes, seconds, direction) in enumerate(visits):
        name = "turn" if i == turn else direction
        before = passes.get(name, (0.0, 0))
        passes[name] = (before[0] + seconds, before[1] + num_bytes)
    return passes


def make_row(
    setting: Setting, entrant: Entrant, *, batch: list[list[int]], base: Entrant, twin: Entrant
) -> dict[str, Any]:
    """One contestant's row. base: whose time is divided by; twin: whose losses are compared with."""
    steps, seconds = entrant.steps, entrant.seconds()
    row = {
        **setting.stamp,
        "contestant": entrant.name,
        "trains": entrant.about["trains"],
        "dtype": entrant.spec["dtype"],
        "rows": len(batch),
        "length": len(batch[0]),
        "losses": measures.compare_losses(twin.losses, entrant.losses),
        "losses_against": twin.name,
        "seconds": measures.spread(seconds),
        "cpu_seconds": measures.spread(_cpu(entrant)),
        "cpu_ratio": statistics.median(_cpu(entrant)) / statistics.median(_cpu(base)),
        "tokens_per_s": len(batch) * len(batch[0]) / statistics.median(seconds),
        "base": base.name,
        "ratio": {
            "p50": statistics.median(seconds) / statistics.median(base.seconds()),
            "paired": measures.paired_ratio(seconds, base.seconds()),
        },
        "peak_rss_bytes": entrant.end["peak_rss_bytes"],
        "load_peak_rss_bytes": entrant.end["load_peak_rss_bytes"],
        "rss_over_base": entrant.end["peak_rss_bytes"] / base.end["peak_rss_bytes"],
        "disk_read_bytes": statistics.median([s["disk_read_bytes"] for s in steps]),
        "disk_written_bytes": statistics.median([s["disk_written_bytes"] for s in steps]),
        "about": {k: v for k, v in entrant.end.items() if not k.endswith("rss_bytes")},
        "all_seconds": seconds,
    }
    if "lane_s" in steps[0]:
        row["busy"] = measures.busy_shares([s["lane_s"] for s in steps], seconds)
        row["stall_s"] = statistics.median([s["stall_s"] for s in steps])
        row["streamed_bytes"] = statistics.median([s["streamed_bytes"] for s in steps])
        row["misses"] = sum(s["misses"] for s in steps)
        row["reads"] = entrant.end["reads"]
    return row


def _cpu(entrant: Entrant) -> list[float]:
    return [step["cpu_s"] for step in entrant.steps]


# --------------------------------------------------------------------------------------- peers


def peer_rows(setting: Setting, name: str, batch: list[list[int]]) -> list[dict[str, Any]]:
    """A peer and its twin in memory, or one row that says why there is nothing to compare."""
    if not peers.is_installed(name):
        why = f"not installed: {peers.how_to_install(name)}"
        return [absent(setting, name, batch, why)]
    folder = peers.packages_folder(name)
    packages = folder if folder.is_dir() else None
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=peers_scratch(setting)) as scratch:
        try:
            specs = peer_specs(setting, name, batch, Path(scratch))
            with started(setting, specs, packages) as entrants:
                warm_up(entrants, setting.options.warm_up)
                take_turns(list(entrants.values()), setting.options.rounds, say)
        except ContestantError as error:
            return [absent(setting, name, batch, str(error))]
    twin = next(iter(entrants.values()))
    return [make_row(setting, e, batch=batch, base=twin, twin=twin) for e in entrants.values()]


def peers_scratch(setting: Setting) -> Path:
    """Where peers put what they stream: beside the model by default, so on the same drive."""
    folder = setting.options.scratch or inputs.cache_folder() / "peers-scratch"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def peer_specs(
    setting: Setting, name: str, batch: list[list[int]], scratch: Path
) -> dict[str, dict[str, Any]]:
    """The twin first, then the peer."""
    if name == "deepspeed":
        model = str(inputs.in_dtype(setting.options.model, "float32", say))
        full = {"what": "full", "dtype": "float32", "model": model}
        return {
            "in memory, full": setting.spec("memory", batch, **full),
            "DeepSpeed ZeRO-3, NVMe": setting.spec(
                "deepspeed", batch, scratch=str(scratch), **full
            ),
        }
    from benchmarks.peers.airllm_lora import write_random_model

    model = scratch / "model"
    write_random_model(model, setting.dtype)
    (scratch / "layers").mkdir()
    more = {"model": str(model), "scratch": str(scratch / "layers")}
    return {
        "in memory, AirLLM's model": setting.spec("airllm-twin", batch, **more),
        "AirLLM 4 LoRA": setting.spec("airllm", batch, **more),
    }


def absent(setting: Setting, name: str, batch: list[list[int]], why: str) -> dict[str, Any]:
    """A row without numbers."""
    say(f"{name}: {why}")
    shape = {"rows": len(batch), "length": len(batch[0])}
    return {**setting.stamp, "contestant": name, **shape, "not_measured": why}


# ---------------------------------------------------------------------------------- the command


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    default = inputs.cache_folder() / "smollm2-135m-instruct"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        default=default,
        help=f"a folder with safetensors files, or one of {', '.join(inputs.RANDOM_LLAMAS)}",
    )
    add("--rows", type=int, nargs="+", default=[2, 8], help="rows of a batch, a workload each")
    add("--length", type=int, default=512, help="tokens of a row")
    add("--micro-rows", type=int, default=2, help="rows of a micro-batch, in memory and ours")
    add("--rounds", type=int, default=7, help="steps of each contestant that count")
    add("--warm-up", type=int, default=1, help="steps of each that don't (in memory: one more)")
    add("--reading", type=float, nargs="*", default=[0.5, 1.0, 2.0], help="reading / in memory")
    add("--dtype", choices=["auto", *machine.DTYPES], default="auto")
    add("--threads", type=int, default=None, help="of torch; default: as many as cores")
    add("--prefetch", type=int, default=2, help="blocks that ours reads ahead")
    add("--activations", type=size, default=0, help="also rows of ours that keep so many bytes")
    add("--chunk-tokens", type=int, default=4096, help="positions whose logits ours holds at once")
    add("--lora-rank", type=int, default=16)
    add("--peers", default="", help=f"of {','.join(PEERS)}")
    add("--peers-only", action="store_true", help="leave out LoRA in memory and ours")
    add("--scratch", type=Path, default=None, help="where peers put weights; default: the cache")
    add("--timeout", type=float, default=1800.0, help="longest wait for one step, seconds")
    add("--json", type=Path, default=None, help="also write the result here")
    options = parser.parse_args(argv)
    if str(options.model) in inputs.RANDOM_LLAMAS:
        options.model = inputs.random_llama(str(options.model))
    options.model = options.model.expanduser()
    options.peers = [name for name in options.peers.split(",") if name]
    unknown = sorted(set(options.peers) - set(PEERS))
    if unknown:
        parser.error(f"--peers {unknown[0]}: known are {', '.join(PEERS)}")
    if not (options.model / "config.json").is_file():
        parser.error(f"--model {options.model}: no model there; ./launch/quickstart.sh makes one")
    if options.rounds < 1 or options.warm_up < 1 or min(options.rows) < 1 or options.length < 2:
        parser.error("--rounds, --warm-up and --rows must be 1 or more, --length 2 or more")
    return options


def size(text: str) -> int:
    """Bytes of "8GB"."""
    from ssdtune.sizes import parse_size

    return parse_size(text) or 0


def prepare(options: argparse.Namespace, scratch: Path) -> Setting:
    """Measures the machine's rates, chooses the dtype, makes the model's copy if one is needed."""
    import torch

    from ssdtune.swap.storage import choose_storage

    options.threads = options.threads or torch.get_num_threads()
    torch.set_num_threads(options.threads)
    config = json.loads((options.model / "config.json").read_text())
    width = (config.get("text_config") or config)["hidden_size"]
    rates = {
        dtype: machine.matmul_flops_per_s(dtype, rows=options.length, width=width)
        for dtype in machine.DTYPES
    }
    dtype, why = machine.choose_dtype(options.dtype, rates)
    folder = inputs.in_dtype(options.model, dtype, say)
    choice = choose_storage(folder)
    largest = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    read_rate = machine.read_bytes_per_s(choice.storage, largest)
    stamp = {
        **machine.describe(folder, num_threads=options.threads),
        "model": folder.name,
        "dtype_why": why,
        "drive_bytes_per_s": read_rate,
        "matmul_flops_per_s": rates[dtype],
        "storage": choice.storage.name,
        "storage_why": choice.reason,
    }
    say(f"{stamp['processor']}, {stamp['cores']} cores, {stamp['threads']} threads")
    say(
        f"{stamp['drive']}, {stamp['filesystem']}: {read_rate / 1e9:.2f} GB/s {choice.storage.name}"
    )
    say(f"dtype {dtype}: {why}")
    return Setting(options, folder, dtype, stamp, rates[dtype], read_rate, scratch)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, writes."""
    options = parse(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that contestants end with us
    rows: list[dict[str, Any]] = []
    bars: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ssdtune-bench-") as scratch:
        setting = prepare(options, Path(scratch))
        for num_rows in options.rows:
            batch, told = inputs.token_batch(setting.folder, num_rows, options.length)
            setting.stamp["tokens"] = told
            say(f"--- {num_rows} x {options.length} tokens, LoRA rank {options.lora_rank}, {told}")
            if not options.peers_only:
                new_rows, new_bars = lora_rows(setting, batch)
                rows += new_rows
                bars += new_bars
            for name in options.peers:
                say(f"--- {num_rows} x {options.length} tokens, {name}")
                rows += peer_rows(setting, name, batch)
    settings = {key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()}
    result = {"benchmark": "step", "settings": settings, "rows": rows, "bars": bars}
    from benchmarks.table import lines

    say("\n".join(lines(result)))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
