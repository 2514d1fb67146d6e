"""The command line: finds the verb, reads the configuration, hands over. Nothing heavy up here.

`--help` must answer at once, so torch and transformers are imported inside the verbs only. A
SSDTuneError is a message to a person: it is printed without a traceback, exit code 2. So is what the
system refused (a folder that can't be written, a full drive) where nobody has made one of it.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ssdtune.errors import SSDTuneError, reason_of

USAGE = """\
ssdtune fine-tunes models larger than the memory, streaming their weights from the drive.

  ssdtune train CONFIG.yaml [--key value …]   train; the same command again resumes
  ssdtune plan CONFIG.yaml [--key value …]    what would be where, and when; nothing is trained
  ssdtune hardware                            machines that `ssdtune plan --hardware` knows
  ssdtune probe [FOLDER]                      measure this machine, so that plans tell times
  ssdtune doctor [PATH]                       what this machine can do, and how PATH is read
  ssdtune trace RUN                           a run's step beside its prediction, op by op
  ssdtune generate RUN -p "…"                 let a trained model answer
  ssdtune replay RUN --out FOLDER             weights or adapter of a run with method: zo, made again from its log
  ssdtune pack MODEL --out FOLDER             the model in a few bits a weight, to stream it faster

  ssdtune train --help                        every key of CONFIG.yaml, each one also a flag
  ssdtune --version
"""
TRAIN_USAGE = """\
ssdtune train CONFIG.yaml [--key value …]

CONFIG.yaml holds keys of those below. Each is a flag too and then beats the file: --lora_r 32,
--lora-r=32, --bf16, --offload.ram 300MB, --dataset data/chats.jsonl. Without CONFIG.yaml the
required keys are flags. `ssdtune plan` takes the same arguments and trains nothing.
"""
PLAN_USAGE = """\
ssdtune plan CONFIG.yaml [--key value …] [--hardware SPEC] [--model FOLDER|config.json]
             [--compare] [--timeline FILE] [--json] [--price_per_hour $] [--price_per_kwh $]

Will it fit, how fast, what limits it, what does it write to the drive. Reads the model's headers and
some rows; trains nothing. Exit code 1 if nothing fits. CONFIG.yaml and --key as for `ssdtune train`.

  --hardware PART+PART         for a machine that one does not have (`ssdtune hardware` lists the
                               parts); again for another beside it: --hardware rtx4090+2x990pro+128GB;
                               or a profile that `ssdtune probe --out other.yaml` wrote on it
  --model FOLDER|config.json   instead of the configuration's; a config.json alone is enough
  --compare                    other methods beside it, also those that can't be run yet (≈: by plain rates)
  --timeline FILE.png|.json    the lanes of one step and what each memory holds meanwhile, drawn, or as
                               trace events for Perfetto
  --price_per_hour 0.40        dollars for the machine, instead of a published price (`ssdtune hardware`);
                               a profile's file may have it too
  --price_per_kwh 0.30         prices the energy, where the machine's watts are known
  --json                       the answer as one JSON object
"""
LATER = ("data", "eval", "merge")
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ssdtune ARGV…` and return its exit code; argv defaults to the process's own."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except SSDTuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `ssdtune train --help | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno is None:  # a library's words under the system's name: where it was says more
            raise
        print(f"error: {_refusal(error)}", file=sys.stderr)
        return EXIT_USER_ERROR


def _refusal(error: OSError) -> str:
    """What the system refused, where nobody has said it better."""
    place = error.filename2 or error.filename
    where = "" if place is None else f"{place}: "
    return (
        f"{where}{reason_of(error)}.\n"
        "Look whether it is there, whether you may read and write it, and whether the drive has room."
    )


def _dispatch(words: list[str]) -> int:
    verb, rest = (words[0], words[1:]) if words else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(USAGE, end="", flush=True)
        return 0
    if verb in ("-V", "--version"):
        from ssdtune import __version__

        print(f"ssdtune {__version__}", flush=True)
        return 0
    if verb not in VERBS:
        raise _unknown_verb(verb)
    result = VERBS[verb](rest)
    return result if isinstance(result, int) else 0


def _unknown_verb(verb: str) -> SSDTuneError:
    import difflib

    if verb in LATER:
        return SSDTuneError(f"ssdtune {verb}: not supported yet.\nNow: {', '.join(VERBS)}.")
    near = difflib.get_close_matches(verb[:50], VERBS, n=1)
    hint = f"Did you mean `ssdtune {near[0]}`? " if near else ""
    if verb.endswith((".yaml", ".yml")):
        hint = f"Did you mean `ssdtune train {verb}`? "
    return SSDTuneError(
        f"{ascii(verb)[:60]} is no verb of ssdtune.\n"
        f"{hint}Verbs: {', '.join(VERBS)}; `ssdtune --help` explains them."
    )


def _train(words: list[str]) -> object:
    loaded = _load(words)
    if loaded is None:
        return 0
    from ssdtune.planning.settle import settled
    from ssdtune.trainer import train_from_config

    result = train_from_config(settled(loaded))
    return EXIT_INTERRUPTED if getattr(result, "was_interrupted", False) else result


def _plan(words: list[str]) -> object:
    import argparse

    parser = argparse.ArgumentParser(prog="ssdtune plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    parser.add_argument("--hardware", action="append", default=[])
    parser.add_argument("--timeline", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--compare", action="store_true")
    for name in ("price_per_hour", "price_per_kwh"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    arguments, rest = parser.parse_known_args(words)
    per_hour = _dollars("price_per_hour", arguments.price_per_hour)
    per_kwh = _dollars("price_per_kwh", arguments.price_per_kwh)
    loaded = _load(rest, PLAN_USAGE, says_notes=not arguments.json)
    if loaded is None:
        return 0
    from ssdtune.planning import Wanted, print_plan
    from ssdtune.planning.prices import Prices

    wanted = Wanted(
        hardware=arguments.hardware,
        model=arguments.model,
        timeline=arguments.timeline,
        as_json=arguments.json,
        compares=arguments.compare,
        prices=Prices(per_hour, per_kwh),
    )
    return print_plan(loaded, wanted)


def _dollars(name: str, text: str | None) -> float | None:
    """The value of a flag."""
    try:
        price = None if text is None else float(text)
    except ValueError:
        price = 0.0
    if price is not None and not 0 < price < float("inf"):
        raise SSDTuneError(
            f"command line: {name}: got {ascii(text)[:40]}.\n"
            f"Allowed: dollars, above 0. Write for instance `--{name} 0.40`."
        )
    return price


def _load(words: list[str], usage: str = TRAIN_USAGE, *, says_notes: bool = True):
    """The configuration of `CONFIG.yaml [--flags]`, its notes printed; None where help was."""
    from ssdtune.config import help_text, load_config

    if {"-h", "--help"} & set(words):
        print(f"{usage}\n{help_text()}", flush=True)
        return None
    has_file = bool(words) and not words[0].startswith("-")
    path, flags = (Path(words[0]), words[1:]) if has_file else (None, words)
    if not words:
        raise SSDTuneError(
            "no configuration was given.\nWrite `ssdtune train configs/quickstart.yaml`; "
            "`ssdtune train --help` lists all keys."
        )
    loaded = load_config(path, flags)
    if (
        says_notes and os.environ.get("RANK", "0") == "0"
    ):  # once, however many processes torchrun started
        for note in loaded.notes:
            print(f"note: {note}", flush=True)
    return loaded


def _doctor(words: list[str]) -> object:
    if {"-h", "--help"} & set(words):
        print("ssdtune doctor [PATH]\n\nWhat this machine can do, and how PATH (a model's folder")
        print("or a drive) is read: by which way, at how many GB/s, and why.", flush=True)
        return 0
    if len(words) > 1 or any(word.startswith("-") for word in words):
        raise SSDTuneError(
            f"doctor takes one path at most, got {' '.join(map(ascii, words))[:80]}.\n"
            "Write `ssdtune doctor /path/to/model`."
        )
    from ssdtune.doctor import print_doctor

    return print_doctor(Path(words[0]).expanduser() if words else None)


def _probe(words: list[str]) -> object:
    import argparse

    parser = argparse.ArgumentParser(
        prog="ssdtune probe",
        description="Measure this machine's processor, memory and drive, in a minute or so.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", help="on the drive that will stream; default: the cache's"
    )
    parser.add_argument("--file", type=Path, help="a large file to read; default: one is written")
    parser.add_argument("--out", type=Path, help="the profile; default: where plans look for it")
    parser.add_argument(
        "--sustained",
        metavar="SIZE",
        help="also write so much (20GB), removed again, to see the drive's rate when its cache is full",
    )
    arguments = parser.parse_args(words)
    from ssdtune.cache import cache_folder
    from ssdtune.probe import print_probe
    from ssdtune.profiles import own_profile_path
    from ssdtune.sizes import parse_size

    folder = arguments.folder or cache_folder()
    if arguments.folder is None:
        folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        raise SSDTuneError(f"{folder}: there is no such folder.")
    if arguments.file is not None and not arguments.file.is_file():
        raise SSDTuneError(f"{arguments.file}: there is no such file.")
    sustained = None if arguments.sustained is None else parse_size(arguments.sustained)
    return print_probe(folder, arguments.out or own_profile_path(), arguments.file, sustained)


def _hardware(words: list[str]) -> object:
    import argparse

    parser = argparse.ArgumentParser(
        prog="ssdtune hardware", description="The parts that `ssdtune plan --hardware` knows."
    )
    parser.parse_args(words)
    from ssdtune.machines import hardware_lines

    for line in hardware_lines():
        print(line, flush=True)
    return 0


def _trace(words: list[str]) -> object:
    import argparse

    parser = argparse.ArgumentParser(
        prog="ssdtune trace",
        description="A step of a run beside its prediction: which lane bounds it, which ops miss most, and why.",
    )
    parser.add_argument("run", type=Path, help="the output_dir of a run")
    parser.add_argument("--picture", type=Path, help="a PNG; default: trace.png in the run")
    arguments = parser.parse_args(words)
    from ssdtune.tracing import print_trace

    return print_trace(arguments.run.expanduser(), picture=arguments.picture)


def _generate(words: list[str]) -> object:
    import argparse

    parser = argparse.ArgumentParser(
        prog="ssdtune generate",
        description="Let a trained model answer. Every token reads the whole model once.",
        epilog="Any other --key value (say --offload.ram 4GB) beats the run's own configuration.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="the output_dir of a run, or one of its checkpoints")
    parser.add_argument(
        "-p", "--prompt", action="append", required=True, help="give it again for more prompts"
    )
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=64)
    arguments, overrides = parser.parse_known_args(words)
    if arguments.max_new_tokens < 1:
        raise SSDTuneError(
            f"command line: max_new_tokens: got {arguments.max_new_tokens}.\n"
            "Allowed: a whole number, 1 or more. Write for instance `--max_new_tokens 64`."
        )
    from ssdtune.generate import generate_from_run

    return generate_from_run(
        arguments.run.expanduser(),
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        overrides=overrides,
    )


def _replay(words: list[str]) -> object:
    import argparse

    parser = argparse.ArgumentParser(
        prog="ssdtune replay",
        description="Make what a run with method: zo trained again from the base and its log: all weights, or the adapter.",
    )
    parser.add_argument("run", type=Path, help="the output_dir of a run, or one of its checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write, a new one")
    parser.add_argument("--step", type=int, help="after so many steps; default: all")
    arguments = parser.parse_args(words)
    from ssdtune.replay import replay_run

    return replay_run(arguments.run.expanduser(), arguments.out.expanduser(), step=arguments.step)


def _pack(words: list[str]) -> object:
    from ssdtune.cli.pack import pack

    return pack(words)


# A verb's body may return an exit code; anything else it returns is success.
VERBS: Mapping[str, Callable[[list[str]], object]] = {
    "train": _train,
    "plan": _plan,
    "hardware": _hardware,
    "probe": _probe,
    "doctor": _doctor,
    "trace": _trace,
    "generate": _generate,
    "replay": _replay,
    "pack": _pack,
}
