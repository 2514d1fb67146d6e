"""Contestants take turns: one process each, one step at a time, the others idle meanwhile."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


class ContestantError(RuntimeError):
    """A contestant's process failed, ended or did not answer; holds the last it printed."""


class Entrant:
    """One contestant's process, as seen from outside, and what it answered so far.

    Args:
        name: of the row's column.
        spec: as the contestant's class wants it, with `kind`.
        scratch: where the spec and what the process prints are kept.
        packages: a folder to put on the process's PYTHONPATH, for peers.
        timeout_s: the longest wait for an answer.
    """

    def __init__(
        self,
        name: str,
        spec: Mapping[str, Any],
        *,
        scratch: Path,
        packages: Path | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        self.name, self.spec, self.timeout_s = name, dict(spec), timeout_s
        self.losses: list[float] = []  # of every step, warm-up included
        self.steps: list[dict[str, Any]] = []  # of the steps that count
        self.warm_ups: list[dict[str, Any]] = []
        self.about: dict[str, Any] = {}
        self.end: dict[str, Any] = {}
        self.log = scratch / f"{name}.log"
        spec_file = scratch / f"{name}.json"
        spec_file.write_text(json.dumps(self.spec))
        paths = [*([str(packages)] if packages else []), str(ROOT)]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        environment = {
            **os.environ,
            **dict.fromkeys(OFFLINE, "1"),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(spec["threads"]),
            "PYTHONPATH": os.pathsep.join(paths),
        }
        if packages:
            environment["PATH"] = f"{packages / 'bin'}{os.pathsep}{environment.get('PATH', '')}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", str(spec_file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Returns when the contestant is built. Raises ContestantError."""
        self.about = self._answer()

    def step(self, *, counts: bool) -> dict[str, Any]:
        """Takes one step; `counts`: it is no warm-up."""
        got = self._ask({"do": "step"})
        self.losses.append(got["loss"])
        (self.steps if counts else self.warm_ups).append(got)
        return got

    def set(self, **settings: Any) -> None:
        """Changes a contestant's settings between steps."""
        self._ask({"do": "set", **settings})

    def finish(self) -> None:
        """Ends the process in order and keeps its last words."""
        self.end = self._ask({"do": "end"})
        self.process.communicate(timeout=60)

    def kill(self) -> None:
        """Ends the process if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    def seconds(self) -> list[float]:
        """Of the steps that count."""
        return [step["seconds"] for step in self.steps]

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise ContestantError(self._last_words("ended")) from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], self.timeout_s)
        if not ready:
            raise ContestantError(self._last_words(f"gave no answer in {self.timeout_s:.0f} s"))
        line = self.process.stdout.readline()
        if not line:
            raise ContestantError(self._last_words("ended"))
        return json.loads(line)

    def _last_words(self, how: str) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{self.name} {how}; its last words: " + " | ".join(lines[-3:])[-600:]


def take_turns(
    entrants: Sequence[Entrant], num_rounds: int, say: Callable[[str], None] = lambda line: None
) -> None:
    """`num_rounds` rounds of one step each; who begins moves on, so that all follow all."""
    for turn in range(num_rounds):
        first = turn % len(entrants)
        order = [*entrants[first:], *entrants[:first]]
        start = perf_counter()
        told = [f"{e.name} {e.step(counts=True)['seconds']:.2f}" for e in order]
        say(f"round {turn + 1}/{num_rounds} in {perf_counter() - start:.0f} s: {', '.join(told)}")
