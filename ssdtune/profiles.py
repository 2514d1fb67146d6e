"""Profiles of machines as YAML files, where this machine's own is kept, and beside it what runs refitted."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssdtune.cache import cache_folder
from ssdtune.durable import make_folder, write_file_atomically
from ssdtune.schedule.profile import Profile, ProfileError
from ssdtune.schedule.refit import refit_from
from ssdtune.schedule.saved_profile import profile_from

HEAD = "# Rates of a machine: [size, seconds]. FLOP for matmul and attention, bytes for the rest.\n"
REFIT_HEAD = "# What runs found the profile beside this to be off by: factors on its seconds. A new probe discards them.\n"


def own_profile_path() -> Path:
    """Where `ssdtune probe` puts this machine's profile."""
    return cache_folder() / "profile.yaml"


def refit_path() -> Path:
    """Where runs put what they found this machine's profile to be off by."""
    return cache_folder() / "profile-refit.yaml"


def own_profile() -> Profile | None:
    """This machine's profile, refitted; None where it was never measured. Raises ProfileError for a file that is
    broken."""
    path = own_profile_path()
    if not path.exists():
        return None
    return dataclasses.replace(load_profile(path), refit=_own_refit())


def keep_refit(work: str, factors: Mapping[str, float]) -> None:
    """From now on these are the factors for such work (`refit.work_name`), as long as this machine's profile stays.
    Raises ProfileError, DurableError."""
    kept = {**_own_refit(), work: dict(factors)}
    content = {"profile": _digest(own_profile_path()), "refit": kept}
    write_file_atomically(refit_path(), (REFIT_HEAD + _yaml(content)).encode())


def _own_refit() -> dict[str, dict[str, float]]:
    """Nothing where it belongs to an older profile. Raises ProfileError."""
    path = refit_path()
    if not path.exists():
        return {}
    content = _read(path, "Delete it: runs make it again.")
    if not isinstance(content, dict) or content.get("profile") != _digest(own_profile_path()):
        return {}
    return refit_from(content.get("refit"), str(path))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_profile(path: Path) -> Profile:
    """The profile of a YAML file. Raises ProfileError."""
    return profile_from(_read(path, "Make a profile with `ssdtune probe`."), str(path))


def save_profile(profile: Profile, path: Path) -> None:
    """Writes it whole or not at all."""
    make_folder(path.parent)
    write_file_atomically(path, (HEAD + _yaml(profile.to_mapping())).encode())


def _read(path: Path, remedy: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ProfileError(
            f"{path}: can't read it: {str(error).splitlines()[0]}.\n{remedy}"
        ) from error


def _yaml(content: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(content), sort_keys=False, default_flow_style=None, width=200)
