"""What is learned in so many forward passes: sentiment of film reviews (SST-2), as MeZO's authors set it up.

    python benchmarks/sst2.py --data FOLDER [--method mezo|fzoo|lozo|lora] [--trains all|adapters]
                              [--forwards 600] [--learning-rate X] [--seeds 0 1 2] [--json out.json]

FOLDER holds sst2_train.tsv and sst2_dev.tsv, a sentence and 0 or 1 a line. A row is "<sentence> It was terrible" or
"great" (templates of arXiv 2305.17333); loss and accuracy are those of `template` and `label_words` in a configuration.
512 rows of each class are drawn by the seed; a forward pass is one of 16 rows; accuracy is of all rows of sst2_dev.tsv.
A step of gradients (lora) counts three: its forward, the recomputed one and a backward of about as much.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import inputs  # noqa: E402

PER_CLASS, ROWS, EVALUATED_AT_ONCE = 512, 16, 32
TEMPLATE, WORDS = "{text} It was {label}", {"0": "terrible", "1": "great"}
RATES = {  # where nothing is said
    ("mezo", "all"): 1e-6,
    ("lozo", "all"): 1e-6,
    ("fzoo", "all"): 1e-5,
    ("mezo", "adapters"): 1e-4,
    ("lozo", "adapters"): 1e-4,
    ("fzoo", "adapters"): 1e-3,
    ("lora", "adapters"): 3e-4,
}
PASSES_OF_GRADIENTS = 3
Row = dict[str, Any]  # as `data.Tokenized` has it


class Task:
    """Rows of both files, batches, loss, accuracy."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.train, self.dev = (
            _tokenized(folder / name, tokenizer) for name in ("sst2_train.tsv", "sst2_dev.tsv")
        )
        self.collate = self.dev.collator(tokenizer.eos_token_id)

    def drawn(self, seed: int) -> list[Row]:
        """PER_CLASS rows of each class."""
        draw, labels = random.Random(seed), self.train.dataset["label"]
        of_class = ([i for i, found in enumerate(labels) if found == k] for k in (0, 1))
        return [self.train.dataset[i] for rows in of_class for i in draw.sample(rows, PER_CLASS)]

    def accuracy(self, model: Any) -> float:
        """Share of the dev rows whose word is the likelier one."""
        import torch

        from ssdtune.trainer.options import option_scores

        model.eval()
        ordered = sorted(self.dev.dataset, key=lambda row: len(row["input_ids"]))
        right = 0
        for at in range(0, len(ordered), EVALUATED_AT_ONCE):
            batch = self.collate(ordered[at : at + EVALUATED_AT_ONCE])
            with torch.no_grad():
                scores = option_scores(model, batch)
            right += int((scores.argmax(-1) == batch["labels"]).sum())
        return right / len(self.dev)


def _tokenized(path: Path, tokenizer: Any) -> Any:
    """The rows of a file without a header, as the product reads them from one with a header."""
    from ssdtune.data import load_dataset_rows, tokenize_rows

    pairs = (line.rsplit("\t", 1) for line in path.read_text().splitlines())
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / f"{path.stem}.jsonl"
        rows.write_text("".join(json.dumps({"text": t, "label": int(n)}) + "\n" for t, n in pairs))
        spec = {"path": str(rows), "template": TEMPLATE, "label_words": WORDS}
        return tokenize_rows(load_dataset_rows(spec), tokenizer)


def mean_loss(model: Any, batch: Any) -> Any:
    """Cross-entropy of the rows' options."""
    from torch.nn import functional as F

    from ssdtune.trainer.options import option_scores

    return F.cross_entropy(option_scores(model, batch), batch["labels"])


def opened(folder: Path, trains: str, seed: int) -> Any:
    """The model, all of it in its slots, with an adapter or not."""
    import torch
    from peft import LoraConfig, get_peft_model

    import ssdtune

    base: Any = ssdtune.stream(folder, offload={"ram": "4GB"}, dtype="float32")
    if trains == "all":
        return base
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def stepper(model: Any, options: Any, rate: float, seed: int) -> tuple[Callable[[Any], float], int]:
    """A function that takes a step on a batch and returns its loss, and the forward passes that it counts."""
    import torch

    from ssdtune.zeroth_order import FZOO, LOZO, MeZO, ZerothOrder

    if options.method == "lora":
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)

        def by_gradients(batch: Any) -> float:
            model.train()
            loss = mean_loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.detach())

        return by_gradients, PASSES_OF_GRADIENTS
    estimator: Any = {"mezo": MeZO, "fzoo": FZOO, "lozo": LOZO}[options.method](eps=options.eps)
    method = ZerothOrder(model, estimator, seed=seed)

    def by_losses(batch: Any) -> float:
        return method.step([lambda: mean_loss(model, batch)], learning_rate=rate).loss

    return by_losses, len(estimator.variants)


def learn(folder: Path, task: Task, options: Any, seed: int) -> Iterator[dict[str, Any]]:
    """Yields accuracy and loss as forward passes go by."""
    rate = options.learning_rate or RATES[options.method, options.trains]
    model = opened(folder, options.trains, seed)
    rows, draw = task.drawn(seed), random.Random(seed + 1)
    step, passes = stepper(model, options, rate, seed)
    done, losses, start = 0, list[float](), perf_counter()
    yield {"seed": seed, "forwards": 0, "accuracy": task.accuracy(model)}
    next_look = options.every
    while done < options.forwards:
        losses.append(step(task.collate(draw.sample(rows, ROWS))))
        done += passes
        if done >= next_look or done >= options.forwards:
            next_look += options.every
            seconds = perf_counter() - start
            yield {
                "seed": seed,
                "forwards": done,
                "seconds": seconds,
                "loss": sum(losses) / len(losses),
                "accuracy": task.accuracy(model),
            }
            losses.clear()
            start += perf_counter() - start - seconds  # looking is not learning
    (model.get_base_model() if hasattr(model, "get_base_model") else model).ssdtune.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Learns, looks, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = inputs.cache_folder() / "smollm2-135m-instruct"
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=default)
    parser.add_argument("--method", choices=("mezo", "fzoo", "lozo", "lora"), default="mezo")
    parser.add_argument("--trains", choices=("all", "adapters"), default="adapters")
    parser.add_argument("--forwards", type=int, default=600)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    from transformers import AutoTokenizer

    folder = inputs.in_dtype(options.model, "float32", lambda line: None)
    task = Task(options.data, AutoTokenizer.from_pretrained(options.model))
    error = math.sqrt(0.25 / len(task.dev))
    print(f"{options.method}, {options.trains}: standard error of an accuracy {error:.1%}")
    found = []
    for seed in options.seeds:
        for row in learn(folder, task, options, seed):
            found.append(row)
            print(json.dumps(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
