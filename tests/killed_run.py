"""`ssdtune train` that is killed amid its fourth step, between two blocks' visits. Not a test: test_zo_replay.py starts it.

python killed_run.py --config x.yaml …
"""

import os
import signal
import sys
from typing import Any

from ssdtune.cli import main
from ssdtune.swap.engine import Engine
from ssdtune.zeroth_order import ZerothOrder

STEP, NUM_VISITS = 3, 2


def kill_amid_a_step() -> None:
    """Two blocks have had their visit in the fourth step, and the third is about to."""
    step, enter = ZerothOrder.step, Engine.enter
    seen: set[int] = set()

    def entered(self: Engine, block: int, *given: Any) -> int:
        seen.add(block)
        if len(seen) > NUM_VISITS:
            os.kill(os.getpid(), signal.SIGKILL)
        return enter(self, block, *given)

    def stepped(self: ZerothOrder, *args: Any, **kwargs: Any) -> Any:
        if self.num_steps == STEP:
            Engine.enter = entered  # type: ignore[method-assign]
        return step(self, *args, **kwargs)

    ZerothOrder.step = stepped  # type: ignore[method-assign]


if __name__ == "__main__":
    kill_amid_a_step()
    sys.exit(main(["train", *sys.argv[1:]]))
