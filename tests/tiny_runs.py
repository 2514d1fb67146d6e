"""What short runs begin with: a tokenizer, a tiny Llama that goes with it, rows, a trainer's arguments."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets.config
import tiny_models
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ssdtune.trainer import SSDConfig

CHECKOUT = Path(__file__).parent.parent
VOCAB = 400  # of models: more ids than the tokenizer gives
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|return|>", "<s>"]
CORPUS = ["the sky is blue and the grass is green", "what colour is it", "user assistant system"]


# ------------------------------------------------------------------ tokenizer and model


def make_tokenizer(
    template: str | None = CHATML, *, bos: bool = False, trim_offsets: bool = False, **special: str
) -> Any:
    """Bytes and the merges of CORPUS. bos: texts begin with <s>. special: further special tokens by their role."""
    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos:
        pair = ("<s>", backend.token_to_id("<s>"))
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[pair]))
    backend.post_processor = processors.Sequence(steps)
    special = {"eos_token": "<|im_end|>", **special}
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return tokenizer


def llama(seed: int = 1, *, dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    """Random weights; the same for the same seed. sizes: of the config, where they are not `tiny_models.SMALL`'s."""
    torch.manual_seed(seed)
    config = tiny_models.small(LlamaConfig, **{"vocab_size": VOCAB, **sizes})
    return tiny_models.auto_class("llama").from_config(config, dtype=dtype)


def save(model: Any, folder: Path, **how: Any) -> Path:
    """The model with the tokenizer. how: as `tiny_models.save` takes it."""
    tiny_models.save(model, folder, **how)
    make_tokenizer().save_pretrained(folder)
    return folder


# ------------------------------------------------------------------ rows


@contextlib.contextmanager
def own_datasets_cache(folder: Path) -> Iterator[None]:
    """Tokenized rows are cached; for a `with` block in this folder, not in the user's cache."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A line of JSON for each row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(num: int) -> list[dict[str, Any]]:
    """Rows of three lengths, made of what the tokenizer knows."""
    return [{"text": "the sky is blue and the grass is green " * (1 + k % 3)} for k in range(num)]


# ------------------------------------------------------------------ trainers


def arguments(folder: Path, **more: Any) -> SSDConfig:
    """Of a short run that saves nothing; more: what differs."""
    given: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
    }
    return SSDConfig(output_dir=str(folder), **{**given, **more})


def in_order(trainer: Any) -> Any:
    """The trainer, its rows not shuffled."""
    trainer._get_train_sampler = lambda rows=None: SequentialSampler(trainer.train_dataset)
    return trainer


# ------------------------------------------------------------------ several processes


def launch(num_processes: int, *runs: Sequence[str]) -> str:
    """What `launch/train.py` prints, started by torchrun once, of one run after the other. runs: their flags."""
    script = Path(__file__).parent / "launched_runs.py"
    torchrun = f"torch.distributed.run --nproc_per_node={num_processes} --standalone"
    return started(torchrun, script, json.dumps(runs))


def started(launcher: str, script: Path, *words: str) -> str:
    """What a script prints that `python -m LAUNCHER` starts, in a process that finds this checkout."""
    done = subprocess.run(
        [sys.executable, "-m", *launcher.split(), str(script), *words],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
