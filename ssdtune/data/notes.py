"""What a user should be told about how their rows were read: decisions first, oddities second."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ssdtune.data.labels import Encoder, Remark
from ssdtune.data.rows import DatasetRows
from ssdtune.data.stats import say_rows

if TYPE_CHECKING:
    import numpy as np

_ODDITIES = {
    Remark.OPEN_END: "an answer ends without an end token, so the model is not taught to stop",
    Remark.SEAM: "one token holds the end of a prompt and the start of its answer; it is trained",
    Remark.GLUED: "nothing separates prompt and completion; they are joined as they are",
    Remark.LEFT_OUT: "the chat template leaves out or rewrites a message",
    Remark.EMPTY_ANSWER: "an answer is empty, so only the end token is trained",
    Remark.END_ADDED: "the template's generation block stops before the end token; it is trained "
    "nevertheless",
}


def encoding_notes(remarks: np.ndarray, rows: DatasetRows, encoder: Encoder) -> list[str]:
    """remarks: int [num_rows], the `Remark` of each kept row."""
    notes = _decisions(rows, encoder)
    for remark, words in _ODDITIES.items():
        count = int(((remarks & remark) != 0).sum())
        if count:
            notes.append(f"in {say_rows(count)} {words}")
    return notes


def _decisions(rows: DatasetRows, encoder: Encoder) -> list[str]:
    if rows.template is not None:
        words = ", ".join(f"{label}: {word}" for label, word in rows.template.words)
        return [f"the right one of {words} is trained to be the likeliest"]
    template, row_format = encoder.template, rows.format.name
    has_template = template.text is not None
    notes = [f"train_on {encoder.train_on}"]
    if row_format == "alpaca" and has_template:
        notes.append("instruction + input become the user's turn, output the assistant's")
    elif row_format == "question_answer" and has_template:
        notes.append("question becomes the user's turn, answer the assistant's")
    elif row_format in ("alpaca", "question_answer"):
        notes.append("no chat template: prompt, empty line, answer, end token as plain text")
        return notes
    is_plain = row_format == "text" or (
        row_format == "prompt_completion" and isinstance(rows.dataset[0]["prompt"], str)
    )
    if is_plain:
        end = encoder.tokenizer.eos_token
        notes.append(
            f"end token {end} closes each row" if end else "the tokenizer has no end token"
        )
        if row_format == "prompt_completion" and has_template:
            notes.append(
                "prompts are plain strings, so no chat template is applied; "
                "write prompt and completion as lists of messages to apply it"
            )
        return notes
    how = "marks the answers" if template.marks_answers else "applied, answers found by prefixes"
    notes.append(f"chat template {how}")
    if template.writes_date:
        notes.append("the chat template writes today's date into each chat")
    return notes
