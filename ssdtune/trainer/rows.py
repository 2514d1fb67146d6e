"""The rows of a run: read, tokenized, shown, and checked against the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssdtune.trainer.errors import RunError

if TYPE_CHECKING:
    from ssdtune.config import DatasetSource, TrainConfig
    from ssdtune.data import Tokenized
    from ssdtune.trainer.config import SSDConfig


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a run, tokenized, and what pads them."""

    tokenizer: Any
    train: Tokenized
    evaluated: Tokenized | None
    pad_token_id: int


def load_rows(config: TrainConfig, args: SSDConfig, say: Callable[[str], None]) -> Rows:
    """Tokenized in one process, for the others to find in the cache; says what was found. Raises DataError, RunError."""
    from ssdtune.data import choose_pad_token, preview, read_chat_template

    tokenizer = load_tokenizer(config)
    if config.chat_template != "auto":
        tokenizer.chat_template = read_chat_template(tokenizer, config.chat_template)
    with args.main_process_first(desc="tokenizing"):  # the others find it in the cache
        train = _tokenize(config, config.dataset, tokenizer)
        evaluated = None
        if config.eval_dataset:
            evaluated = _tokenize(config, config.eval_dataset, tokenizer)
            _check_options(train, evaluated)
    _check_metric(config, evaluated)
    pad = choose_pad_token(tokenizer)
    for line in train.stats.lines():
        say(line)
    if evaluated is not None:
        for line in evaluated.stats.lines():
            say(line.replace("data      ", "eval data ", 1))
    if pad.note:
        say(f"          {pad.note}")
    say(f"first sample: {preview(train, tokenizer)}")
    return Rows(tokenizer=tokenizer, train=train, evaluated=evaluated, pad_token_id=pad.token_id)


def load_tokenizer(config: TrainConfig, folder: Path | None = None) -> Any:
    """The model's tokenizer, or the one saved in `folder`. Raises RunError."""
    keywords = {} if folder else {"revision": config.model_revision}
    return open_tokenizer(
        str(folder or config.model_name_or_path),
        trust_remote_code=config.trust_remote_code,
        **keywords,
    )


def open_tokenizer(name: str, **keywords: Any) -> Any:
    """The tokenizer of a folder, a hub id or a GGUF file. keywords: of `from_pretrained`. Raises RunError."""
    from huggingface_hub import is_offline_mode
    from transformers import AutoTokenizer

    from ssdtune.visit.asked import absent, may_be_hub_id

    if name.endswith(".gguf"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise absent(name)
        has_own = (path.parent / "tokenizer.json").is_file()
        trusts = {k: v for k, v in keywords.items() if k == "trust_remote_code"}
        name = str(path.parent)
        keywords = trusts if has_own else {**trusts, "gguf_file": path.name}
    try:
        return AutoTokenizer.from_pretrained(name, **keywords)
    except (OSError, ValueError, KeyError, ImportError) as error:
        path = Path(name).expanduser()
        is_fetched = may_be_hub_id(name) and not isinstance(error, OSError)
        if not path.is_dir() and (path.is_file() or not is_fetched):
            raise absent(name, error, is_offline=is_offline_mode()) from error
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"model_name_or_path: {name} has no tokenizer that could be loaded: {reason}\n"
            "Put tokenizer.json and tokenizer_config.json beside the model's weights."
        ) from error


def _tokenize(config: TrainConfig, sources: tuple[DatasetSource, ...], tokenizer: Any) -> Tokenized:
    from ssdtune.data import load_dataset_rows, tokenize_rows

    return tokenize_rows(
        [load_dataset_rows(source) for source in sources],
        tokenizer,
        max_length=config.max_length,
        overlong=config.overlong,
        train_on=config.train_on,
    )


def _check_options(train: Tokenized, evaluated: Tokenized) -> None:
    """What is evaluated is what is trained: a choice among as many options, or a text."""
    if train.num_options != evaluated.num_options:
        raise RunError(
            f"eval_dataset: its rows have {evaluated.num_options or 'no'} label_words, those of dataset have "
            f"{train.num_options or 'none'}.\n"
            "Write the same template and label_words in both."
        )


def _check_metric(config: TrainConfig, evaluated: Tokenized | None) -> None:
    """What tells the best checkpoint is measured: Trainer would say so after the first evaluation."""
    if not config.load_best_model_at_end or evaluated is None:
        return
    known = ["loss", *(["accuracy"] if evaluated.num_options else [])]
    name = config.metric_for_best_model
    if name.removeprefix("eval_") not in known:
        raise RunError(
            f"metric_for_best_model: {name} is not measured. Of this eval_dataset: {', '.join(known)}.\n"
            "Give one of these; accuracy wants rows with a template and label_words."
        )


def check_sizes(config: TrainConfig, model: Any, rows: Rows, say: Callable[[str], None]) -> None:
    """Ids that the embedding lacks are an error; rows beyond the trained positions are said."""
    import pyarrow.compute as pc

    num_ids = model.get_input_embeddings().weight.shape[0]
    column = rows.train.dataset.data.column("input_ids")
    largest = pc.max(pc.list_flatten(column)).as_py()  # type: ignore[attr-defined]
    if largest is not None and largest >= num_ids:
        raise RunError(
            f"model_name_or_path: the tokenizer gives id {largest:,}, the model has embeddings for "
            f"{num_ids:,}.\nTokenizer and model don't belong together."
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = rows.train.stats.longest_row
    if positions and longest > positions:
        say(
            f"note: rows of up to {longest:,} tokens, the model was made for {positions:,}: "
            f"set max_length to {positions} at most"
        )
