"""What math libraries keep of products in half precision: bounded, and counted where rows have many lengths."""

import os
import subprocess
import sys

import pytest
import torch

from ssdtune.schedule.memory import LIBRARY_BYTES
from ssdtune.visit import libraries

COMPILES = torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_half = pytest.mark.skipif(
    not COMPILES, reason="this processor has no instructions for half precision"
)
# Products of 100 lengths by four shapes, both ways: 800 of them.
GROWTH = """
import sys, torch
from ssdtune.visit.libraries import bound_caches
from ssdtune.visit.memory import settled_bytes
if sys.argv[1] == "bounded":
    bound_caches()
torch.set_num_threads(2)
shapes = ((576, 576), (192, 576), (1536, 576), (576, 1536))
weights = [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes]
def multiply(tokens):
    for weight in weights:
        x = torch.zeros(tokens, weight.shape[1], dtype=torch.bfloat16)
        torch.matmul(torch.nn.functional.linear(x, weight), weight)
multiply(600)
before = settled_bytes()
for tokens in range(100, 300, 2):
    multiply(tokens)
print(settled_bytes() - before)
"""


def growth(kind: str) -> int:
    """Bytes that a process comes to hold over products of many shapes."""
    environment = {k: v for k, v in os.environ.items() if k not in libraries.CACHE_KEYS}
    command = [sys.executable, "-c", GROWTH, kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@needs_half
def test_products_of_ever_new_shapes_take_no_more_than_is_predicted() -> None:
    held = libraries.library_bytes([torch.bfloat16], lengths_vary=True)
    assert growth("bounded") < held
    assert growth("free") > 2 * held


def test_the_bound_is_the_users_where_the_environment_says_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = libraries.CACHE_KEYS
    monkeypatch.delenv(ours, raising=False)
    monkeypatch.setenv(theirs, "1000")
    libraries.bound_caches()
    assert os.environ[ours] == str(libraries.MOST_PRODUCTS)
    assert os.environ[theirs] == "1000"


def test_only_half_precision_and_many_lengths_take_more() -> None:
    def more(*dtypes: torch.dtype, lengths_vary: bool = True) -> int:
        return libraries.library_bytes(dtypes, lengths_vary=lengths_vary) - LIBRARY_BYTES

    cached = libraries.MOST_PRODUCTS * libraries.PRODUCT_BYTES if COMPILES else 0
    assert more(torch.float32) == 0
    assert more(torch.bfloat16, lengths_vary=False) == 0
    assert more(torch.float32, torch.bfloat16) == cached
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert more(torch.float32) == cached
