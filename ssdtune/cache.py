"""Where ssdtune keeps what it can make again."""

import os
from collections.abc import Mapping
from pathlib import Path


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """$SSDTUNE_CACHE, else $XDG_CACHE_HOME/ssdtune, else ~/.cache/ssdtune."""
    if own := environment.get("SSDTUNE_CACHE"):
        return Path(own).expanduser()
    if shared := environment.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "ssdtune"
    return Path.home() / ".cache" / "ssdtune"
