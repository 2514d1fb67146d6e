"""What is learned in so many forward passes: sentiment of film reviews (SST-2), as MeZO's authors set it up.

    python benchmarks/sst2.py --data FOLDER [--method mezo|fzoo|lozo|lora] [--trains all|adapters]
                              [--forwards 600] [--learning-rate X] [--seeds 0 1 2] [--json out.json]

FOLDER holds sst2_train.tsv and sst2_dev.tsv, a sentence and 0 or 1 a line. A row is "<sentence> It was", the answer
" terrible" or " great" (templates of arXiv 2305.17333), the loss that of the answer, the guess the likelier of the two.
512 rows of each class are drawn by the seed; a forward pass is one of 16 rows; accuracy is of all rows of sst2_dev.tsv.
A step of gradients (lora) counts three: its forward, the recomputed one and a backward of about as much.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import inputs  # noqa: E402

PER_CLASS, ROWS, EVALUATED_AT_ONCE = 512, 16, 32
WORDS = (" terrible", " great")
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
Row = tuple[list[int], int]  # ids of the prompt, class


class Task:
    """Rows as ids, batches, accuracy."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in WORDS]
        self.pad = tokenizer.eos_token_id
        self.train, self.dev = (
            [self._row(tokenizer, line) for line in (folder / name).read_text().splitlines()]
            for name in ("sst2_train.tsv", "sst2_dev.tsv")
        )

    @staticmethod
    def _row(tokenizer: Any, line: str) -> Row:
        sentence, label = line.rsplit("\t", 1)
        prompt = tokenizer(f"{sentence.strip()} It was", add_special_tokens=False)["input_ids"]
        return prompt, int(label)

    def drawn(self, seed: int) -> list[Row]:
        """PER_CLASS rows of each class."""
        draw = random.Random(seed)
        of_class = ([row for row in self.train if row[1] == label] for label in (0, 1))
        return [row for rows in of_class for row in draw.sample(rows, PER_CLASS)]

    def batch(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Prompts with their answers, the answers trained."""
        import torch

        length = max(len(prompt) for prompt, _ in rows) + 1
        ids, mask, labels = [], [], []
        for prompt, label in rows:
            spare = length - len(prompt) - 1
            ids.append([*prompt, self.words[label], *[self.pad] * spare])
            mask.append([1] * (len(prompt) + 1) + [0] * spare)
            labels.append([-100] * len(prompt) + [self.words[label]] + [-100] * spare)
        named = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: torch.tensor(values) for name, values in named.items()}

    def accuracy(self, model: Any) -> float:
        """Share of the dev rows whose word is the likelier one."""
        import torch

        model.eval()
        ordered = sorted(self.dev, key=lambda row: len(row[0]))
        right = 0
        for at in range(0, len(ordered), EVALUATED_AT_ONCE):
            rows = ordered[at : at + EVALUATED_AT_ONCE]
            batch = self.batch(rows)
            with torch.no_grad():
                made = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                last = torch.tensor([len(prompt) - 1 for prompt, _ in rows])
                logits = made.logits[torch.arange(len(rows)), last][:, self.words]
            right += int((logits.argmax(-1) == torch.tensor([label for _, label in rows])).sum())
        return right / len(self.dev)


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
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.detach())

        return by_gradients, PASSES_OF_GRADIENTS
    estimator: Any = {"mezo": MeZO, "fzoo": FZOO, "lozo": LOZO}[options.method](eps=options.eps)
    method = ZerothOrder(model, estimator, seed=seed)

    def by_losses(batch: Any) -> float:
        return method.step([lambda: model(**batch)], learning_rate=rate).loss

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
        losses.append(step(task.batch(draw.sample(rows, ROWS))))
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
