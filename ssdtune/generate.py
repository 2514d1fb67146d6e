"""Let a trained model answer: the base streamed, the adapter beside it or the run's steps taken, greedy decoding.

Every token reads the whole model once, so that several prompts are answered side by side in one
batch, padded on the left.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune.errors import SSDTuneError
from ssdtune.report import hush_libraries, say
from ssdtune.run_files import CONFIG_NAME, LOG_NAME
from ssdtune.trainer.checkpoint import differences, newest, read_identity
from ssdtune.trainer.opening import open_model
from ssdtune.trainer.rows import load_tokenizer
from ssdtune.visit.base import weights_of

if TYPE_CHECKING:
    from ssdtune.config import TrainConfig

ADAPTER_NAME = "adapter_config.json"


class GenerateError(SSDTuneError):
    """A folder that holds no trained adapter, or one of another base model."""


def generate_from_run(
    run: Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    overrides: Sequence[str] = (),
) -> list[str]:
    """Prints and returns the answer to each prompt.

    run: a run's `output_dir`, or one of its checkpoints. prompts: user messages where the tokenizer
    has a chat template, else texts to be continued. overrides: flags over the run's own
    configuration, such as ["--offload.ram", "4GB"]. Raises GenerateError.
    """
    from transformers.utils import logging

    from ssdtune.config import load_config

    logging.set_verbosity_error()
    hush_libraries()
    folder = find_adapter(run)
    path = config_of(run, folder)
    config = load_config(path, overrides).config
    _check_bits(load_config(path).config, config)
    model, tokenizer = open_adapter(config, folder)
    try:
        answers = answer(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    finally:
        model.ssdtune.close()
    if len(prompts) > 1:  # a single answer was printed while it came
        for prompt, text in zip(prompts, answers, strict=True):
            say(f"> {prompt}\n{text}")
    return answers


def find_adapter(run: Path) -> Path:
    """The folder with the adapter: the run's own, else its newest checkpoint."""
    run = Path(run)
    has_own = (run / ADAPTER_NAME).is_file() or _makes_all_weights(run / LOG_NAME)
    found = run if has_own else find_result(run)
    if not run.is_dir():
        raise GenerateError(f"there is no folder {run}.\nGive the output_dir of a run.")
    if found is None:
        is_run = (run / CONFIG_NAME).is_file()
        way_out = (
            f"Train first: ssdtune train {run / CONFIG_NAME}"
            if is_run
            else "Give the output_dir of a run."
        )
        raise GenerateError(
            f"{run} holds no adapter ({ADAPTER_NAME}) and no whole checkpoint.\n{way_out}"
        )
    if found != run:
        say(f"note: the run is not finished; {found.name} answers")
    return found


def _makes_all_weights(log: Path) -> bool:
    """Whether a log is there, and is no adapter's: that one is in its checkpoints until the run is finished."""
    from ssdtune.zeroth_order.log import ADAPTERS, read_log

    return log.is_file() and read_log(log.read_bytes(), str(log)).header.trains != ADAPTERS


def find_result(run: Path, *names: str) -> Path | None:
    """The run's own folder, where one of these files is in it; else its newest whole checkpoint, if there is one."""
    if any((run / name).is_file() for name in names):
        return run
    return newest(run) if run.is_dir() else None


def config_of(run: Path, folder: Path) -> Path:
    """The configuration of a run whose result, or checkpoint, is in `folder`."""
    for place in (folder, run):
        if (place / CONFIG_NAME).is_file():
            return place / CONFIG_NAME
    raise GenerateError(
        f"{run} has no {CONFIG_NAME}, so its base model is not known.\n"
        "Give a folder that `ssdtune train` made. What a ZOTrainer in Python has trained, model.save_pretrained(folder) "
        "writes."
    )


def _check_bits(before: TrainConfig, config: TrainConfig) -> None:
    """Raises GenerateError for other bits of the run's model, before it is packed in them."""
    is_same_model = before.model_name_or_path == config.model_name_or_path
    if is_same_model and before.quantization != config.quantization:
        raise GenerateError(
            f"quantization: {config.quantization}, but the run was trained with {before.quantization}: in other bits "
            "the base has other weights.\nLeave out --quantization."
        )


def open_adapter(config: TrainConfig, folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer): the base streamed, with the adapter, in eval mode. Raises GenerateError."""
    from peft import PeftModel

    base = open_model(config)
    try:
        _check_base(read_identity(folder), base, config, folder)
        if (folder / ADAPTER_NAME).is_file():
            model: Any = PeftModel.from_pretrained(base, os.fspath(folder))
        else:
            model = _replayed(base, config, folder)
        has_own = (folder / "tokenizer_config.json").is_file()
        return model.eval(), load_tokenizer(config, folder if has_own else None)
    except BaseException:
        base.ssdtune.close()
        raise


def _check_base(
    trained_on: Mapping[str, Any], base: Any, config: TrainConfig, folder: Path
) -> None:
    """Raises GenerateError where the base's weights are not those that training saw: other files, or the same codes in
    other bits. trained_on: what is known of them; no `base`: a model in memory, nobody knows."""
    said = differences(weights_of(base), trained_on) if trained_on.get("base") else []
    if said:
        raise GenerateError(
            f"{folder} was trained on other weights than those of {config.model_name_or_path} with quantization: "
            f"{config.quantization}: {said[0]}.\n"
            "Leave out --quantization, or give the right base: --model_name_or_path FOLDER."
        )


def _replayed(base: Any, config: TrainConfig, folder: Path) -> Any:
    """The base with the steps of a log of all weights."""
    from ssdtune.zeroth_order.log import read_log
    from ssdtune.zeroth_order.method import replayed

    path = folder / LOG_NAME
    log = read_log(path.read_bytes(), str(path))
    # A run that is not finished says it nowhere else.
    known = {"base": log.header.base, "reading": log.header.reading}
    _check_base(known, base, config, folder)
    replayed(base, log)
    say(
        f"note: a block that is read takes all {log.num_steps:,} steps of the run again, for every token; `ssdtune replay` "
        "writes the weights once"
    )
    return base


def answer(model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """The greedy continuation of each prompt, special tokens left out, all in one batch.

    Of a single prompt each word is printed as soon as it is there: a token may take seconds.
    """
    import torch
    from transformers import TextStreamer

    from ssdtune.data import choose_pad_token

    rows = [_encode(tokenizer, prompt) for prompt in prompts]
    length, pad = max(map(len, rows)), choose_pad_token(tokenizer).token_id
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    device = next(p.device for p in model.parameters())
    printer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.no_grad():
        made = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            streamer=printer if len(rows) == 1 else None,
            eos_token_id=_end_ids(model, tokenizer),
        )
    return [tokenizer.decode(row[length:], skip_special_tokens=True).strip() for row in made]


def _end_ids(model: Any, tokenizer: Any) -> list[int] | None:
    """Tokens that end an answer: the model's own, and the one that training put behind answers."""
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    return sorted(ends) or None


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    """Ids of a user turn and the opening of an answer; of the bare text without a template."""
    if tokenizer.chat_template is None:
        ids = tokenizer(prompt)["input_ids"]
    else:
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        ids = ids["input_ids"]
    if not ids:
        raise GenerateError("the prompt is empty.\nWrite for instance -p 'What is a generator?'")
    return list(ids)
