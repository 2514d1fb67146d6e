"""Profiles of machines as YAML files, and where this machine's own is kept."""

from __future__ import annotations

from pathlib import Path

from ssdtune.cache import cache_folder
from ssdtune.durable import make_folder, write_file_atomically
from ssdtune.schedule.profile import Profile, ProfileError, profile_from

HEAD = "# Rates of a machine: [size, seconds]. FLOP for matmul and attention, bytes for the rest.\n"


def own_profile_path() -> Path:
    """Where `ssdtune probe` puts this machine's profile."""
    return cache_folder() / "profile.yaml"


def own_profile() -> Profile | None:
    """This machine's profile; None where it was never measured. Raises ProfileError for a file that is broken."""
    path = own_profile_path()
    return load_profile(path) if path.exists() else None


def load_profile(path: Path) -> Profile:
    """The profile of a YAML file. Raises ProfileError."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ProfileError(
            f"{path}: can't read it: {str(error).splitlines()[0]}.\nMake a profile with `ssdtune probe`."
        ) from error
    return profile_from(content, str(path))


def save_profile(profile: Profile, path: Path) -> None:
    """Writes it whole or not at all."""
    import yaml

    make_folder(path.parent)
    text = yaml.safe_dump(profile.to_mapping(), sort_keys=False, default_flow_style=None, width=200)
    write_file_atomically(path, (HEAD + text).encode())
