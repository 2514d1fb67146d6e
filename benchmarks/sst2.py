"""What is learned in so many forward passes: sentiment of film reviews (SST-2), as MeZO's authors set it up.

    python benchmarks/sst2.py --data FOLDER --json rows.jsonl [--contenders mezo fzoo-adapters lora] [--seeds 0 1 2]
                              [--forwards 3000] [--grid 0.3 1 3 10] [--grid-forwards 600] [--draw curve.png]
    python benchmarks/sst2_table.py rows.jsonl [--draw curve.png]

FOLDER holds sst2_train.tsv and sst2_dev.tsv, a sentence and 0 or 1 a line. A row is "<sentence> It was terrible" or
"great" (templates of arXiv 2305.17333); loss and accuracy are those of `template` and `label_words` in a configuration.
512 rows of each class are drawn by the seed; a forward pass is one of 16 rows; losses and accuracies of the curves are of
all rows of sst2_dev.tsv.

All contenders are treated alike. Each has a base rate; the rates of the grid are its multiples. They run with the first
seed, and the one with the lowest loss on 512 other rows of the training file is taken for all seeds. One whose loss is
no number any more has diverged: it is the worst. Bytes are those that a step would read and write if no block stayed in
memory between visits; here the model stays. Seconds are the processor's, of one thread (OMP_NUM_THREADS=1), which nothing
keeps waiting: what else the machine does meanwhile is not in them.

Rows are written as they come, one JSON object a line. The same command goes on where it was cut: what is in the file is
not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import process_time
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import inputs, machine, sst2_table  # noqa: E402
from benchmarks.sst2_contenders import CONTENDERS, Contender, step_bytes, stepper  # noqa: E402
from ssdtune.zeroth_order.log import ADAPTERS, ALL  # noqa: E402

EVALUATED_AT_ONCE, MICRO_ROWS = 32, 4
TEMPLATE, WORDS = "{text} It was {label}", {"0": "terrible", "1": "great"}
DIVERGED = {"eval_loss": None, "accuracy": None}
Row = dict[str, Any]


# ------------------------------------------------------------------ rows and batches


class Task:
    """Rows of both files, in batches. Rows are as `data.Tokenized` has them."""

    def __init__(self, folder: Path, tokenizer: Any, *, per_class: int) -> None:
        self.train, self.dev = (
            _tokenized(folder / name, tokenizer) for name in ("sst2_train.tsv", "sst2_dev.tsv")
        )
        self.collate = self.dev.collator(tokenizer.eos_token_id)
        self.per_class = per_class

    def drawn(self, seed: int) -> tuple[list[Row], list[Row]]:
        """(rows to learn from, rows to choose a rate by): of each class so many, and half as many others."""
        draw, labels = random.Random(seed), self.train.dataset["label"]
        learned, others = list[Row](), list[Row]()
        for label in (0, 1):
            of_class = [i for i, found in enumerate(labels) if found == label]
            places = draw.sample(of_class, self.per_class + self.per_class // 2)
            rows = [self.train.dataset[i] for i in places]
            learned += rows[: self.per_class]
            others += rows[self.per_class :]
        return learned, others

    def batches(self, rows: Sequence[Row], at_once: int) -> list[Any]:
        """Of rows of like lengths, so that little is padded."""
        ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
        return [self.collate(ordered[k : k + at_once]) for k in range(0, len(ordered), at_once)]


def _tokenized(path: Path, tokenizer: Any) -> Any:
    """The rows of a file without a header, as the product reads them from one with a header."""
    from ssdtune.data import load_dataset_rows, tokenize_rows

    pairs = (line.rsplit("\t", 1) for line in path.read_text().splitlines())
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / f"{path.stem}.jsonl"
        rows.write_text("".join(json.dumps({"text": t, "label": int(n)}) + "\n" for t, n in pairs))
        spec = {"path": str(rows), "template": TEMPLATE, "label_words": WORDS}
        return tokenize_rows(load_dataset_rows(spec), tokenizer)


def look(model: Any, batches: Sequence[Any]) -> dict[str, float | None]:
    """Mean loss, and the share of rows whose word is the likelier one; loss None: it is no number."""
    from torch.nn import functional as F

    from ssdtune.trainer.options import option_scores

    model.eval()
    loss, right, count = 0.0, 0, 0
    for batch in batches:
        with torch.no_grad():
            scores = option_scores(model, batch)
        loss += float(F.cross_entropy(scores, batch["labels"], reduction="sum"))
        right += int((scores.argmax(-1) == batch["labels"]).sum())
        count += len(batch["labels"])
    return {"eval_loss": loss / count if math.isfinite(loss) else None, "accuracy": right / count}


# ------------------------------------------------------------------ one run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A contender's way of so many forward passes. is_grid: to choose the rate by."""

    name: str
    rate: float
    seed: int
    forwards: int
    every: int
    is_grid: bool = False

    @property
    def contender(self) -> Contender:
        """Who runs."""
        return CONTENDERS[self.name]

    def told(self) -> Row:
        """What its rows have in common."""
        return {
            "contender": self.name,
            "how": self.contender.how(),
            "rate": self.rate,
            "seed": self.seed,
            "is_grid": self.is_grid,
            "planned": self.forwards,
        }


def opened(folder: Path, dtype: str, trains: str, seed: int) -> Any:
    """The model, all of it in its slots, with an adapter or not."""
    from peft import LoraConfig, get_peft_model

    import ssdtune

    base: Any = ssdtune.stream(folder, offload={"ram": "4GB"}, dtype=dtype)
    if trains != ADAPTERS:
        return base
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def close(model: Any) -> None:
    """Ends the threads, and frees what the last closed model held: modules hold one another."""
    from ssdtune.visit.base import base_of

    base_of(model).ssdtune.close()
    gc.collect()


def learn(run: Run, model: Any, task: Task, num_rows: int) -> Iterator[Row]:
    """What is seen as forward passes go by; of a run of the grid at its end, on the rows for that."""
    rows, others = task.drawn(run.seed)
    seen_on = task.batches(others if run.is_grid else task.dev.dataset, EVALUATED_AT_ONCE)
    step, draw = stepper(model, run.contender, run.seed), random.Random(run.seed + 1)
    passes, next_look, losses, seconds = run.contender.forwards, run.every, list[float](), 0.0
    num_steps = run.forwards // passes
    for number in range(1, num_steps + 1):
        rate = run.contender.rate_after(run.rate, (number - 1) / num_steps)
        start = process_time()
        losses.append(step(task.batches(draw.sample(rows, num_rows), MICRO_ROWS), rate))
        seconds += process_time() - start
        has_loss = math.isfinite(losses[-1])
        if has_loss and number < num_steps and number * passes < next_look:
            continue
        seen = look(model, seen_on) if has_loss else DIVERGED
        is_last = number == num_steps or seen["eval_loss"] is None
        yield {
            "forwards": number * passes,
            "steps": number,
            "seconds": seconds,
            "loss": sum(losses) / len(losses) if has_loss else None,
            **seen,
            "is_last": is_last,
        }
        if is_last:
            return
        next_look += run.every
        losses.clear()


# ------------------------------------------------------------------ all of them


class Bench:
    """Runs what is missing in the file."""

    def __init__(self, options: Any) -> None:
        from transformers import AutoTokenizer

        self.options = options
        self.dtype, why = _dtype(options)
        print(f"{self.dtype}: {why}")
        self.folder = inputs.in_dtype(options.model, self.dtype, print)
        self.task = Task(
            options.data, AutoTokenizer.from_pretrained(options.model), per_class=options.per_class
        )
        self.record = sst2_table.Record(options.json, self._settings())
        described = machine.describe(self.folder, num_threads=torch.get_num_threads())
        self.place = {name: described[name] for name in ("processor", "threads", "torch", "commit")}

    def _settings(self) -> Row:
        """What all rows of a file have in common."""
        names = ("per_class", "rows", "forwards", "every", "grid_forwards")
        return {
            "model": self.options.model.name,
            "dtype": self.dtype,
            "dev_rows": len(self.task.dev),
            **{name: getattr(self.options, name) for name in names},
        }

    def all(self) -> None:
        """The untuned model, every contender's rate, then seed after seed."""
        if not any(row["contender"] == sst2_table.UNTUNED for row in self.record.rows):
            self._untuned()
        options = self.options
        rates = {name: self._rate(name) for name in options.contenders}
        for seed in options.seeds:
            for name, rate in rates.items():
                if rate is not None:
                    self._run(
                        Run(
                            name=name,
                            rate=rate,
                            seed=seed,
                            forwards=options.forwards,
                            every=options.every,
                        )
                    )

    def _untuned(self) -> None:
        model = opened(self.folder, self.dtype, ALL, 0)
        seen = look(model, self.task.batches(self.task.dev.dataset, EVALUATED_AT_ONCE))
        close(model)
        self.record.add({"contender": sst2_table.UNTUNED, **seen, **self.place})

    def _rate(self, name: str) -> float | None:
        """The best of the grid; None: all have diverged."""
        options, contender = self.options, CONTENDERS[name]
        rates = [contender.rate * factor for factor in options.grid]
        if len(rates) == 1:
            return rates[0]
        losses: dict[float, float] = {}
        for rate in rates:
            run = Run(
                name=name,
                rate=rate,
                seed=options.seeds[0],
                forwards=options.grid_forwards,
                every=options.grid_forwards,
                is_grid=True,
            )
            found = self._run(run)["eval_loss"]
            losses[rate] = math.inf if found is None else found
        best = min(losses, key=lambda rate: losses[rate])
        told = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in losses.items())
        print(f"{name}: {told}", flush=True)
        return best if math.isfinite(losses[best]) else None

    def _run(self, run: Run) -> Row:
        """Its last row."""
        if (done := self.record.end_of(run.told())) is not None:
            return done
        moved = step_bytes(self.folder, self.dtype, run.contender)
        model = opened(self.folder, self.dtype, run.contender.trains, run.seed)
        row: Row = {}
        try:
            for seen in learn(run, model, self.task, self.options.rows):
                row = {**run.told(), **seen, "bytes": seen["steps"] * moved, **self.place}
                self.record.add(row)
        finally:
            close(model)
        return row


def _dtype(options: Any) -> tuple[str, str]:
    """What is asked for, or the faster one on this machine, and why."""
    if options.dtype != "auto":
        return options.dtype, "asked for"
    width = json.loads((options.model / "config.json").read_text())["hidden_size"]
    rates = {
        dtype: machine.matmul_flops_per_s(dtype, rows=options.rows * 32, width=width)
        for dtype in machine.DTYPES
    }
    return machine.choose_dtype("auto", rates)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = inputs.cache_folder() / "smollm2-135m-instruct"
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True, help="rows, one a line; goes on")
    parser.add_argument("--model", type=Path, default=default)
    parser.add_argument("--dtype", choices=("auto", *machine.DTYPES), default="auto")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--forwards", type=int, default=3000, help="of each run, at most")
    parser.add_argument("--every", type=int, default=300, help="forwards between two looks")
    parser.add_argument("--grid", type=float, nargs="+", default=[0.3, 1.0, 3.0, 10.0])
    parser.add_argument("--grid-forwards", type=int, default=600)
    parser.add_argument("--per-class", type=int, default=512, help="rows to learn from")
    parser.add_argument("--rows", type=int, default=16, help="of a forward pass")
    parser.add_argument("--draw", type=Path, help="the curves, a PNG")
    options = parser.parse_args(argv)
    largest = max(CONTENDERS[name].forwards for name in options.contenders)
    if min(options.forwards, options.grid_forwards) < largest:
        parser.error(f"a step takes up to {largest} forwards: give as many or more")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Learns, looks, writes, prints the table."""
    options = parsed(argv)
    bench = Bench(options)
    bench.all()
    print(*sst2_table.lines(bench.record), sep="\n")
    if options.draw:
        sst2_table.draw(bench.record, options.draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
