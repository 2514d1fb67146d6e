"""One training run whose memory is watched, in a process of its own. Not a test: test_bounded.py starts it.

    python bounded_child.py '{"folder": …, "mode": "streamed", …}'     prints one JSON line of results

With "group" it joins that memory cgroup first. When everything is imported and the math libraries have been used, it
sets the group's limit to what it holds plus "headroom" bytes, then opens the model and trains. Before that it has
freed "freed" bytes, as what comes before a run does.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def held(what: str = "VmRSS") -> int:
    """Bytes, from /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(what + ":")[2].split()[0]) * 1024


def make_holes(num_bytes: int) -> bytes:
    """Takes so much of the C library's heap and frees all but the last piece of it, which keeps the heap from shrinking.

    Pieces are smaller than what malloc maps by itself (128 KiB: mallopt(3))."""
    pieces = [b"x" * 100_000 for _ in range(num_bytes // 100_000)]
    return pieces[-1]


def limit(group: Path, headroom: int) -> None:
    """Anonymous memory may grow by `headroom`; the page cache counts as well, but is given up first."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    anonymous = int(stat["rss"] if "rss" in stat else stat["anon"])
    is_v1 = (group / "memory.limit_in_bytes").exists()
    name = "memory.limit_in_bytes" if is_v1 else "memory.max"
    (group / name).write_text(str(anonymous + headroom))


def in_memory(job: dict[str, Any]) -> Any:
    """What the limit must not let live: the same model with its weights in memory."""
    import torch
    from safetensors.torch import load
    from transformers import AutoConfig, AutoModelForCausalLM

    state = {}
    for shard in sorted(Path(job["folder"]).glob("*.safetensors")):
        state |= load(shard.read_bytes())  # not a mapping of the file, which could be given up
    config = AutoConfig.from_pretrained(job["folder"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(state)
    return model


def streamed(job: dict[str, Any]) -> Any:
    """The smallest budget with room for the next block while one computes."""
    from support import cpu_options, smallest_ram

    from ssdtune.schedule.plan import Budgets, Tier
    from ssdtune.swap.storage import choose_storage
    from ssdtune.visit.assemble import assemble
    from ssdtune.visit.build import build_meta

    meta = build_meta(job["folder"])
    storage = choose_storage(Path(job["folder"])).storage
    options = cpu_options(
        storage,
        Budgets(ram_bytes=int(smallest_ram(meta, storage) * 2.3)),
        micro_batch_size=1,
        chunk_tokens=job["tokens"],
        block_inputs=Tier(job["block_inputs"]),
        scratch=Path(job["scratch"]),
        timeout_s=120.0,
    )
    return assemble(meta, options)


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Two steps: a short one that makes the optimizer's states, then the one that is measured."""
    group = Path(job["group"]) if job.get("group") else None
    if group is not None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    import torch
    from peft import LoraConfig, get_peft_model

    from ssdtune.schedule.memory import Passes
    from ssdtune.visit import memory
    from ssdtune.visit.assemble import assemble  # noqa: F401
    from ssdtune.visit.rehearsal import rehearse

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    pinned = make_holes(job["freed"]) if job["freed"] else b""
    before, base = held(), memory.settled_bytes()
    if group is not None:
        limit(group, job["headroom"])
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    model = streamed(job) if job["mode"] == "streamed" else in_memory(job)
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"])).train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(3, job["vocab"], (job["rows"], job["tokens"]))
    result: dict[str, Any] = {"given_back": before - base, "base": base, "trims": 0, "stored": 0}
    keeper = None
    if job["mode"] == "streamed":
        footprint = rehearse(adapted, {"input_ids": ids[:1]}).footprint
        peak = memory.predict(adapted, footprint, Passes(num=job["rows"]), base_bytes=base)
        keeper = memory.hold_to(adapted, peak)
        result |= {"predicted": peak.ram_bytes, "natural": peak.natural_bytes, "how": peak.how}
        result["parts"] = dict(peak.ram)
    for batch in (ids[:, :8], ids):
        loss = adapted(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        result["loss"] = float(loss)
    result["peak"] = held("VmHWM")
    del pinned
    if keeper is not None:
        store = model.ssdtune.input_store
        result["trims"] = keeper.num_trims
        result["stored"] = 0 if store is None else store.reserved_bytes
        model.ssdtune.close()
    return result


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    print("RESULT " + json.dumps(main(json.loads(sys.argv[1]))), flush=True)
