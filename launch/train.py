"""`accelerate launch launch/train.py --config x.yaml [--flags]` is `ssdtune train x.yaml [--flags]`.

A script, because accelerate and torchrun start scripts.
"""

import sys

from ssdtune.cli import main


def train_arguments(argv: list[str]) -> list[str]:
    """Puts the value of --config, wherever it stands, in front: the command line's own order."""
    rest = list(argv)
    for position, argument in enumerate(argv):
        if argument.startswith("--config="):
            rest.pop(position)
            return ["train", argument.removeprefix("--config="), *rest]
        if argument == "--config" and position + 1 < len(argv):
            del rest[position : position + 2]
            return ["train", argv[position + 1], *rest]
    return ["train", *rest]


if __name__ == "__main__":
    sys.exit(main(train_arguments(sys.argv[1:])))
