"""`ssdtune probe`: measures this machine for the planner, in under a minute, and writes a profile.

Each operator and transfer is timed at several sizes, the sizes in turn, a few rounds of each; a point of a curve is the
median of its rounds. What is measured is what training does: matrix products of blocks' shapes in the number formats
that models come in, fused attention and its backward, passes over values, reads of a model's files by the engine's own
readers, writes past the page cache, copies.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from ssdtune.doctor import random_file
from ssdtune.profiles import save_profile
from ssdtune.report import say
from ssdtune.schedule.profile import FRESH, Curve, InModel, Profile, curve_of

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16")
MIB = 2**20
BUSY_CORES = 0.15  # of others, from which on a measurement is not to be trusted
ROUNDS = 5
MAX_PIECE_S = 0.3  # larger sizes of what takes longer than this are left out: the last rate goes on
# (tokens, width in, width out) of matrix products, from an adapter's of few tokens to a large model's layers
PRODUCTS = (
    (16, 256, 16),
    (128, 576, 16),
    (64, 576, 576),
    (128, 576, 1536),
    (512, 576, 1536),
    (512, 1024, 4096),
    (1024, 2048, 4096),
    (1024, 4096, 8192),
)
SLOWING_ROUNDS, SLOWING_S, SLOWING_BUFFERS = 7, 0.3, 8
LENGTHS = (32, 128, 512, 1024)  # of attention, 8 heads of 64
PASS_BYTES = (2**12, 2**16, 2**19, 2**21, 2**23, 2**25, 2**27)
FRESH_SIZES = (2**25, 2**26, 2**27)
READ_BYTES = (2**20, 2**22, 2**24, 2**25, 2**26)
READ_STRIDE = 97 * 2**20  # from one read to the next, so that a drive's own cache helps little
COPY_BYTES = (2**16, 2**20, 2**23, 2**25, 2**27)


Run = Callable[[], Any]


# ------------------------------------------------------------------ timing


def time_all(pieces: Mapping[float, Run], device: torch.device, *, rounds: int = ROUNDS) -> Curve:
    """Size -> seconds of each piece. Sizes take turns, so that a load that comes and goes hits all of them."""
    wait = _waiter(device)
    kept: dict[float, list[float]] = {}
    for size, run in sorted(pieces.items()):
        run()  # allocates, compiles, warms up
        wait()
        kept[size] = []
        if _timed(run, wait) > MAX_PIECE_S:
            break
    for _ in range(rounds):
        for size, times in kept.items():
            times.append(_timed(pieces[size], wait))
    return curve_of((size, median(times)) for size, times in kept.items())


def _timed(run: Run, wait: Callable[[], None]) -> float:
    """Seconds of one run; short ones are repeated until the clock can tell."""
    count = 1
    while True:
        start = perf_counter()
        for _ in range(count):
            run()
        wait()
        seconds = perf_counter() - start
        if seconds > 2e-3 or count >= 256:
            return seconds / count
        count *= 4


def _waiter(device: torch.device) -> Callable[[], None]:
    import torch

    if device.type == "cuda":
        return lambda: torch.cuda.current_stream(device).synchronize()
    return lambda: None


# ------------------------------------------------------------------ operators


def measure_operators(device: torch.device, dtype: torch.dtype) -> dict[str, Curve]:
    """All kinds of operators in one number format."""
    import torch

    made: dict[str, Any] = {"device": device, "dtype": dtype}
    with torch.no_grad():
        curves = _products(made, device)
        passes: dict[float, Run] = {}
        specials: dict[float, Run] = {}
        for num_bytes in PASS_BYTES:
            values = torch.randn(num_bytes // (3 * dtype.itemsize), **made)
            out = torch.empty_like(
                values
            )  # memory that has its pages: fresh ones are measured apart
            passes[num_bytes] = partial(torch.mul, values, values.clone(), out=out)
            specials[num_bytes * 2 / 3] = partial(torch.ops.aten.silu.out, values, out=out)
        curves["pointwise"] = time_all(passes, device)
        curves["special"] = time_all(specials, device)
        if device.type == "cpu":
            curves[FRESH] = measure_fresh()
    return curves | _attention(made, device)


def measure_fresh() -> Curve:
    """What the pages of large new tensors take: writing one just made, less writing one that is there."""
    import torch

    cpu = torch.device("cpu")
    there: dict[float, Run] = {}
    made: dict[float, Run] = {}
    for num_bytes in FRESH_SIZES:
        there[num_bytes] = partial(torch.zeros(num_bytes, dtype=torch.uint8).fill_, 1)
        made[num_bytes] = partial(_made_and_written, num_bytes)
    new, old = time_all(made, cpu), time_all(there, cpu)
    least = 1e-12  # a curve's times are above 0
    return curve_of((n, max(new.seconds(n) - old.seconds(n), least * n)) for n, _ in new.points)


def _made_and_written(num_bytes: int) -> None:
    import torch

    torch.empty(num_bytes, dtype=torch.uint8).fill_(1)


def _products(made: Mapping[str, Any], device: torch.device) -> dict[str, Curve]:
    """Both products of a layer: values by the transposed weight, and gradients by the weight. Their layouts differ, and
    so do their rates, many times over where a format is emulated."""
    import torch

    forward: dict[float, Run] = {}
    backward: dict[float, Run] = {}
    for tokens, wide, out in PRODUCTS:
        weight = torch.randn(out, wide, **made)
        flop = 2.0 * tokens * wide * out
        forward[flop] = partial(
            torch.nn.functional.linear, torch.randn(tokens, wide, **made), weight
        )
        backward[flop] = partial(torch.matmul, torch.randn(tokens, out, **made), weight)
    return {
        "matmul_transposed": time_all(forward, device),
        "matmul": time_all(backward, device),
    }


def _attention(made: Mapping[str, Any], device: torch.device) -> dict[str, Curve]:
    import torch

    from ssdtune.visit.counting import BACKWARD_FLOP

    forward: dict[float, Run] = {}
    both: dict[float, Run] = {}
    for length in LENGTHS:
        q, k, v = (torch.randn(1, 8, length, 64, **made).requires_grad_() for _ in range(3))
        ahead = _attend(q.detach(), k.detach(), v.detach())
        flop = 2.0 * 8 * length * length * 64
        forward[flop] = ahead
        both[flop] = _attend_and_back(q, k, v)
    one, two = time_all(forward, device), time_all(both, device)
    back = {
        flop * BACKWARD_FLOP: max(seconds - one.seconds(flop), seconds / 10)
        for flop, seconds in two.points
    }
    return {"attention": one, "attention_backward": curve_of(back.items())}


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Run:
    import torch

    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _attend_and_back(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Run:
    import torch

    ahead = _attend(q, k, v)
    return lambda: torch.autograd.grad(ahead().sum(), (q, k, v))


# ------------------------------------------------------------------ operators inside a model

# A model of no particular kind: what its blocks take, beyond their operators' curves, is taken for any model's.
REFERENCE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "vocab_size": 1024,
}
REFERENCE_TOKENS = (16, 64, 128, 256, 512)
LEAST_FACTOR = 1.0  # within a model nothing is faster than alone
PACE_PRODUCT = (128, 576, 1536)  # tokens, width, width of the result
REFERENCE_STEP_S = 4.0  # a number format whose step takes longer gets no more tokens


class Point(NamedTuple):
    """A visit: operators that the model's code and that autograd calls, seconds by their curves, seconds measured."""

    num_calls: int
    num_autograd_calls: int
    curves_s: float
    seconds: float


def measure_in_model(
    device: torch.device, dtype: torch.dtype, operators: dict[str, Curve]
) -> InModel:
    """Trains an adapter on a small random model, streamed with all weights in place, at several lengths."""
    import warnings

    import torch

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries about one another
        model = _reference(Path(folder), device, dtype)
        points: list[Point] = []
        try:
            for tokens in REFERENCE_TOKENS:
                ids = torch.randint(3, REFERENCE["vocab_size"], (1, tokens), device=device)
                start = perf_counter()
                points += _passes(model, ids, operators)
                if perf_counter() - start > REFERENCE_STEP_S:
                    break
        finally:
            model.get_base_model().ssdtune.close()
    return fit_in_model(points, is_hidden=device.type != "cpu")


def _reference(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The model, its file in `folder`, with LoRA on all linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from ssdtune.schedule.plan import Budgets
    from ssdtune.swap.storage import BufferedStorage
    from ssdtune.visit.assemble import assemble
    from ssdtune.visit.build import build_meta
    from ssdtune.visit.draft import Options

    sizes: dict[str, Any] = {**REFERENCE, "num_attention_heads": 8, "num_key_value_heads": 8}
    made: Any = LlamaForCausalLM(LlamaConfig(**sizes))
    made.to(dtype).save_pretrained(folder)
    room = 2**30  # all of it, several times
    options = Options(
        device=device,
        budgets=Budgets(ram_bytes=room, device_bytes=room if device.type != "cpu" else 0),
        storage=BufferedStorage(),
    )
    base: Any = assemble(build_meta(folder, dtype=dtype), options)
    return get_peft_model(base, LoraConfig(r=16, target_modules="all-linear")).train()


def _passes(model: Any, ids: torch.Tensor, operators: dict[str, Curve]) -> Iterator[Point]:
    """A layer's two passes at this length."""
    import torch

    from ssdtune.schedule.plan import Direction, Lane
    from ssdtune.visit.rehearsal import rehearse

    work = rehearse(model, {"input_ids": ids}).work
    assert work is not None
    engine = model.get_base_model().ssdtune.engine
    times: dict[Direction, list[float]] = {direction: [] for direction in Direction}
    dtype, paces = getattr(torch, work.dtype), list[float]()
    for _ in range(ROUNDS + 2):
        paces.append(_pace(operators, ids.device, dtype))
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
        for op in list(engine.trace):
            if op.step == engine.step and op.lane is Lane.COMPUTE and ".layers." in op.block:
                times[op.direction].append(op.end_s - op.start_s - op.wait_s)
    layer = next(i for i, recipe in enumerate(engine.recipes) if ".layers." in recipe.name)
    curves = Profile(name="probe", operators={work.dtype: operators}, transfers={})
    for direction, measured in times.items():
        each = work.passes["train"][layer, direction][0]
        steady = measured[2 * REFERENCE["num_hidden_layers"] :]  # the first steps allocate
        yield Point(
            each.num_calls - each.num_autograd_calls,
            each.num_autograd_calls,
            each.curves_s(curves, work.dtype) * median(paces),
            median(steady),
        )


def _pace(operators: dict[str, Curve], device: torch.device, dtype: torch.dtype) -> float:
    """How long a product takes now, over what its curve says: shared machines drift between the two measurements."""
    import torch

    tokens, wide, out = PACE_PRODUCT
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    values, weight = torch.randn(tokens, wide, **made), torch.randn(out, wide, **made)
    run, wait = partial(torch.nn.functional.linear, values, weight), _waiter(device)
    run()
    wait()
    curve = operators["matmul_transposed"]
    return median(_timed(run, wait) for _ in range(3)) / curve.seconds(2.0 * tokens * wide * out)


def fit_in_model(points: Sequence[Point], *, is_hidden: bool) -> InModel:
    """Overheads and factor, relative errors as small as may be."""
    if is_hidden:  # few tokens are all overhead, many all work
        few = min(points, key=lambda point: point.seconds)
        many = max(points, key=lambda point: point.seconds)
        overhead = few.seconds / (few.num_calls + few.num_autograd_calls)
        return InModel(
            overhead_s=overhead,
            autograd_overhead_s=overhead,
            factor=many.seconds / many.curves_s,
            is_hidden=True,
        )
    factor = max(LEAST_FACTOR, _least_squares(points, None)[2])
    overhead, by_autograd, _ = _least_squares(points, factor)
    if min(overhead, by_autograd) < 0:  # curves that are too slow for what was measured
        return InModel(factor=median(p.seconds / p.curves_s for p in points))
    return InModel(overhead_s=overhead, autograd_overhead_s=by_autograd, factor=factor)


def _least_squares(points: Sequence[Point], factor: float | None) -> tuple[float, float, float]:
    """Of measured = overhead * calls + overhead' * autograd's calls + factor * curves, each row over what was
    measured. factor: None: to be found as well."""
    import torch

    rows = [
        [p.num_calls / p.seconds, p.num_autograd_calls / p.seconds, p.curves_s / p.seconds]
        for p in points
    ]
    left = torch.tensor(rows, dtype=torch.float64)
    right = torch.ones(len(rows), 1, dtype=torch.float64)
    if factor is None:
        found = torch.linalg.lstsq(left, right, driver="gelsd").solution
        return found[0].item(), found[1].item(), found[2].item()
    found = torch.linalg.lstsq(left[:, :2], right - factor * left[:, 2:], driver="gelsd").solution
    return found[0].item(), found[1].item(), factor


# ------------------------------------------------------------------ transfers


def measure_reads(file: Path) -> Curve:
    """Reads all over a large file by the engine's readers, the way that files there are read."""
    import torch

    from ssdtune.swap.readers import ReaderPool
    from ssdtune.swap.storage import Extent, aligned_bytes, choose_storage

    storage = choose_storage(file).storage
    end = file.stat().st_size
    sizes = [n for n in READ_BYTES if n * 2 <= end] or [end // 2 // 4096 * 4096]
    memory = aligned_bytes(max(sizes))
    steps = itertools.count()
    with ReaderPool(storage) as pool:

        def read(num_bytes: int) -> None:
            last = max(
                (end - num_bytes) // storage.alignment * storage.alignment, storage.alignment
            )
            place = next(steps) * READ_STRIDE % last
            pool.submit([Extent(file, place, num_bytes, 0)], memory, label="probe").wait(60)

        pieces = {float(n): partial(read, n) for n in sizes}
        return time_all(pieces, torch.device("cpu"))


def measure_writes(folder: Path) -> Curve:
    """Writes into a scratch file that has its blocks already."""
    import torch

    from ssdtune.swap.scratch import ScratchFile
    from ssdtune.swap.storage import aligned_bytes

    memory = aligned_bytes(max(READ_BYTES))
    memory.fill_(7)
    file = ScratchFile(folder)
    try:
        file.reserve(max(READ_BYTES))
        view = memory.numpy().data
        pieces = {float(n): partial(file.write, 0, view[:n]) for n in READ_BYTES}
        return time_all(pieces, torch.device("cpu"))
    finally:
        file.close()


def measure_copies(device: torch.device) -> dict[str, Curve]:
    """Bytes from buffer to slot: a copy in RAM, and to, from and within a device where there is one."""
    import torch

    from ssdtune.swap.storage import aligned_bytes

    has_device = device.type == "cuda"
    source = aligned_bytes(max(COPY_BYTES), pin=has_device)
    target = aligned_bytes(max(COPY_BYTES))
    cpu = torch.device("cpu")
    pieces = {float(n): partial(target[:n].copy_, source[:n]) for n in COPY_BYTES}
    found = {"unpack": time_all(pieces, cpu), "decode": measure_decoding(target)}
    if has_device:
        there = torch.empty(max(COPY_BYTES), dtype=torch.uint8, device=device)
        beside = torch.empty_like(there)
        pairs = (("h2d", there, source), ("d2h", source, there), ("d2d", there, beside))
        for name, to, of in pairs:
            pieces = {float(n): partial(to[:n].copy_, of[:n], True) for n in COPY_BYTES}
            found[name] = time_all(pieces, device)
    return found


def measure_decoding(target: torch.Tensor) -> Curve:
    """Bytes of bfloat16 weights that come from 4-bit codes: the usual packing. target: uint8, enough for the largest."""
    import torch

    from ssdtune.kernels.affine import Affine
    from ssdtune.kernels.unpack import unpack
    from ssdtune.swap.header import DTYPE_BITS

    format = Affine(bits=4, order=(4,))
    pieces = {}
    for n in COPY_BYTES:
        shape = (n // 2,)
        parts = [
            torch.randint(256, (math.prod(p.shape) * DTYPE_BITS[p.dtype] // 8,), dtype=torch.uint8)
            for p in format.parts(shape)
        ]
        parts[1] = torch.full((n // 2 // format.group,), 0.01, dtype=torch.bfloat16)
        out = target[:n].view(torch.bfloat16)
        pieces[float(n)] = partial(unpack, format, parts, out)
    return time_all(pieces, torch.device("cpu"))


def measure_slowing(file: Path, device: torch.device) -> float:
    """Seconds that matrix products lose for each byte that a reader reads meanwhile, 0 or more: as in training, the
    products of weights that no cache holds, the reads from all over the file into memory that none holds either."""
    import torch

    from ssdtune.swap.readers import ReaderPool
    from ssdtune.swap.storage import Extent, aligned_bytes, choose_storage

    values = torch.randn(128, 1024, device=device)
    weights = itertools.cycle([torch.randn(2816, 1024, device=device) for _ in range(8)])
    wait = _waiter(device)

    def run() -> None:
        torch.nn.functional.linear(values, next(weights))

    storage, end = choose_storage(file).storage, file.stat().st_size
    num_bytes = min(16 * MIB, end // 2 // 4096 * 4096)
    memory = aligned_bytes(SLOWING_BUFFERS * num_bytes)
    stop = threading.Event()
    with ReaderPool(storage) as pool:
        num_reads = 0

        def read() -> None:
            nonlocal num_reads
            while not stop.is_set():
                place = num_reads * READ_STRIDE % (end - num_bytes) // 4096 * 4096
                at = num_reads % SLOWING_BUFFERS * num_bytes
                to = memory[at : at + num_bytes]
                pool.submit([Extent(file, place, num_bytes, 0)], to, label="probe").wait(60)
                num_reads += 1

        lost: list[float] = []
        for _ in range(SLOWING_ROUNDS):
            alone, _ = _for_a_while(run, wait)
            num_reads = 0
            stop.clear()
            reader = threading.Thread(target=read)
            reader.start()
            beside, seconds = _for_a_while(run, wait)
            num_bytes_read = num_reads * num_bytes
            stop.set()
            reader.join()
            lost.append((1 - alone / beside) * seconds / max(num_bytes_read, num_bytes))
    return max(0.0, median(lost))


def _for_a_while(run: Run, wait: Callable[[], None]) -> tuple[float, float]:
    """Seconds of one run, over many, and of all of them."""
    count, start = 0, perf_counter()
    while perf_counter() - start < SLOWING_S:
        run()
        wait()
        count += 1
    seconds = perf_counter() - start
    return seconds / count, seconds


# ------------------------------------------------------------------ the machine


def measure(folder: Path, file: Path | None = None) -> Profile:
    """The profile of this machine. folder: on the drive that will stream. file: a large one there to read; without it
    one is written for the purpose and removed. Raises StorageError where the drive fails."""
    import torch

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    operators = {name: measure_operators(device, getattr(torch, name)) for name in DTYPES}
    in_model = {
        name: measure_in_model(device, getattr(torch, name), curves)
        for name, curves in operators.items()
    }
    with random_file(folder) if file is None else contextlib.nullcontext(file) as read_from:
        transfers = {
            "nvme_read": measure_reads(read_from),
            "nvme_write": measure_writes(folder),
            **measure_copies(device),
        }
        slowing = measure_slowing(read_from, device)
    return Profile(
        name=_machine_name(device),
        operators=operators,
        transfers=transfers,
        in_model=in_model,
        reading_takes=slowing,
    )


def _machine_name(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def processor_name() -> str:
    """As the kernel has it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.lower().startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


# ------------------------------------------------------------------ the verb


def print_probe(folder: Path, out: Path, file: Path | None = None) -> int:
    """Measures, prints, writes; returns 0."""
    start, before = perf_counter(), _cpu_seconds()
    profile = measure(folder, file)
    save_profile(profile, out)
    for line in profile_lines(profile):
        say(line)
    others = (_cpu_seconds() - before) / (perf_counter() - start)
    if others > BUSY_CORES:
        say(
            f"warning: other processes used {others:.2g} cores meanwhile, so that rates are too low and times "
            "predicted from them too long: measure again when the machine is idle"
        )
    say(f"written   {out} in {perf_counter() - start:.0f} s")
    return 0


def _cpu_seconds() -> float:
    """CPU time of all processes but this one, and what other machines took of these cores (proc(5), /proc/stat)."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields)
    own = os.times()
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - own.user - own.system - own.children_user - own.children_system


def profile_lines(profile: Profile) -> Sequence[str]:
    """The rates at the largest sizes."""
    lines = [f"machine   {profile.name}"]
    for dtype, curves in profile.operators.items():
        rates = (
            f"matmul {curves['matmul'].rate / 1e9:,.3g} / {curves['matmul_transposed'].rate / 1e9:,.3g} GFLOP/s · attention "
            f"{curves['attention'].rate / 1e9:,.3g} GFLOP/s · values {curves['pointwise'].rate / 1e9:.3g} GB/s"
        )
        inside = profile.in_model.get(dtype, InModel())
        rates += f" · in a model {inside.factor:.2f} x + {inside.overhead_s * 1e6:.0f} us a call, {inside.autograd_overhead_s * 1e6:.0f} by autograd"
        lines.append(f"{dtype:9} {rates}")
    told = [f"{name} {curve.rate / 1e9:.3g} GB/s" for name, curve in profile.transfers.items()]
    lines.append(
        f"bytes     {' · '.join(told)} · compute loses {profile.reading_takes * 1e12:.0f} ms for each GB read"
    )
    return lines
