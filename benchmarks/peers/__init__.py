"""Other tools that train with weights on a drive, each from a folder of packages of its own."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from ssdtune.cache import cache_folder

# What `pip install --target` needs beside the environment that runs the benchmark; `--no-deps`
# leaves that environment's torch and transformers in use, so that both sides compute alike.
REQUIREMENTS = {
    "deepspeed": "deepspeed==0.19.8 hjson py-cpuinfo msgpack einops ninja",
    "airllm": "airllm==4.0.0 sentencepiece scipy",
}
ALSO = {"deepspeed": "and a C++ compiler with libaio's headers (apt-get install libaio-dev)"}


def packages_folder(name: str) -> Path:
    """Where the peer's packages are looked for."""
    return cache_folder() / "peers" / name


def how_to_install(name: str) -> str:
    """One line that a person can run."""
    command = (
        f"{sys.executable} -m pip install --no-deps --no-build-isolation "
        f"--target {packages_folder(name)} {REQUIREMENTS[name]}"
    )
    return command + (f"; {ALSO[name]}" if name in ALSO else "")


def is_installed(name: str) -> bool:
    """Whether the peer's folder, or this environment, has the package."""
    return (packages_folder(name) / name).is_dir() or importlib.util.find_spec(name) is not None


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_local_process_group_environment() -> None:
    """What torch.distributed needs for a group of one process on this machine."""
    os.environ.update(
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
        LOCAL_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )
