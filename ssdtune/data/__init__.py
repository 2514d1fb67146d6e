"""From a file of rows to labelled token ids, with nothing lost in silence.

Read in this order: `rows` opens the file and knows where every row came from; `formats` turns a
row into a text or a chat, `options` one with a label into texts; `template` finds what the assistant
said in a rendered chat; `tokens` tokenises, labels, cuts and counts; `collate` pads one micro-batch.
`faults` words the errors.

    rows = load_dataset_rows({"path": "chats.jsonl", "split": "train[:98%]"})
    tokenized = tokenize_rows(rows, tokenizer, max_length=2048)
    print(*tokenized.stats.lines(), preview(tokenized, tokenizer), sep="\\n")
"""

from ssdtune.data.collate import CausalCollator, OptionsCollator, PadChoice, choose_pad_token
from ssdtune.data.faults import DataError
from ssdtune.data.formats import FORMATS, TRAIN_ON
from ssdtune.data.rows import DatasetRows, load_dataset_rows
from ssdtune.data.stats import DataStats
from ssdtune.data.template import ChatTemplate, read_chat_template
from ssdtune.data.tokens import Tokenized, preview, tokenize_rows

__all__ = [
    "FORMATS",
    "TRAIN_ON",
    "CausalCollator",
    "ChatTemplate",
    "DataError",
    "DataStats",
    "DatasetRows",
    "OptionsCollator",
    "PadChoice",
    "Tokenized",
    "choose_pad_token",
    "load_dataset_rows",
    "preview",
    "read_chat_template",
    "tokenize_rows",
]
