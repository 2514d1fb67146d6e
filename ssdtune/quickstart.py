"""What `launch/quickstart.sh` runs: a real fine-tuning under a memory budget, told in one page.

It prepares a model and text (`assets`), finds a pace for this processor (`pace`), asks the model
one question, trains it with the values of `configs/quickstart.yaml`, asks again, and prints what
the run took. Nothing here is special: the same happens with `ssdtune train` on any model.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import resource
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune import assets, pace, report
from ssdtune.cache import cache_folder
from ssdtune.cli import EXIT_INTERRUPTED, EXIT_USER_ERROR
from ssdtune.errors import SSDTuneError
from ssdtune.sizes import parse_size

if TYPE_CHECKING:
    from ssdtune.config import Loaded

CONFIG = Path("configs/quickstart.yaml")
QUESTION = 'Explain this part of the Python language: The "del" statement.'
ANSWER_TOKENS = 32
BIG_STEPS = 3
BIG_RAM = "1GB"


class QuickstartError(SSDTuneError):
    """The quickstart can't start here."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained on what. flags: over the configuration; the pace's come before them."""

    model: Path
    output: Path
    flags: tuple[str, ...]
    eval_path: str | None
    is_big: bool

    @property
    def asks(self) -> bool:
        """Whether QUESTION is put before and after: it is about the reference, to a real model."""
        return self.eval_path is not None


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """The quickstart's own few options; everything else is a key of the YAML file."""
    parser = argparse.ArgumentParser(
        prog="./launch/quickstart.sh",
        description="Fine-tunes a small real model under a memory budget smaller than its weights.",
    )
    parser.add_argument("--dataset", metavar="FILE", help="your own JSONL, Parquet or CSV file")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps")
    parser.add_argument("--ram", metavar="SIZE", help='most RAM for weights, such as "150MB"')
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
    dataset = cache / assets.TRAIN_NAME
    if options.dataset is not None:
        dataset = Path(options.dataset).expanduser()
        if not dataset.is_file():
            raise QuickstartError(f"--dataset {options.dataset}: there is no such file")
    flags = ["--model_name_or_path", str(model), "--dataset", str(dataset)]
    flags += ["--output_dir", str(output)]
    flags += ["--resume_from_checkpoint", "false"]  # each quickstart is a fresh one
    ram = options.ram or (BIG_RAM if options.big else None)
    if ram:
        parse_size(ram)
        flags += ["--offload.ram", ram]
    steps = options.steps or (BIG_STEPS if options.big else None)
    if steps:
        flags += ["--max_steps", str(steps)]
    has_own_eval = options.dataset is None and not options.big
    return Job(
        model=model,
        output=output,
        flags=tuple(flags),
        eval_path=str(cache / assets.EVAL_NAME) if has_own_eval else None,
        is_big=options.big,
    )


def pace_flags(job: Job) -> list[str]:
    """The number format and the size of the run for this processor; says what was measured.

    A GPU is fast enough for the largest run in the model's own format: nothing is measured there.
    """
    import torch

    if torch.cuda.is_available():
        rung = pace.LADDER[0]
        return pace.flags(rung, eval_path=job.eval_path) if not job.is_big else pace.big_flags(1e6)
    gflops = {name: pace.measure_gflops(name) for name in ("bfloat16", "float32")}
    dtype = pace.choose_dtype(gflops)
    rates = ", ".join(f"{name} {rate:.3g} GFLOP/s" for name, rate in gflops.items())
    report.say(f"training  {rates}: computing in {dtype}")
    if job.is_big:
        return ["--dtype", dtype, *pace.big_flags(gflops[dtype])]
    rung = pace.choose_rung(gflops[dtype])
    return ["--dtype", dtype, *pace.flags(rung, eval_path=job.eval_path)]


def fingerprint(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file below `folder`."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as stream:
            found[str(path.relative_to(folder))] = hashlib.file_digest(stream, "sha256").hexdigest()
            # Read once: whoever needs the page cache should not lose it to these pages.
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return found


def file_num_bytes(folder: Path) -> int:
    """Bytes of the model's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def peak_num_bytes() -> int:
    """The most memory that this process has held so far (Linux counts in KiB: getrusage(2))."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ask_untrained(loaded: Loaded) -> None:
    """Prints the model's answer to QUESTION before training, its blocks streamed."""
    from ssdtune.generate import answer
    from ssdtune.trainer.opening import open_model
    from ssdtune.trainer.rows import load_tokenizer

    model: Any = open_model(loaded.config)
    try:
        tokenizer = load_tokenizer(loaded.config)
        answer(model.eval(), tokenizer, [QUESTION], max_new_tokens=ANSWER_TOKENS)
    finally:
        model.ssdtune.close()


def ask_trained(loaded: Loaded) -> None:
    """The same with the adapter that the run saved."""
    from ssdtune.generate import answer, open_adapter

    model, tokenizer = open_adapter(loaded.config, loaded.config.output_dir)
    try:
        answer(model, tokenizer, [QUESTION], max_new_tokens=ANSWER_TOKENS)
    finally:
        model.ssdtune.close()


def show_next(job: Job) -> None:
    """What to try after this."""
    own = "rows with text, prompt + completion or messages"
    tries = [
        ("./launch/quickstart.sh --dataset my.jsonl", own),
        ("ssdtune plan configs/llama3-8b-8gb.yaml", "what a model of your own would need"),
    ]
    if not job.is_big:
        question = (f'ssdtune generate {job.output} -p "…"', "ask it yourself")
        big = ("./launch/quickstart.sh --big", f"a 4 GB model under a {BIG_RAM} budget")
        tries = [question, big, *tries]
    report.say("\nnext\n" + textwrap.indent(report.format_table(tries), "  "))


def run(job: Job) -> None:
    """Asks, trains, asks again and reports; the files that it leaves lie in `job.output`."""
    from ssdtune.config import load_config
    from ssdtune.trainer import train_from_config

    report.hush_libraries()
    loaded = load_config(CONFIG, [*pace_flags(job), *job.flags])
    files = fingerprint(job.model)
    for name in ("datasets", "peft", "transformers.trainer"):
        importlib.import_module(name)  # now, so that what they take doesn't count as the model's
    before = peak_num_bytes()
    if job.asks:
        report.say(f"\nbefore training: {QUESTION}")
        ask_untrained(loaded)
        report.say()
    result = train_from_config(loaded, tells_summary=False)  # the table says it
    in_files = file_num_bytes(job.model)  # in bfloat16, both models
    memory = report.Memory(
        weights=in_files * 2 if loaded.config.dtype == "float32" else in_files,
        files=in_files,
        budget=loaded.config.offload.ram,
        peak=peak_num_bytes(),
        before=before,
    )
    if job.asks:
        report.say(f"\nafter training: {QUESTION}")
        ask_trained(loaded)
    is_untouched = fingerprint(job.model) == files
    report.say("\n" + report.summary_table(result.metrics, memory, files_untouched=is_untouched))
    pictures = job.output / "loss.png", job.output / "timeline.png"
    report.draw_loss(result.log_history, pictures[0])
    report.draw_timeline(result.trace, pictures[1])
    report.say(f"\npictures  {pictures[0]}  {pictures[1]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Prepares, trains, reports; 0 when all went well. Errors of the user's are four short lines."""
    options = parse_options(sys.argv[1:] if argv is None else argv)
    try:
        job = make_job(options, cache_folder())
        assets.prepare(big=options.big, text=options.dataset is None)
        run(job)
    except SSDTuneError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return EXIT_INTERRUPTED
    show_next(job)
    return 0


if __name__ == "__main__":
    sys.exit(main())
