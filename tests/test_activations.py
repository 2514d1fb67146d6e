"""Activations that stay from forward to backward: the same bits, half of the forwards, memory within the budget."""

from pathlib import Path

import pytest
from support import assert_same_training, make_pair, num_misses
from test_exact import EXACT, Stream, batches

PLENTY = 10**9


@pytest.mark.parametrize("name", EXACT)
def test_training_equals_training_in_memory(name: str, tmp_path: Path, stream: Stream) -> None:
    pair = make_pair(name, tmp_path, stream, activation_bytes=PLENTY)
    assert_same_training(pair, batches(name, 3))
    kept = pair.streamed.get_base_model().ssdtune.activations
    assert kept.num_kept > 0
    assert kept.num_over == 0
    assert kept.held_bytes == 0
    assert num_misses(pair.engine) == 0
