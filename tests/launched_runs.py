"""`launch/train.py` several times, one after the other in the same processes, which take longer to start than to train.

    torchrun … launched_runs.py '[["--config", "x.yaml", "--max_steps", "2"], ["--config", "x.yaml"]]'

Not a test: tiny_runs.launch starts it.
"""

import json
import runpy
import sys
from pathlib import Path

SCRIPT = str(Path(__file__).parent.parent / "launch" / "train.py")


def main(runs: list[list[str]]) -> None:
    """Each with its flags; the first that fails ends the process with its status."""
    for flags in runs:
        sys.argv = [SCRIPT, *flags]
        try:
            runpy.run_path(SCRIPT, run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
