"""How a setting is described, read and refused. Which settings there are stands in keys/.

A value comes from YAML, from a flag or from Python and becomes a Node: the value and the place
where it was written. Each setting has a Reader, which turns a Node into a value, says what is
allowed, and writes the value back. Reading what was read changes nothing.
"""

from ssdtune.settings.combined import Also, Names, Or, WordOr, Words, YesNoOr
from ssdtune.settings.readers import Number, OneOf, Reader, Refused, Size, Text, Whole, YesNo
from ssdtune.settings.records import (
    Record,
    Records,
    Setting,
    as_text,
    key,
    read_again,
    read_record,
    settings_of,
    unknown_key,
    walk_settings,
    write_record,
)

__all__ = [
    "Also",
    "Names",
    "Number",
    "OneOf",
    "Or",
    "Reader",
    "Record",
    "Records",
    "Refused",
    "Setting",
    "Size",
    "Text",
    "Whole",
    "WordOr",
    "Words",
    "YesNo",
    "YesNoOr",
    "as_text",
    "key",
    "read_again",
    "read_record",
    "settings_of",
    "unknown_key",
    "walk_settings",
    "write_record",
]
