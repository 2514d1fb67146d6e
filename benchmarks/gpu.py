"""LoRA steps on one device: in memory, and streamed from the drive with no layer kept, at two numbers of tokens.

    python benchmarks/gpu.py [--device cuda] [--layers 16] [--width 2048] [--rounds 5] [--json]

A random Llama is written to a scratch folder, 2 GB in bfloat16 as it stands. Both train the same adapters on the same
rows, take turns, and their losses are compared before any time is. Beside them stand the drive's and the link's rates,
measured here, and the floor they make; then kernels of packed weights beside a copy within the device, as
unpack_device.py has them. What misses its bar is named, and the exit code is 1. With --json the last line printed is
the JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import measures, unpack_device  # noqa: E402

ROWS = (1, 8)  # of one step, each a micro-batch
VOCABULARY = 32_000
PREFETCH = 2
LEARNING_RATE = 1e-4
FLOOR_BAR = 1.10  # ours / floor, as step.py has it
DECODED_MB, DECODING_ROUNDS = 256, 9  # written by a decoder in a turn; turns


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured. device: as torch names it."""

    device: str
    layers: int
    width: int
    length: int
    rounds: int

    @property
    def dtype(self) -> str:
        """Processors without a device emulate bfloat16."""
        return "float32" if self.device == "cpu" else "bfloat16"


def write_model(setting: Setting, folder: Path) -> None:
    """A random Llama of the setting's sizes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(setting.width // 128, 1)
    config = LlamaConfig(
        hidden_size=setting.width,
        intermediate_size=4 * setting.width,
        num_hidden_layers=setting.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=VOCABULARY,
    )
    config.torch_dtype = setting.dtype
    with torch.device(setting.device):
        model: Any = LlamaForCausalLM(config).to(getattr(torch, setting.dtype))
    model.save_pretrained(folder, max_shard_size="1GB")


class Trainer:
    """A model, its adapters and its optimizer."""

    def __init__(self, model: Any, device: str) -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        self.model, self.device = get_peft_model(model, config).train(), device
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)

    def step(self, rows: Any, *, at_once: bool) -> tuple[float, float]:
        """(loss, seconds) of a step. rows [rows, length]. at_once: all rows in one call, the model cuts them."""
        import torch

        start = perf_counter()
        num_items = rows.shape[0] * (rows.shape[1] - 1)
        total = 0.0
        for part in (rows,) if at_once else rows.split(1):
            loss = self.model(input_ids=part, labels=part, num_items_in_batch=num_items).loss
            loss.backward()
            total = total + loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device != "cpu":
            torch.cuda.current_stream().synchronize()
        return float(total), perf_counter() - start


def in_memory(setting: Setting, folder: Path) -> Trainer:
    """The whole model on the device, gradient checkpointing on."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, setting.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(setting.device)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return Trainer(model, setting.device)


def streamed(setting: Setting, folder: Path) -> Trainer:
    """Slots for the prefetch depth and not a byte more, so that no layer stays."""
    import torch

    from ssdtune.schedule.choices import smallest_budgets
    from ssdtune.schedule.plan import Budgets
    from ssdtune.swap.storage import choose_storage
    from ssdtune.visit.assemble import assemble
    from ssdtune.visit.build import build_meta
    from ssdtune.visit.draft import Options, draft

    meta = build_meta(folder, dtype=getattr(torch, setting.dtype))
    options = Options(
        device=torch.device(setting.device),
        budgets=Budgets(ram_bytes=1, device_bytes=1),
        storage=choose_storage(folder).storage,
        micro_batch_size=1,
        prefetch=PREFETCH,
    )
    request = draft(meta, options).replanner.request
    least = smallest_budgets(request.blocks, on_device=request.on_device)
    layers = [b for b in request.blocks if ".layers." in b.name]
    ahead = PREFETCH * max(b.slot_bytes for b in layers)
    staged = PREFETCH * max(b.file_bytes for b in layers)
    budgets = Budgets(
        ram_bytes=least.ram_bytes + (staged if request.on_device else ahead),
        device_bytes=least.device_bytes + ahead if request.on_device else 0,
    )
    base: Any = assemble(meta, dataclasses.replace(options, budgets=budgets))
    return Trainer(base, setting.device)


def rows_of(setting: Setting, num: int) -> Any:
    """int64 [num, length] on the device."""
    import torch

    made = torch.Generator().manual_seed(2)
    return torch.randint(3, VOCABULARY, (num, setting.length), generator=made).to(setting.device)


def compare(setting: Setting, folder: Path, num_rows: int) -> dict[str, Any]:
    """Both, taking turns, in one process; the first two steps of each are not timed."""
    import torch

    rows = rows_of(setting, num_rows)
    ours, theirs = streamed(setting, folder), in_memory(setting, folder)
    streamer = ours.model.get_base_model().ssdtune
    seconds: dict[str, list[float]] = {"ours": [], "in memory": []}
    off = 0.0
    for turn in range(setting.rounds + 2):
        losses = []
        for name, trainer in (("ours", ours), ("in memory", theirs)):
            loss, took = trainer.step(rows, at_once=name == "ours")
            losses.append(loss)
            if turn >= 2:
                seconds[name].append(took)
        off = max(off, abs(losses[0] - losses[1]))
    plan = streamer.engine.plan
    row = {
        "tokens": num_rows * setting.length,
        "ours_s": statistics.median(seconds["ours"]),
        "in_memory_s": statistics.median(seconds["in memory"]),
        "losses_off_by": off,
        "read_bytes": plan.sequences["train"].read_bytes,
        "slot_bytes": plan.slot_bytes,
        "misses": sum(op.is_miss for op in streamer.engine.trace),
    }
    row["ratio"] = row["ours_s"] / row["in_memory_s"]
    streamer.close()
    if setting.device != "cpu":
        torch.cuda.empty_cache()
    return row


def rates(folder: Path, device: str) -> dict[str, float]:
    """Bytes per second of the drive, as the engine reads, and of the link to the device."""
    import torch

    from ssdtune.probe import measure_copies, measure_reads

    file = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    curves = {"nvme_read": measure_reads(file), **measure_copies(torch.device(device))}
    return {name: curve.rate for name, curve in curves.items()}


def lines(result: dict[str, Any]) -> Iterator[str]:
    """Markdown."""
    told = " · ".join(f"{name} {rate / 1e9:.2f} GB/s" for name, rate in result["rates"].items())
    yield f"{result['device']}: {told}"
    yield "| tokens | in memory | ours | ratio | floor | losses off by | read | misses |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in result["rows"]:
        yield (
            f"| {row['tokens']} | {row['in_memory_s']:.3f} s | {row['ours_s']:.3f} s | {row['ratio']:.2f} "
            f"| {row['floor_s']:.3f} s | {row['losses_off_by']:.1e} | {row['read_bytes'] / 1e9:.2f} GB "
            f"| {row['misses']} |"
        )


def measure(setting: Setting, folder: Path) -> dict[str, Any]:
    """All rows, each with its floor: the longer of the step in memory and of reading at the drive's rate."""
    import torch

    write_model(setting, folder)
    found = rates(folder, setting.device)
    rows = [compare(setting, folder, num) for num in ROWS]
    for row in rows:
        row["floor_s"] = max(row["in_memory_s"], row["read_bytes"] / found["nvme_read"])
        row["of_floor"] = measures.bar(
            f"{row['tokens']} tokens: ours / floor", row["ours_s"] / row["floor_s"], FLOOR_BAR
        )
    name = "cpu" if setting.device == "cpu" else torch.cuda.get_device_name()
    return {"device": name, "setting": dataclasses.asdict(setting), "rates": found, "rows": rows}


def unmet(result: dict[str, Any]) -> list[str]:
    """Bars that are not met, in words."""
    steps = [row["of_floor"] for row in result["rows"]]
    return [
        *(f"{b['bar']}: {b['value']:.2f} (bar {b['limit']:g})" for b in steps if not b["passed"]),
        *unpack_device.unmet(result.get("unpack", [])),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints. 1: a bar is not met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="on the drive to read from")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    setting = Setting(options.device, options.layers, options.width, options.length, options.rounds)
    with tempfile.TemporaryDirectory(prefix="ssdtune-gpu-", dir=options.scratch) as folder:
        result = measure(setting, Path(folder))
    for line in lines(result):
        print(line)
    if setting.device != "cpu":
        result["unpack"] = unpack_device.measure(setting.device, DECODED_MB, DECODING_ROUNDS)
        print("\n".join(unpack_device.lines(result["unpack"])))
    result["unmet"] = unmet(result)
    for line in result["unmet"]:
        print(f"not met: {line}")
    if options.json:
        print(json.dumps(result))
    return int(bool(result["unmet"]))


if __name__ == "__main__":
    sys.exit(main())
