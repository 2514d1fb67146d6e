"""Float32 masters of 16-bit weights: what trains, and what compute reads of it.

A slot holds a block in float32, and so does the working copy: steps are added there, each rounded to float32, so that
none is lost below the distance between two bfloat16 numbers. What compute reads, weights and variants alike, is rounded
from that once, to nearest. Slots and working copy are twice as large; the user's files are read, and widened on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

from ssdtune.errors import SSDTuneError
from ssdtune.swap.recipe import HALVES, BlockRecipe, widened
from ssdtune.visit.streamer import Streamer


class MasterError(SSDTuneError):
    """Weights of which there is no float32 master."""


def hold_masters(streamer: Streamer) -> Sequence[BlockRecipe]:
    """From now on slots hold blocks in float32; between steps. What they held before, which is what compute reads.

    Raises MasterError for a packed base, and where no weight has 16 bits, PlanError where the budgets are too small for
    slots of that size; all as it was.
    """
    before = tuple(streamer.engine.recipes)
    if any(recipe.packed for recipe in before):
        raise MasterError(
            "a packed base has no 16-bit weights to keep in float32.\n"
            "Leave out zo_master, or take the base that it was packed from."
        )
    if not any(view.dtype in HALVES for recipe in before for view in recipe.tensors):
        raise MasterError("the model's weights are in float32 already.\nLeave out zo_master.")
    streamer.read_from([widened(recipe) for recipe in before], streamer.open_engine.storage)
    return before
