"""What `launch/quickstart.sh` runs: a real fine-tuning under a memory budget, told in one page.

It prepares a model and text (`assets`), asks the model one question, trains it with the values of
`configs/quickstart.yaml`, asks again, and prints what the run took. Nothing here is special: the
same happens with `ssdtune train` on any model.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import resource
import statistics
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssdtune import assets, report
from ssdtune.cli import EXIT_USER_ERROR
from ssdtune.errors import SSDTuneError
from ssdtune.sizes import format_size, parse_size

CONFIG = Path("configs/quickstart.yaml")
QUESTION = 'Explain this part of the Python language: The "del" statement.'
ANSWER_TOKENS = 48
BIG_STEPS = 3
BIG_RAM = "1GB"
BIG_FLAGS = ("--max_length", "256", "--per_device_train_batch_size", "1")
LOSSES_AVERAGED = 3  # a single step's loss depends on its rows more than on the training


class QuickstartError(SSDTuneError):
    """The quickstart can't start here."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained on what: folders, files, and the flags that go over the configuration."""

    model: Path
    output: Path
    flags: tuple[str, ...]
    is_big: bool


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """The quickstart's own few options; everything else is a key of the YAML file."""
    parser = argparse.ArgumentParser(
        prog="./launch/quickstart.sh",
        description="Fine-tunes a small real model under a memory budget smaller than its weights.",
    )
    parser.add_argument("--dataset", metavar="FILE", help="your own JSONL, Parquet or CSV file")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps")
    parser.add_argument("--ram", metavar="SIZE", help='most RAM for weights, such as "100MB"')
    parser.add_argument(
        "--big",
        action="store_true",
        help=f"a random 4 GB model under {BIG_RAM}, {BIG_STEPS} steps: the saving is plain to see",
    )
    options = parser.parse_args(argv)
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps {options.steps}: at least 1")
    return options


def make_job(options: argparse.Namespace, cache: Path) -> Job:
    """Names the files that `assets` will make in `cache` and turns options into flags.

    Raises QuickstartError for a data file that isn't there, SizeError for a size that can't be read.
    """
    output = Path("runs/quickstart-big" if options.big else "runs/quickstart")
    model = cache / (assets.BIG_MODEL_NAME if options.big else assets.MODEL_NAME)
    flags = ["--model_name_or_path", str(model), "--output_dir", str(output)]
    flags += ["--resume_from_checkpoint", "false"]  # each quickstart is a fresh one
    held_out: list[str] = []
    if options.dataset is None:
        flags += ["--dataset", str(cache / assets.TRAIN_NAME)]
        held_out = [str(cache / assets.EVAL_NAME)]
    else:
        path = Path(options.dataset).expanduser()
        if not path.is_file():
            raise QuickstartError(f"--dataset {options.dataset}: there is no such file")
        flags += ["--dataset", str(path)]
    if held_out and not options.big:
        flags += ["--eval_dataset", *held_out]
    else:
        flags += ["--eval_dataset", "[]", "--eval_strategy", "no"]
    ram = options.ram or (BIG_RAM if options.big else None)
    if ram:
        parse_size(ram)
        flags += ["--offload.ram", ram]
    steps = options.steps or (BIG_STEPS if options.big else None)
    if steps:
        flags += ["--max_steps", str(steps)]
    flags += BIG_FLAGS if options.big else ()
    return Job(model=model, output=output, flags=tuple(flags), is_big=options.big)


def fingerprint(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file below `folder`."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as stream:
            found[str(path.relative_to(folder))] = hashlib.file_digest(stream, "sha256").hexdigest()
            # Read once: whoever needs the page cache should not lose it to these pages.
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return found


def weights_num_bytes(folder: Path) -> int:
    """Bytes of the model's weights, which is what they take when all are in memory."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def peak_num_bytes() -> int:
    """The most memory that this process has held so far (Linux counts in KiB: getrusage(2))."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def answer(model_folder: Path, *, adapter: Path | None, offload: Any) -> str:
    """The model's greedy answer to QUESTION, its blocks streamed; with the adapter if there is one."""
    import torch
    from transformers import AutoTokenizer

    import ssdtune

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    streamed: Any = ssdtune.stream(model_folder, offload=offload)
    model = streamed
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(streamed, adapter)
    model.eval()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(streamed.device)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    streamed.ssdtune.close()
    start = inputs["input_ids"].shape[1]
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def summarize(result: Any, job: Job, *, budget: int | None, baseline: int) -> report.RunSummary:
    """The run's numbers: losses from its log, speed from its metrics, memory from the kernel.

    result: a `trainer.TrainResult`. baseline: the process's peak before the model was opened.
    """
    losses = [row["loss"] for row in result.log_history if "loss" in row]
    held_out = [row["eval_loss"] for row in result.log_history if "eval_loss" in row]
    if not losses:
        raise QuickstartError("the run logged no loss: did it make a step?")
    peak = peak_num_bytes()
    return report.RunSummary(
        loss_before=statistics.fmean(losses[:LOSSES_AVERAGED]),
        loss_after=statistics.fmean(losses[-LOSSES_AVERAGED:]),
        eval_loss_before=held_out[0] if len(held_out) > 1 else None,
        eval_loss_after=held_out[-1] if len(held_out) > 1 else None,
        tokens_per_s=tokens_per_second(result.metrics),
        weights_bytes=weights_num_bytes(job.model),
        budget_bytes=budget,
        peak_bytes=peak,
        own_peak_bytes=peak - baseline,
    )


def tokens_per_second(metrics: Mapping[str, Any]) -> float | None:
    """As the trainer measured it, or None."""
    found = metrics.get("train_tokens_per_second")
    return None if found is None else float(found)


def show_answer(when: str, text: str) -> None:
    """One answer, wrapped and indented."""
    body = textwrap.fill(text or "(nothing)", width=96, initial_indent="  ", subsequent_indent="  ")
    report.say(f"{when}\n{body}")


def show_next(job: Job) -> None:
    """What to try after this."""
    tries = [
        (f'ssdtune generate {job.output} -p "…"', "ask it yourself"),
        ("./launch/quickstart.sh --big", "a 4 GB model under a 1 GB budget"),
        (
            "./launch/quickstart.sh --dataset my.jsonl",
            "rows with text, prompt + completion or messages",
        ),
        ("ssdtune plan configs/llama3-8b-8gb.yaml", "what a model of your own would need"),
    ]
    shown = [row for row in tries if not (job.is_big and row[0].endswith(("--big", '"…"')))]
    report.say("\nnext\n" + textwrap.indent(report.format_table(shown), "  "))


def train(job: Job, *, asks: bool) -> None:
    """Trains, and reports; the files that it leaves lie in `job.output`."""
    from ssdtune.config import load_config
    from ssdtune.trainer import train_from_config

    loaded = load_config(CONFIG, job.flags)
    offload = loaded.config.offload
    before = fingerprint(job.model)
    baseline = peak_num_bytes()
    if asks:
        show_answer("before", answer(job.model, adapter=None, offload=offload))
    result = train_from_config(loaded)
    if asks:
        show_answer("after", answer(job.model, adapter=job.output, offload=offload))
    run = summarize(result, job, budget=offload.ram, baseline=baseline)
    run = dataclasses.replace(run, files_untouched=fingerprint(job.model) == before)
    report.say("\n" + report.summary_table(run, report.summarize_trace(result.trace)))
    report.draw_loss(result.log_history, job.output / "loss.png")
    report.draw_timeline(result.trace, job.output / "timeline.png")
    report.say(f"\npictures  {job.output / 'loss.png'}  {job.output / 'timeline.png'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Prepares, trains, reports; 0 when all went well. Errors of the user's are four short lines."""
    options = parse_options(sys.argv[1:] if argv is None else argv)
    try:
        cache = assets.cache_folder()
        job = make_job(options, cache)
        assets.prepare(big=options.big, text=options.dataset is None)
        size = format_size(weights_num_bytes(job.model))
        report.say(f"model  {job.model} ({size} of weights)")
        train(job, asks=not job.is_big and options.dataset is None)
    except SSDTuneError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USER_ERROR
    show_next(job)
    return 0


if __name__ == "__main__":
    sys.exit(main())
