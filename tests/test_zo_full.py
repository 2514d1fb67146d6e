"""All weights with a working copy that visits write back: the algorithm's bits, and the bytes of each step."""

from pathlib import Path

import pytest
import torch
from pairs import DTYPES
from support import cut, digests, make_pair
from test_zeroth_order import (
    ARCHITECTURES,
    ESTIMATORS,
    FEW,
    NUM_STEPS,
    SEED,
    InMemory,
    Stream,
    all_weights,
    batches,
    num_trained,
    streamed_step,
)

from ssdtune.schedule.plan import Lane
from ssdtune.swap import stores
from ssdtune.zeroth_order import Fold, ZerothOrder


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("estimator", FEW)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_weights_train_as_in_memory_for_20_steps(
    name: str, estimator: str, dtype: torch.dtype, tmp_path: Path, stream: Stream
) -> None:
    """From the log's steps alone; and written back after every step: the copy is made before the second one, from the
    third on each block that is read is written, too."""
    model = tmp_path / "model"
    pair = make_pair(name, model, stream, dtype=dtype, adapt=lambda m: m, is_smaller=True)
    folded = stream(model, model_class=type(pair.plain))
    before = digests(model)
    from_log = ZerothOrder(pair.streamed, FEW[estimator], seed=SEED)
    writing = ZerothOrder(folded, FEW[estimator], seed=SEED, fold=Fold(tmp_path / "scratch", 1))
    reference = InMemory(pair.plain, FEW[estimator], all_weights(pair.plain))
    for batch in batches(name, NUM_STEPS):
        pieces, items = cut(batch, 2), num_trained(batch)
        expected = reference.step(pieces, items)
        for method in (from_log, writing):
            assert list(streamed_step(method, pieces, items).losses) == expected
    engine = folded.ssdtune.engine
    engine.await_stores()
    visits = engine.plan.sequences["forward"].visits
    read = {engine.recipes[visit.block].name for visit in visits if visit.is_filled_for}
    assert read
    assert read == {op.block for op in engine.trace if op.lane is Lane.NVME_WRITE}
    for key, value in all_weights(pair.plain).items():
        for streamed in (pair.streamed, folded):
            assert torch.equal(streamed.get_parameter(key).clone(), value), key
    writing.close()
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
