"""All weights with a working copy that visits write back: the algorithm's bits, and the bytes of each step."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import cut, digests, make_pair
from test_zeroth_order import (
    ARCHITECTURES,
    ESTIMATORS,
    NUM_STEPS,
    SEED,
    InMemory,
    Stream,
    all_weights,
    batches,
    num_trained,
    streamed_step,
    train_alike,
)

from ssdtune.schedule.plan import Lane
from ssdtune.swap import stores
from ssdtune.zeroth_order import Fold, ZerothOrder


def every_run() -> Iterator[Any]:
    """A few steps of what no other test writes back; slow, 20 of all."""
    yield pytest.param("opt", "fzoo", torch.float32, 4, id="opt-fzoo-float32-4")
    dtypes = (torch.float32, torch.bfloat16)
    for name, estimator, dtype in itertools.product(ARCHITECTURES, ESTIMATORS, dtypes):
        told = f"{name}-{estimator}-{str(dtype)[6:]}-{NUM_STEPS}"
        yield pytest.param(name, estimator, dtype, NUM_STEPS, id=told, marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "estimator", "dtype", "num_steps"), every_run())
def test_blocks_that_go_back_after_every_step_train_as_in_memory(
    name: str, estimator: str, dtype: torch.dtype, num_steps: int, tmp_path: Path, stream: Stream
) -> None:
    """The copy is made before the second step; from the third on each block that is read is written, too."""
    model = tmp_path / "model"
    pair = make_pair(name, model, stream, dtype=dtype, adapt=lambda m: m)
    before = digests(model)
    fold = Fold(tmp_path / "scratch", 1)
    method = ZerothOrder(pair.streamed, ESTIMATORS[estimator], seed=SEED, fold=fold)
    reference = InMemory(pair.plain, ESTIMATORS[estimator], all_weights(pair.plain))
    train_alike(pair, method, reference, num_steps)
    engine = pair.streamed.ssdtune.engine
    engine.await_stores()
    visits = engine.plan.sequences["forward"].visits
    read = {engine.recipes[visit.block].name for visit in visits if visit.is_filled_for}
    assert read
    assert read == {op.block for op in engine.trace if op.lane is Lane.NVME_WRITE}
    for key, value in all_weights(pair.plain).items():
        assert torch.equal(pair.streamed.get_parameter(key).clone(), value), key
    method.close()
    assert digests(model) == before, "the user's files"


def test_a_block_that_goes_back_every_third_step_takes_a_third_of_the_bytes(
    tmp_path: Path, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the trace and by what is handed to the drive, step by step; before the first copy is due, nothing."""
    really: list[int] = []
    plain = stores.write_all

    def counted(fd: int, offset: int, content: memoryview) -> None:
        really.append(content.nbytes)
        plain(fd, offset, content)

    monkeypatch.setattr(stores, "write_all", counted)
    once = written_by_step(tmp_path / "1", stream, every=1)
    third = written_by_step(tmp_path / "3", stream, every=3)
    never = written_by_step(tmp_path / "never", stream, every=None)
    assert sum(once) + sum(third) == sum(really) > 0
    assert not any(never)
    assert not any(third[:4]), "the copy was made before the fourth step"
    assert not any(once[:2])
    assert len(set(once[2:])) == 1, "all blocks, each time"
    assert all(third[4:]), "a like share of the blocks each time"
    assert sum(once[4:]) == 3 * sum(third[4:])


def written_by_step(folder: Path, stream: Stream, *, every: int | None) -> list[int]:
    """Bytes that each of ten steps writes, by the trace."""
    pair = make_pair("llama", folder / "model", stream, adapt=lambda m: m)
    fold = None if every is None else Fold(folder / "scratch", every)
    method = ZerothOrder(pair.streamed, ESTIMATORS["mezo"], seed=SEED, fold=fold)
    written = []
    for batch in batches("llama", 10):
        streamed_step(method, cut(batch, 2), num_trained(batch))
        engine = pair.streamed.ssdtune.engine
        engine.await_stores()
        ops = [op for op in engine.trace if op.step == engine.step]
        written.append(sum(op.num_bytes for op in ops if op.lane is Lane.NVME_WRITE))
    method.close()
    return written
