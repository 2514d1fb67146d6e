"""SmolLM2 with weights that were never quantized: trained in full, in memory, fp32, until its 4-bit grid is gone.

    python benchmarks/off_grid.py [--steps 300]

The only real weights at hand come out of a 4-bit file, and quantizing them again proves nothing. So the whole model is
trained on the text of the quickstart for a few hundred steps, AdamW moving each weight by many steps of the old grid.
Written to the cache, once; prints how far 4-bit codes in groups of 32 are from the weights before and after.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from ssdtune.assets import built_beside, prepare_model, prepare_text  # noqa: E402
from ssdtune.cache import cache_folder  # noqa: E402
from ssdtune.kernels.affine import Affine  # noqa: E402
from ssdtune.kernels.quantize import quantize_affine  # noqa: E402

NAME = "smollm2-135m-off-grid"
ROWS, LENGTH = 2, 128
LEARNING_RATE, WARM_UP = 2e-4, 20
GRID_IS_GONE = 5e-3  # relative squared error of affine 4-bit codes in groups of 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    folder = off_grid_model(options.steps)
    print(f"{folder}: 4-bit codes in groups of 32 are off by {grid_error(folder):.2e}")


def off_grid_model(num_steps: int = 300) -> Path:
    """The model's folder, trained now where it is not there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = cache_folder() / NAME
    if (target / "config.json").is_file():
        return target
    source, _ = prepare_model(cache_folder(), say=print), prepare_text(cache_folder())
    print(f"{source}: 4-bit codes in groups of 32 are off by {grid_error(source):.2e}", flush=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for step, batch in enumerate(batches(tokenizer, num_steps)):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step} of {num_steps}: loss {float(loss):.3f}", flush=True)
    with built_beside(target) as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return target


def batches(tokenizer: Any, count: int) -> Iterator[torch.Tensor]:
    """int64 [ROWS, LENGTH] each, windows of the training text in an order of their own."""
    ids = text_ids(tokenizer, cache_folder() / "python-topics.jsonl")
    order = random.Random(0)
    for _ in range(count):
        starts = [order.randrange(len(ids) - LENGTH) for _ in range(ROWS)]
        yield torch.tensor([ids[at : at + LENGTH] for at in starts])


def text_ids(tokenizer: Any, file: Path) -> list[int]:
    """All answers of a file of chats, one after the other."""
    ids: list[int] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        ids += tokenizer(row["messages"][-1]["content"] + "\n")["input_ids"]
    return ids


def grid_error(folder: Path) -> float:
    """Relative squared error of the layers' matrices as affine 4-bit codes in groups of 32."""
    from safetensors import safe_open

    wrong = right = 0.0
    format = Affine(4, (4,), 32)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                if ".layers." not in name or not name.endswith("proj.weight"):
                    continue
                weight = opened.get_tensor(name).float()
                parts = quantize_affine(weight, format.order, format.group)
                found = torch.empty_like(weight)
                format.by_torch([parts[p.suffix] for p in format.parts(weight.shape)], found)
                wrong += float((found - weight).square().sum())
                right += float(weight.square().sum())
    return wrong / right


if __name__ == "__main__":
    main()
