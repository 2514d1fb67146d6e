"""What is left of quantization's cost once LoRA has trained on it: held-out loss before and after, at several widths.

    python -m benchmarks.after_lora [--model FOLDER] [--quantizations none 8 4 nf4 3 2] [--steps 60] [--json out.json]

Each row is a run of `ssdtune train` of its own: the same rows in the same order, the same first adapters, rank 16 on all
linear layers, 2 x 256 tokens a step. The model is SmolLM2 as `off_grid.py` left it, weights that were never quantized;
the text is the quickstart's, the loss that of the rows kept out of every training.
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

from benchmarks.machine import describe
from benchmarks.off_grid import off_grid_model
from ssdtune.assets import prepare_text
from ssdtune.cache import cache_folder

RANK, ROWS, LENGTH = 16, 2, 256


def trained(model: Path, quantization: str, steps: int, folder: Path) -> dict[str, float]:
    """Held-out loss before and after of one run."""
    text, held_out = prepare_text(cache_folder())
    keys = {
        "model_name_or_path": model,
        "dataset": text,
        "eval_dataset": held_out,
        "output_dir": folder,
        "quantization": quantization,
        "dtype": "float32",  # whatever the processor: the base is the same decoded bits in each
        "lora_r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_target_modules": "all-linear",
        "max_length": LENGTH,
        "overlong": "truncate",
        "per_device_train_batch_size": ROWS,
        "per_device_eval_batch_size": ROWS,
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "learning_rate": 2e-4,
        "warmup_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": steps,
        "eval_on_start": "true",
        "save_strategy": "no",
        "logging_steps": 10,
        "offload.ram": "4GB",
        "offload.path": folder.parent,
    }
    config = folder.with_suffix(".yaml")
    config.write_text(json.dumps({"model_name_or_path": str(model)}) + "\n")
    flags = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    subprocess.run([sys.executable, "-m", "ssdtune", "train", str(config), *flags], check=True)
    metrics = json.loads((folder / "results.json").read_text())
    metrics = metrics.get("metrics", metrics)
    return {"before": metrics["eval_loss_first"], "after": metrics["eval_loss"]}


def main() -> None:
    """Prints a row for each; the last line is JSON."""
    parser = argparse.ArgumentParser(description="Held-out loss before and after LoRA.")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--quantizations", nargs="+", default=["none", "8", "4", "nf4", "3", "2"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    model = asked.model or off_grid_model()
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="after-lora-") as scratch:
        for quantization in asked.quantizations:
            rows[quantization] = trained(
                model, quantization, asked.steps, Path(scratch) / f"run-{quantization}"
            )
    whole = rows[asked.quantizations[0]]
    print(f"{'':>8} {'before':>8} {'after':>8}  to {asked.quantizations[0]}")
    for name, row in rows.items():
        ratios = [row[key] / whole[key] - 1 for key in ("before", "after")]
        print(
            f"{name:>8} {row['before']:8.4f} {row['after']:8.4f}  {ratios[0]:+.2%} {ratios[1]:+.2%}"
        )
    told: dict[str, Any] = {"model": model.name, "steps": asked.steps, "rows": rows}
    result = json.dumps({**told, **describe(model, num_threads=torch.get_num_threads())})
    if asked.json:
        asked.json.write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()
