"""The rows: where they are, what they are, and which of their tokens are trained."""

from dataclasses import dataclass

from ssdtune.settings import OneOf, Or, Record, Records, Text, Whole, Words, key, read_again
from ssdtune.strict_yaml import ConfigError

_SPLIT = r"[A-Za-z_][\w.-]*(\[(-?\d+%?)?:(-?\d+%?)?\])?"
_FORMAT_SYNONYMS = (
    ("prompt", "prompt_completion"),
    ("sharegpt", "conversations"),
    ("chat", "messages"),
    ("chatml", "messages"),
    ("openai", "messages"),
    ("qa", "question_answer"),
    ("pretraining", "text"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSource:
    """One entry of `dataset` or `eval_dataset`."""

    path: str = key(
        Text("a file, a folder, a pattern or a hub id", is_path=True),
        "JSONL, JSON, CSV, TSV or Parquet file, pattern such as data/*.jsonl, folder or hub id",
        example="data/chats.jsonl",
    )
    format: str = key(
        OneOf(
            (
                "auto",
                "text",
                "prompt_completion",
                "messages",
                "conversations",
                "alpaca",
                "question_answer",
            ),
            synonyms=_FORMAT_SYNONYMS,
        ),
        "what a row is; auto recognises it by its fields and says so",
        default="auto",
    )
    split: str = key(
        Text(
            "a split such as train, train[:98%] or train[:10]+train[-10:]",
            pattern=rf"{_SPLIT}(\+{_SPLIT})*",
        ),
        "which rows",
        default="train",
        example="train[:98%]",
    )
    template: str | None = key(
        Or("none", Text("a text with {label} in it", has_lines=True, pattern=r".*\{label\}.*")),
        "for rows with a label: the text that a row becomes, its fields in braces, {label} for the label's words; what is "
        "trained is that the right words are likelier than the others",
        default=None,
        example='"{text} It was {label}"',
    )
    label_words: tuple[tuple[str, str], ...] = key(
        Words("a mapping of labels to words, such as {0: terrible, 1: great}"),
        "the words of each label, with a template",
        default=(),
        example="{0: terrible, 1: great}",
    )
    label_field: str = key(
        Text("a field's name"),
        "the field that holds a row's label, with a template",
        default="label",
    )

    def __post_init__(self) -> None:
        read_again(self)
        if bool(self.template) != bool(self.label_words):
            raise ConfigError(
                f"dataset entry {self.path}: template and label_words go together.\n"
                'Write both, for instance template: "{text} It was {label}", label_words: {0: terrible, 1: great}.'
            )


_DATASETS = Records(
    Record(DatasetSource), "the path of a data file, or {path: …, format: …, split: …}"
)


@dataclass(frozen=True, kw_only=True, init=False, eq=False, repr=False)
class DataKeys:
    """What to train on."""

    dataset: tuple[DatasetSource, ...] = key(
        _DATASETS, "what to train on", aliases=("datasets",), example="data/chats.jsonl"
    )
    eval_dataset: tuple[DatasetSource, ...] = key(
        _DATASETS, "what to evaluate on", default=(), example="data/eval.jsonl"
    )
    chat_template: str = key(
        Text(
            "auto, or the path of a .jinja file",
            is_path=True,
            pattern=r"auto|.+\.(jinja|jinja2|j2)",
        ),
        "auto: the tokenizer's own template",
        default="auto",
    )
    train_on: str = key(
        OneOf(("auto", "assistant", "completion", "last", "all")),
        "tokens with a loss: every answer, the completion, the last answer, all; "
        "auto: the answers, or all of a plain text",
        default="auto",
    )
    max_length: int = key(
        Whole(2, 2**24),
        "tokens of a row at most",
        default=2048,
        aliases=("cutoff_len", "sequence_len", "max_seq_length", "max_seq_len"),
    )
    overlong: str = key(
        OneOf(("truncate", "drop", "error")),
        "what becomes of longer rows; always counted and printed",
        default="truncate",
    )
