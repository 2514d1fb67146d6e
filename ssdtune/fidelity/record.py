"""pack_check.json: what `ssdtune pack --check` found, beside the packed model, for each way in which it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssdtune.durable import write_file_atomically
from ssdtune.run_files import CHECK_NAME

VERSION = 1


def keep(folder: Path, reading: str, record: Mapping[str, Any]) -> None:
    """Adds a check of one reading to the folder's, in the place of an older one."""
    told = {"version": VERSION, "checks": {**checks_of(folder), reading: dict(record)}}
    write_file_atomically(folder / CHECK_NAME, (json.dumps(told, indent=1) + "\n").encode())


def checks_of(folder: Path) -> dict[str, Any]:
    """Checks of the folder by reading; none where none were made, or another version's."""
    try:
        told = json.loads((folder / CHECK_NAME).read_text(encoding="utf-8"))
        return dict(told["checks"]) if told["version"] == VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
