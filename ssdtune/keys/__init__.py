"""Every key of ssdtune, described once: YAML key = dataclass field = Python keyword = --flag.

From these descriptions come the checks, `ssdtune train --help` and the reference in the docs. Flat
keys bear the names that TrainingArguments, TRL and peft gave them; what depends on the machine is
nested under `offload`, so that one file moves between machines with `--offload.ram 100GB`. Defaults
are Hugging Face's unless the help says why not. Importing this costs milliseconds: no torch here.

A file for each group of keys; `train.py` puts them together, `conflicts.py` says which exclude each
other, `idle.py` which have no effect beside others.
"""

from ssdtune.keys.data import DatasetSource
from ssdtune.keys.offload import Offload
from ssdtune.keys.train import TrainConfig

__all__ = ["DatasetSource", "Offload", "TrainConfig"]
