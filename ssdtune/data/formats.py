"""What a row is: a text, a prompt and its completion, or a chat. Recognised by its columns.

    text               one text; all of it is trained
    prompt_completion  two strings, or two lists of messages
    messages           a list of {role, content}
    conversations      the same as ShareGPT writes it: {from, value}
    alpaca             instruction, input (may be empty), output
    question_answer    question, answer

The last two become a user turn and an assistant turn where there is a chat template, else a prompt
and a completion. Every mapping is said in a note.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ssdtune.data.faults import DataError, RowError, field_list, missing_field

TRAIN_ON = ("assistant", "completion", "last", "all")


@dataclass(frozen=True)
class Format:
    """required: columns every row must have. optional: columns used where present.

    noun: what one row is called in the plural. is_chat: rows are lists of messages always.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    noun: str = "pairs"
    is_chat: bool = False

    @property
    def train_on(self) -> str:
        """What is trained unless the user says otherwise."""
        if self.name == "text":
            return "all"
        return "assistant" if self.is_chat else "completion"


# The order decides where a file has the columns of several.
_KNOWN = (
    Format("messages", ("messages",), ("tools",), noun="chats", is_chat=True),
    Format("conversations", ("conversations",), ("system", "tools"), noun="chats", is_chat=True),
    Format("prompt_completion", ("prompt", "completion"), ("tools",)),
    Format("alpaca", ("instruction", "output"), ("input", "system")),
    Format("question_answer", ("question", "answer")),
    Format("text", ("text",), noun="texts"),
)
FORMATS = {known.name: known for known in _KNOWN}
_ALIASES = {
    "prompt": "prompt_completion",
    "sharegpt": "conversations",
    "chat": "messages",
    "chatml": "messages",
    "openai": "messages",
    "qa": "question_answer",
    "pretraining": "text",
}
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class TextSample:
    """Two strings that stand side by side; a plain text is a completion with an empty prompt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class ChatSample:
    """Messages for the chat template; the first `num_prompt` are the prompt of a pair."""

    messages: tuple[dict[str, Any], ...]
    num_prompt: int = 0
    tools: tuple[dict[str, Any], ...] | None = None


def recognise(
    format_name: str,
    *,
    columns: list[str],
    row: dict[str, Any],
    where: str,
    labelled: Format | None = None,
) -> tuple[Format, tuple[str, ...]]:
    """The format by name, or by the columns ("auto"), and what to tell the user about it.

    row, where: the first row, for the error message. labelled: of rows with a template; then there
    is nothing to recognise. Raises DataError.
    """
    if labelled is not None:
        return _checked(labelled, format_name, columns, row, where)
    key = format_name.lower().replace("+", "_").replace("-", "_").replace(" ", "")
    key = _ALIASES.get(key, key)
    if key != "auto" and key not in FORMATS:
        near = get_close_matches(key, ["auto", *FORMATS, *_ALIASES], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise DataError(
            f"dataset.format: unknown format {format_name!r}; known: auto, {', '.join(FORMATS)}.{hint}"
        )
    fitting = [known for known in _KNOWN if set(known.required) <= set(columns)]
    if key == "auto" and not fitting:
        raise DataError(
            f"{where}: no known format. The row has: {field_list(columns)}\n"
            f"Rows need one of: {'; '.join(' + '.join(f.required) for f in _KNOWN)}.\n"
            "Rename the fields (a CSV's first line names them)."
        )
    chosen = fitting[0] if key == "auto" else FORMATS[key]
    for name in chosen.required:
        if name not in columns:
            raise missing_field(where, name, row)
    return chosen, _notes(chosen, columns, fitting if key == "auto" else [])


def _checked(
    labelled: Format, format_name: str, columns: list[str], row: dict[str, Any], where: str
) -> tuple[Format, tuple[str, ...]]:
    if format_name != "auto":
        raise DataError(
            f"dataset.format: {format_name} and a template are both given\n"
            "Leave the format out: the template says what a row is."
        )
    for name in labelled.required:
        if name not in columns:
            raise missing_field(where, name, row)
    return labelled, _notes(labelled, columns, [])


def _notes(chosen: Format, columns: list[str], fitting: list[Format]) -> tuple[str, ...]:
    how = "recognised by its fields" if fitting else "as set"
    notes = [f"format {chosen.name} ({' + '.join(chosen.required)}), {how}"]
    if len(fitting) > 1:
        others = ", ".join(known.name for known in fitting[1:])
        notes.append(f"the rows would also fit {others}; set dataset.format to use another")
    unused = [name for name in columns if name not in (*chosen.required, *chosen.optional)]
    if unused:
        notes.append(f"fields not used: {field_list(unused)}")
    return tuple(notes)


def to_sample(
    row: dict[str, Any], row_format: Format, *, has_template: bool
) -> TextSample | ChatSample:
    """One row as text or chat. Raises RowError for a value of the wrong type or an unknown role."""
    if row_format.name == "text":
        return TextSample("", _string(row, "text"))
    if row_format.is_chat:
        messages = _messages(row[row_format.required[0]], row_format.required[0])
        before = () if messages[0]["role"] == "system" else _system(row)
        return ChatSample((*before, *messages), tools=_tools(row))
    if row_format.name == "prompt_completion":
        return _pair(row)
    if row_format.name == "alpaca":
        parts = [_string(row, "instruction"), _string(row, "input", default="")]
        answer = _string(row, "output")
    else:
        parts, answer = [_string(row, "question")], _string(row, "answer")
    question = "\n\n".join(part for part in parts if part)
    if not has_template:
        before = [message["content"] for message in _system(row)]
        return TextSample("\n\n".join([*before, question, ""]), answer)
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return ChatSample((*_system(row), *turns), num_prompt=len(_system(row)) + 1)


def _pair(row: dict[str, Any]) -> TextSample | ChatSample:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return TextSample(prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(prompt, "prompt")
        messages = (*before, *_messages(completion, "completion"))
        return ChatSample(messages, num_prompt=len(before), tools=_tools(row))
    raise RowError(
        f"prompt is a {type(prompt).__name__} and completion a {type(completion).__name__}",
        "Both must be strings, or both lists of messages.",
    )


def _string(row: dict[str, Any], field: str, default: str | None = None) -> str:
    value = row.get(field)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise RowError(
            f"{field} is a {type(value).__name__}, not a string", f"Write {field} in quotes."
        )
    return value


def _messages(value: Any, field: str) -> tuple[dict[str, Any], ...]:
    """Messages with `role` and `content`, whatever the row calls them; nulls removed."""
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise RowError(f"{field} is {kind}", f"{field} must be a list of {{role, content}}.")
    return tuple(_message(item, f"{field}[{k}]") for k, item in enumerate(value))


def _message(item: Any, name: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise RowError(f"{name} is a {type(item).__name__}", "It must be {role, content}.")
    message = {key: _without_nulls(value) for key, value in item.items() if value is not None}
    if "role" not in message and "from" in message:
        sender = message.pop("from")
        message["role"] = _SHAREGPT_ROLES.get(str(sender).lower(), sender)
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    role = message.get("role")
    if not isinstance(role, str):
        raise RowError(
            f"{name} has no role. It has: {field_list(message)}",
            "A message needs role (system, user, assistant, tool) and content.",
        )
    if not isinstance(message.get("content"), (str, list)) and "tool_calls" not in message:
        raise RowError(
            f"{name} ({role}) has no content. It has: {field_list(message)}",
            "Give it a content (a string), or remove the row.",
        )
    return message


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct of a column all keys of all rows; templates ask `is defined`."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _system(row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The system message of a `system` column, where the format has one and it is not empty."""
    text = row.get("system")
    return ({"role": "system", "content": text},) if isinstance(text, str) and text else ()


def _tools(row: dict[str, Any]) -> tuple[dict[str, Any], ...] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as fault:
            raise RowError(f"tools is no JSON: {fault}", "Write a JSON list of schemas.") from fault
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools is no list of objects", "Write a JSON list of tool schemas.")
    return tuple(_without_nulls(tool) for tool in tools)
