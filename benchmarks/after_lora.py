"""What is left of quantization's cost once LoRA has trained on it: held-out loss before and after, at several widths.

    python -m benchmarks.after_lora [--model FOLDER] [--quantizations none 8 4 nf4 3 3+loftq 2 2+loftq] [--steps 24]
                                    [--eval-rows 10] [--json out.json]

Each row is a run of `ssdtune train` of its own: the same rows in the same order, the same first adapters but where LoftQ
makes them (`+loftq`), rank 16 on all linear layers, 128 tokens a step. The model is SmolLM2 as `off_grid.py` left it,
weights that were never quantized; the text is the quickstart's, the loss that of rows kept out of every training.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, print_result
from benchmarks.off_grid import off_grid_model
from ssdtune.assets import prepare_text
from ssdtune.cache import cache_folder

RANK, LENGTH = 16, 128
DEFAULT = ["none", "8", "4", "nf4", "3", "3+loftq", "2", "2+loftq"]


def trained(config: dict[str, Any], folder: Path) -> dict[str, float]:
    """Held-out loss before and after of one run, which leaves its files in `folder`."""
    written = folder.with_suffix(".yaml")
    written.write_text(json.dumps({**config, "output_dir": str(folder)}) + "\n")
    subprocess.run([sys.executable, "-m", "ssdtune", "train", str(written)], check=True)
    metrics = json.loads((folder / "results.json").read_text())
    return {"before": metrics["eval_loss_first"], "after": metrics["eval_loss"]}


def config_of(model: Path, scratch: Path, num_steps: int, num_eval_rows: int) -> dict[str, Any]:
    """What all runs have in common."""
    text, held_out = prepare_text(cache_folder())
    return {
        "model_name_or_path": str(model),
        "dataset": str(text),
        "eval_dataset": [{"path": str(held_out), "split": f"train[:{num_eval_rows}]"}],
        "dtype": "float32",  # whatever the processor: the base is the same decoded bits in each
        "lora_r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_target_modules": "all-linear",
        "max_length": LENGTH,
        "overlong": "truncate",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": num_steps,
        "learning_rate": 1e-3,
        "warmup_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": num_steps,
        "eval_on_start": True,
        "save_strategy": "no",
        "logging_steps": 10,
        "offload": {"ram": "4GB", "path": str(scratch)},
    }


def main() -> None:
    """Prints a row for each; the last line is JSON."""
    parser = argparse.ArgumentParser(description="Held-out loss before and after LoRA.")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--quantizations", nargs="+", default=DEFAULT)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--eval-rows", type=int, default=10)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    model = asked.model or off_grid_model()
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="after-lora-") as name:
        common = config_of(model, Path(name), asked.steps, asked.eval_rows)
        for asked_for in asked.quantizations:
            quantization, _, init = asked_for.partition("+")
            config = {**common, "quantization": quantization}
            if init:
                config["init_lora_weights"] = init
            rows[asked_for] = trained(config, Path(name) / f"run-{asked_for}")
    whole = rows[asked.quantizations[0]]
    print(f"{'':>8} {'before':>8} {'after':>8}  to {asked.quantizations[0]}")
    for quantization, row in rows.items():
        ratios = [row[key] / whole[key] - 1 for key in ("before", "after")]
        losses = f"{row['before']:8.4f} {row['after']:8.4f}"
        print(f"{quantization:>8} {losses}  {ratios[0]:+.2%} {ratios[1]:+.2%}")
    told: dict[str, Any] = {"model": model.name, "steps": asked.steps, "rows": rows}
    print_result({**told, **describe(model, num_threads=torch.get_num_threads())}, asked.json)


if __name__ == "__main__":
    main()
